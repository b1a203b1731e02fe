"""The share of a GPU's own speed that each stage reaches from JPEG files: python tests/benchmarks/gpu.py [ENCODER ...]

Beside each rate of ours the bare loop's best one on tensors that already lie in the GPU's memory, channels last, both
in bfloat16, first eager for all encoders and then compiled. `reading` has no encoder behind it: what an encoder can
get from files at most. All in one process, because starting one takes longer than measuring. Galaxies and encoders
come from

    python tests/benchmarks/prepare.py --output .benchmarks --encoders convnext_nano convnext_base
"""

import argparse
import tempfile
from pathlib import Path

import bare_loop
import ours
import torch
from competitor import Clock

WORK = Path(".benchmarks")
SEED = 42
# The bare loop's forward pass, where a stage has no backward one.
LIMIT_OF = {"prediction": "forward", "embeddings": "forward", "reading": "forward", "unfrozen": "training"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="*", default=["convnext_nano", "convnext_base"])
    parser.add_argument("--galaxies", type=int, default=8192, help="of predictions and embeddings")
    parser.add_argument("--training_galaxies", type=int, default=1536)
    parser.add_argument("--training_batch_size", type=int, default=64)
    choices = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    limits = {}
    for is_compiled in (False, True):
        for encoder in choices.encoders:
            for row, (measure, is_limit) in ROWS.items():
                if is_compiled and row in ("reading", "embeddings"):
                    continue
                rate, memory = run(measure, encoder, is_compiled, choices)
                mode = "compiled" if is_compiled else "eager"
                line = f"{encoder:16}{mode:10}{row:12}{rate:>10.0f} images/s{memory:>8.0f} MiB"
                if is_limit:
                    limits[encoder, row] = max(rate, limits.get((encoder, row), 0))
                elif (encoder, LIMIT_OF[row]) in limits:
                    limit = limits[encoder, LIMIT_OF[row]]
                    line += f"{rate / limit:>8.2f} of the bare loop's {LIMIT_OF[row]} at its best so far"
                print(line, flush=True)


def run(measure, encoder, is_compiled, choices):
    """Images per second, and the most GPU memory in MiB."""
    is_training = measure in (measure_training, measure_unfrozen)
    with tempfile.TemporaryDirectory() as scratch:
        options = argparse.Namespace(
            encoder=str(WORK / "encoders" / encoder),
            fold=str(WORK / "fold-0.csv"),
            scratch=scratch,
            seed=SEED,
            epochs=3,
            galaxies=choices.training_galaxies if is_training else choices.galaxies,
            batch_size=choices.training_batch_size if is_training else ours.default_batch_size(torch.device("cuda")),
            arguments={},
            bf16=None,  # the GPU's default is to compute in it
        )
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        rate = measure(options, is_compiled)
    return rate, torch.cuda.max_memory_allocated() / 2**20


def measure_forward(options, is_compiled):
    rates = []
    for batch_size in bare_loop.BATCH_SIZES["cuda"]:
        torch.compiler.reset()
        step = bare_loop.forward_pass(options, bare_variant(is_compiled), "cuda", batch_size)
        rates.append(bare_loop.measure_rate(step, batch_size, "cuda"))
    return max(rates)


def measure_training(options, is_compiled):
    step = bare_loop.training_step(options, bare_variant(is_compiled), "cuda")
    return bare_loop.measure_rate(step, options.batch_size, "cuda")


def bare_variant(is_compiled):
    return "compiled_channels_last" if is_compiled else "eager_channels_last"


def measure_unfrozen(options, is_compiled):
    return ours.train_unfrozen_once(options, Clock(), torch_compile=is_compiled)["images_per_second"]


def measure_prediction(options, is_compiled):
    return ours.rate_of_prediction(options, Clock(), torch_compile=is_compiled)


def measure_embeddings(options, is_compiled):
    return ours.rate_of_embedding(options, Clock(), torch_compile=is_compiled)


def measure_reading(options, is_compiled):
    return ours.read_images(options, Clock())["images_per_second"]


# Each with whether it is a limit and not ours.
ROWS = {
    "forward": (measure_forward, True),
    "reading": (measure_reading, False),
    "prediction": (measure_prediction, False),
    "embeddings": (measure_embeddings, False),
    "training": (measure_training, True),
    "unfrozen": (measure_unfrozen, False),
}


if __name__ == "__main__":
    main()

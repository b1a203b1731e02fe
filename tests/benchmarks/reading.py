"""Prediction from image files beside the bare network: python reading.py ENCODER IMAGES_FOLDER [ROUNDS [bf16]].

On the CPU, in one process and in turns, so that a machine that is slow for a while is slow for all of them; ratios are
those of one round. The bare network runs on pixels that lie in memory, ours on these and on files. Both eager and
compiled, at the batch size that prediction takes on a CPU.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from ours import read_image

from zoobot_hf import ZoobotForImageClassification, image_processor_for
from zoobot_hf.training.machine import InferenceRunner, default_batch_size

GALAXIES = 128


def main(encoder, folder, rounds="6", precision="float32"):
    is_bf16 = precision == "bf16"
    processor = image_processor_for(encoder)
    size = default_batch_size(torch.device("cpu"))
    paths = sorted(Path(folder).glob("*.jpg"))[:GALAXIES]
    paths = paths[: len(paths) // size * size]
    if not paths:
        sys.exit(f"{folder} has fewer than {size} files *.jpg, a batch; give a folder with more.")
    competitors = {}
    for torch_compile in (False, True):
        mode = "compiled" if torch_compile else "eager"
        model = load(encoder)
        runner = InferenceRunner(load(encoder), batch_size=size, torch_compile=torch_compile, bf16=is_bf16)
        first = [read_image(path, processor) for path in paths[:size]]
        pixels = processor.rescale_and_normalize(torch.stack(first))
        model = torch.compile(model) if torch_compile else model
        competitors |= {
            f"bare, {mode}": partial(repeat, partial(run_bare, model, pixels, is_bf16), len(paths) // size),
            f"ours, {mode}": partial(repeat, partial(runner, pixels), len(paths) // size),
            f"ours, {mode}, from files": partial(predict_files, runner, processor, paths),
        }
    for predict in competitors.values():
        predict()
    rates = {name: [] for name in competitors}
    for _ in range(int(rounds)):
        for name, predict in competitors.items():
            started = time.perf_counter()
            predict()
            rates[name].append(len(paths) / (time.perf_counter() - started))
    print_table(rates)


def load(encoder):
    model = ZoobotForImageClassification.from_pretrained(encoder, label_names=["a", "b"])
    return model.eval().to(memory_format=torch.channels_last)


def repeat(step, times):
    for _ in range(times):
        step()


def run_bare(model, pixels, is_bf16):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        model(pixel_values=pixels)


def predict_files(runner, processor, paths):
    for images in runner.read(partial(read_image, processor=processor), paths, collate=torch.stack):
        runner(processor.rescale_and_normalize(images))


def print_table(rates):
    """Medians; the ratio is that to the faster of the bare ones in the same round."""
    limits = [max(pair) for pair in zip(rates["bare, eager"], rates["bare, compiled"], strict=True)]
    print(f"{'medians, torch ' + torch.__version__:32}{'images/s':>10}{'of the best bare one':>22}")
    for name, values in rates.items():
        ratio = statistics.median(value / limit for value, limit in zip(values, limits, strict=True))
        print(f"{name:32}{statistics.median(values):>10.1f}{ratio:>22.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

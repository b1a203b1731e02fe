"""Prediction from image files beside the encoder alone: python reading.py ENCODER IMAGES_FOLDER [ROUNDS].

Compiled, on the CPU, in one process: each round runs the encoder on pixels that lie in memory, on files that are
decoded beside it (`read_ahead`), and on files that are decoded in turns with it (`read_in_turns`). Ratios are those of
one round, so that a machine that is slow for a while is slow for all of them.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

from zoobot_hf import ZoobotForImageClassification, image_processor_for
from zoobot_hf.data.images import open_image, read_ahead, read_in_turns
from zoobot_hf.training.machine import InferenceRunner, default_batch_size, stack_images

GALAXIES = 128


def main(encoder, folder, rounds="6"):
    model = ZoobotForImageClassification.from_pretrained(encoder, label_names=["a", "b"])
    processor, size = image_processor_for(encoder), default_batch_size(model.device)
    runner = InferenceRunner(model, batch_size=size, torch_compile=True)
    paths = sorted(Path(folder).glob("*.jpg"))[:GALAXIES]

    def read(path):
        return processor.crop_and_resize(open_image(path))

    pixels = processor.rescale_and_normalize(stack_images([read(path) for path in paths[:size]]))

    def predict_files(read_batches):
        for fields in read_batches(read, paths, batch_size=size):
            runner(processor.rescale_and_normalize(stack_images(fields)))

    def predict_pixels():
        for _ in range(0, len(paths), size):
            runner(pixels)

    competitors = {
        "pixels in memory": predict_pixels,
        "files, decoded beside": lambda: predict_files(read_ahead),
        "files, decoded in turns": lambda: predict_files(read_in_turns),
    }
    for predict in competitors.values():
        predict()
    rates = {name: [] for name in competitors}
    for _ in range(int(rounds)):
        for name, predict in competitors.items():
            started = time.perf_counter()
            predict()
            rates[name].append(len(paths) / (time.perf_counter() - started))
    print(f"{'medians, torch ' + torch.__version__:28}{'images/s':>10}{'ratio':>8}")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates["pixels in memory"], strict=True))
        print(f"{name:28}{statistics.median(values):>10.1f}{ratio:>8.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

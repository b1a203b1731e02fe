"""What every competitor's script shares: its options, the galaxies it reads, its clock and the result it writes.

It measures nothing itself. It imports only what Zoobot's environment has as well.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import torch

CLASS_NAMES = ["not ring", "ring"]
SHOWN_PACKAGES = ("torch", "torchvision", "timm", "transformers", "datasets", "accelerate", "zoobot", "galaxy-datasets")


class Clock:
    """Wall-clock seconds since the imports ended, of each epoch, and of the training in it."""

    def __init__(self):
        self.started = time.perf_counter()
        self.first_step_seconds = None
        self.epoch_starts = []
        self.rates = []

    def seconds(self):
        return time.perf_counter() - self.started

    def start_epoch(self):
        self.epoch_starts.append(self.seconds())

    def start_step(self):
        if self.first_step_seconds is None:
            self.first_step_seconds = self.seconds()

    def end_training_of_epoch(self, images):
        self.rates.append(images / (self.seconds() - self.epoch_starts[-1]))

    def summarize(self):
        """Called when training has ended: the first epoch has the start of the workers in it, so the rest is steady."""
        ends = [*self.epoch_starts[1:], self.seconds()]
        epochs = [end - start for start, end in zip(self.epoch_starts, ends, strict=True)]
        return {
            "seconds": self.seconds(),
            "first_step_seconds": self.first_step_seconds,
            "epoch_seconds": epochs,
            "images_per_second": statistics.median(self.rates[1:] or self.rates),
        }


def parse_options(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--task", required=True)
    parser.add_argument("--encoder", required=True, help="a folder in timm's Hub layout")
    parser.add_argument("--fold", required=True, help="a catalog with a column `split`")
    parser.add_argument("--output", required=True, help="gets the result as JSON")
    parser.add_argument("--scratch", required=True, help="a folder for checkpoints, caches and the like")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--galaxies", type=int, default=0, help="how many; the fold's own number when 0")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--arguments", type=json.loads, default={}, help="JSON: further arguments of our two stages")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="in bfloat16 or not; the default if absent"
    )
    return parser.parse_args()


def read_catalog(options, split):
    """A split's rows: `id_str`, `file_loc`, `label`. Repeated where more galaxies are asked for than there are."""
    fold = pd.read_csv(options.fold, dtype={"id_str": str})
    catalog = fold if split == "all" else fold[fold["split"] == split]
    if not options.galaxies or split in ("validation", "test"):
        return catalog.reset_index(drop=True)
    repeats = -(-options.galaxies // len(catalog))
    catalog = pd.concat([catalog] * repeats, ignore_index=True).head(options.galaxies)
    catalog["id_str"] += "-" + catalog.index.astype(str)
    return catalog


def run_task(description: str, tasks: dict[str, Callable]) -> None:
    """Runs the task that was asked for and writes what it returns."""
    options = parse_options(description)
    if options.task not in tasks:
        sys.exit(f"task is {options.task}; this competitor has {', '.join(tasks)}.")
    torch.manual_seed(options.seed)
    Path(options.scratch).mkdir(parents=True, exist_ok=True)
    result = tasks[options.task](options, Clock())
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    if torch.cuda.is_available():
        result["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    Path(options.output).write_text(json.dumps({**result, "versions": read_versions()}))


def read_versions():
    versions = {}
    for name in SHOWN_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def score_table(catalog, probabilities):
    """The probability of a ring and the label of each galaxy of the test split, in the catalog's order."""
    return {
        "id_str": catalog["id_str"].tolist(),
        "label": catalog["label"].tolist(),
        "probability": [float(value) for value in probabilities],
    }


def measure_prediction(predict, catalog, options, clock):
    """Images per second beyond a short catalog's: what starting and compiling take is the same for both.

    Args:
        predict: Predicts a catalog.
        catalog: A long one.
        options: With the batch size; two batches make the short catalog, which is run once more for warming up.
        clock: Running.
    """
    short = catalog.head(2 * options.batch_size)
    predict(short)
    marks = [clock.seconds()]
    for chosen in (short, catalog):
        predict(chosen)
        marks.append(clock.seconds())
    before, between, after = marks
    return (len(catalog) - len(short)) / ((after - between) - (between - before))


def measure_data_path(prepare, galaxies):
    """Milliseconds of CPU time for each galaxy; one thread, one process, the first tenth not counted.

    Args:
        prepare: Prepares the next galaxies for training and returns how many.
        galaxies: How many to prepare at least.
    """
    torch.set_num_threads(1)
    warm = 0
    while warm < galaxies / 10:
        warm += prepare()
    prepared, started = 0, time.process_time()
    while prepared < galaxies:
        prepared += prepare()
    return {"milliseconds": 1000 * (time.process_time() - started) / prepared}

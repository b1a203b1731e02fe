"""Loads models whose configurations were damaged at random; `python damaged_models.py FOLDER COUNT SEED`.

Prints a line of JSON for each: what was damaged, how it ended, how long it took and how far memory grew. A process of
its own, so that neither a crash nor its memory is the tests'.
"""

import copy
import json
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from zoobot_hf import ZoobotForImageClassification, ZoobotImageProcessor

FILES = ("config.json", "preprocessor_config.json")
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    65536,
    2**31,
    10**12,
    10**30,
    0.5,
    -1e30,
    float("nan"),
    float("inf"),
    "",
    "ring",
    "../../../../etc/passwd",
    "__import__('os').getcwd()",
    [],
    {},
    [0],
    [10**9] * 4,
    [65536, 65536, 65536, 65536],
    ["a", "b"],
    {"0": "a", "7": "b"},
    {"model_type": "zoobot"},
    {"height": 10**7, "width": 10**7},
    [[[[1]]]],
)
LONGEST = 20  # seconds for one model


def paths_in(settings, path=()):
    """The way to every value in nested dictionaries and lists."""
    items = settings.items() if isinstance(settings, dict) else enumerate(settings)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths_in(value, (*path, key))


def damage(settings, generator):
    """A copy with one to three values replaced, deleted or added, and what was done."""
    settings, done = copy.deepcopy(settings), []
    for _ in range(generator.randint(1, 3)):
        *way, key = generator.choice(list(paths_in(settings)))
        holder = settings
        for step in way:
            holder = holder[step]
        action, value = (
            generator.choice(("replace", "replace", "replace", "delete", "add")),
            copy.deepcopy(generator.choice(VALUES)),
        )
        if action == "delete" and len(holder) > 1:
            del holder[key]
        elif action == "add" and isinstance(holder, dict):
            holder[generator.choice(("auto_map", "quantization_config", "torch_dtype", "dtype", "size", "zoom"))] = (
                value
            )
        else:
            holder[key] = value
        done.append([action, [str(step) for step in (*way, key)], repr(value)[:60]])
    return settings, done


def damage_text(text, generator):
    """The text of a file, cut short or with characters changed."""
    if generator.random() < 0.5:
        return text[: generator.randrange(len(text))], "cut"
    position = generator.randrange(len(text))
    return text[:position] + generator.choice(("\0", "[" * 100_000, "9" * 5000, "}")) + text[position:], "characters"


def use(folder):
    """The logits of one image, from a model and a processor that are loaded from the folder."""
    processor = ZoobotImageProcessor.from_pretrained(folder)
    model = ZoobotForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        return model(**processor([Image.new("RGB", (40, 40), (90, 60, 30))])).logits


def outcome_of(folder):
    try:
        logits = use(folder)
        return "works" if logits.shape[0] == 1 else f"shape {tuple(logits.shape)}"
    except MemoryError as error:
        return f"memory: {error}"
    except Exception as error:  # any error will do, but one of memory
        message = " ".join(str(error).split())
        is_of_memory = "allocate" in message or "out of memory" in message
        return f"memory: {message}" if is_of_memory else f"{type(error).__name__}: {message[:200]}"


def too_long(signal_number, frame):
    raise TimeoutError("hangs")


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB, the peak


def main(source, count, seed):
    generator = random.Random(seed)
    signal.signal(signal.SIGALRM, too_long)
    folders = sorted(path for path in Path(source).iterdir() if path.name[0] != ".")
    for folder in folders:
        assert outcome_of(folder) == "works", outcome_of(folder)
    # A machine whose memory is eaten up must not take the tests with it.
    resource.setrlimit(resource.RLIMIT_AS, (32 * 2**30, 32 * 2**30))
    for number in range(count):
        damaged, name = Path(source, ".damaged"), generator.choice((*FILES, FILES[0]))
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(generator.choice(folders), damaged)
        text = (damaged / name).read_text()
        if generator.random() < 0.1:
            text, done = damage_text(text, generator)
        else:
            settings, done = damage(json.loads(text), generator)
            text = json.dumps(settings)
        (damaged / name).write_text(text)
        before, start = memory(), time.monotonic()
        signal.alarm(LONGEST)
        outcome = outcome_of(damaged)
        signal.alarm(0)
        grown, seconds = memory() - before, time.monotonic() - start
        print(json.dumps([number, name, done, outcome, round(seconds, 2), round(grown)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

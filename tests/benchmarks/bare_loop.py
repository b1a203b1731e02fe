"""Measures the limit: a bare torch loop over tensors that already lie in memory, with the memory allocator tuned.

Tasks: `unfrozen`, training steps with AdamW at the given batch size, BatchNorm statistics kept; `prediction`, forward
passes at several batch sizes. Each variant (eager or compiled, ordinary or channels-last memory format) is measured,
and the result is the best one. On a GPU, and on request on a CPU, both run under bfloat16 autocast.
"""

import statistics
import time

import numpy as np
import timm
import torch
from competitor import CLASS_NAMES, read_catalog, run_task
from PIL import Image
from torch import nn

from zoobot_hf.training.machine import tune_memory_allocator

PIXELS = 224
BATCH_SIZES = {"cpu": (8, 32), "cuda": (128, 512)}
SHORTEST_SECONDS = {"cpu": 10, "cuda": 2}
WARM_UP_RUNS, FEWEST_RUNS = 2, 5
VARIANTS = {
    "eager": (False, torch.contiguous_format),
    "eager_channels_last": (False, torch.channels_last),
    "compiled": (True, torch.contiguous_format),
    "compiled_channels_last": (True, torch.channels_last),
}


def read_images(options, count):
    """The first galaxies as float32 in 0-1, repeated where there are fewer."""
    paths = read_catalog(options, "all")["file_loc"]
    images = []
    for path in paths[:count]:
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("RGB").resize((PIXELS, PIXELS))))
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return batch.repeat(-(-count // len(batch)), 1, 1, 1)[:count]


def build_model(options, variant, device):
    is_compiled, memory_format = VARIANTS[variant]
    encoder = timm.create_model(f"local-dir:{options.encoder}", pretrained=True, num_classes=0)
    model = nn.Sequential(encoder, nn.Linear(encoder.num_features, len(CLASS_NAMES)))
    model = model.to(device, memory_format=memory_format)
    return torch.compile(model) if is_compiled else model


def measure_rate(step, images, device):
    """Images per second, by the median time of a step."""
    seconds = []
    for _ in range(WARM_UP_RUNS):
        step()
    while len(seconds) < FEWEST_RUNS or sum(seconds) < SHORTEST_SECONDS[device]:
        wait_for(device)
        started = time.perf_counter()
        step()
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return images / statistics.median(seconds)


def wait_for(device):
    if device != "cpu":
        torch.accelerator.synchronize()


def training_step(options, variant, device):
    model = build_model(options, variant, device).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images = read_images(options, options.batch_size).to(device, memory_format=VARIANTS[variant][1])
    labels = torch.arange(len(images), device=device) % len(CLASS_NAMES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def step():
        with use_bf16(options, device):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward_pass(options, variant, device, batch_size):
    model = build_model(options, variant, device).eval()
    images = read_images(options, batch_size).to(device, memory_format=VARIANTS[variant][1])

    def step():
        with torch.inference_mode(), use_bf16(options, device):
            model(images)

    return step


def use_bf16(options, device):
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or bool(options.bf16))


def train(options, clock):
    device = prepare_machine()
    rates = {
        variant: measure_rate(training_step(options, variant, device), options.batch_size, device)
        for variant in VARIANTS
    }
    return {"images_per_second": max(rates.values()), "rates": rates}


def predict(options, clock):
    device = prepare_machine()
    rates = {}
    for variant in VARIANTS:
        for batch_size in BATCH_SIZES[device]:
            torch.compiler.reset()
            step = forward_pass(options, variant, device, batch_size)
            rates[f"{variant}, batch {batch_size}"] = measure_rate(step, batch_size, device)
    return {"images_per_second": max(rates.values()), "rates": rates}


def prepare_machine():
    tune_memory_allocator()
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    run_task(__doc__, {"unfrozen": train, "prediction": predict})

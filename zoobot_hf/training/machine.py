"""What makes a network run at its full speed on the machine that is there."""

import copy
import ctypes
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional

from zoobot_hf.data.images import (
    MOST_READING_PROCESSES,
    Batch,
    Item,
    ReadingProcesses,
    Result,
    read_ahead,
    read_in_turns,
)

from .layer_fusion import fuse_layers, probe_image

# glibc's mallopt(3): parameter numbers from <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
ALLOCATOR_SWITCH = "ZOOBOT_HF_KEEP_ALLOCATOR"
# On two cores the embedded encoder predicts 311 galaxies/s at 8, 368 at 16 and 415 at 32; MobileNetV2 99, 110 and 121.
BATCH_SIZE_ON_CPU, BATCH_SIZE_ON_GPU = 32, 128


@functools.cache
def tune_memory_allocator() -> bool:
    """Whether glibc was told to keep large buffers, which makes networks on a CPU up to 2.7 times as fast.

    Left alone, it gives a layer's activations back to the kernel after each layer, and the page faults cost more than
    the arithmetic. The price is that the process keeps up to 2 GiB that it no longer uses. Other C libraries are left
    as they are, and so is glibc where the environment variable ZOOBOT_HF_KEEP_ALLOCATOR is set.
    """
    if sys.platform != "linux" or os.environ.get(ALLOCATOR_SWITCH):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def prepare_processes() -> None:
    """Gives each process its GPU; told nothing, accelerate takes several processes without a GPU for single ones."""
    PartialState(cpu=not torch.cuda.is_available())


def _reading_processes(device: torch.device) -> int:
    """How many processes read for a GPU: this process's share of the cores but one; none where none can be forked."""
    if device.type != "cuda" or "fork" not in multiprocessing.get_all_start_methods():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_READING_PROCESSES, cores // PartialState().num_processes - 1)


def default_batch_size(device: torch.device) -> int:
    """How many images a network without gradients takes at once.

    Args:
        device: Where it runs.
    """
    return BATCH_SIZE_ON_CPU if device.type == "cpu" else BATCH_SIZE_ON_GPU


def uses_bf16(device: torch.device, bf16: bool | None = None) -> bool:
    """Whether a network computes in bfloat16: as is asked for, or else on a GPU that has it in hardware.

    Args:
        device: Where it runs.
        bf16: What is asked for, if anything is.
    """
    if bf16 is not None:
        return bf16
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def trains_in_bf16(device: torch.device) -> bool:
    """Whether training steps are faster in bfloat16 on a device that computes in float32 otherwise.

    That is a CPU with AMX or AVX512_BF16. Without AMX, on an AMD EPYC, ConvNeXt nano trains 1.6 times as fast so, and
    MobileNetV2 1.2 times.

    Args:
        device: Where it runs.
    """
    # Private, and there from torch 2.6 on; the public `get_capabilities` isn't.
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


class InferenceRunner:
    """Runs a module on batches of images without gradients, in evaluation mode, as fast as its device allows.

    Convolutions get channels-last memory, and every batch the same size, so that a compiled module is compiled once and
    an image's result does not depend on how many others came with it. On a CPU a copy of the module runs whose layers
    are fused. Used in a `with` statement, it ends the processes that read for it.

    Args:
        module: Takes `pixel_values` (batch, channels, height, width); moved to channels-last memory.
        batch_size: Images that the module sees at once.
        torch_compile: Whether to compile the module, which takes up to a minute and pays from some thousand images on.
        bf16: Whether to compute in bfloat16; as in `uses_bf16` when absent.
    """

    def __init__(
        self, module: nn.Module, *, batch_size: int, torch_compile: bool = False, bf16: bool | None = None
    ) -> None:
        tune_memory_allocator()
        self.batch_size = batch_size
        first = next(module.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.module = module.eval().to(memory_format=torch.channels_last)
        self.torch_compile = torch_compile
        self.bf16 = uses_bf16(self.device, bf16)
        self._prepared: dict[torch.Size, Callable[..., Any]] = {}
        count = _reading_processes(self.device)
        self._processes = ReadingProcesses(count) if count > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes is not None:
            self._processes.close()

    def read(
        self, read: Callable[[Item], Result], items: Iterable[Item], *, collate: Callable[[list[Result]], Batch]
    ) -> Iterator[Batch]:
        """Batches of `batch_size` in order, read in the way that costs the module least on its device.

        Args:
            read: As in `ReadingProcesses.read`.
            items: As in `ReadingProcesses.read`.
            collate: As in `ReadingProcesses.read`.
        """
        if self._processes is not None:
            return self._processes.read(read, items, batch_size=self.batch_size, collate=collate)
        in_batches = read_in_turns if self.device.type == "cpu" else read_ahead
        return map(collate, in_batches(read, items, batch_size=self.batch_size))

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """The first output of the module, float32, (batch, ...), on the CPU.

        Args:
            pixel_values: At most `batch_size` images.
        """
        count = len(pixel_values)
        if count < self.batch_size:
            # Not in inference mode: a tensor that was made there is of another kind, which is compiled anew.
            pixel_values = functional.pad(pixel_values, (0, 0, 0, 0, 0, 0, 0, self.batch_size - count))
        size = pixel_values.shape[1:]
        if size not in self._prepared:
            self._prepared[size] = self._prepare(size)
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            inputs = pixel_values.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
            output: Tensor = self._prepared[size](pixel_values=inputs)[0]
            return output[:count].float().cpu()

    def _prepare(self, size: torch.Size) -> Callable[..., Any]:
        module = _without_precision(self.module)
        if self.device.type == "cpu":
            module = fuse_layers(module, probe_image(*size))
        return torch.compile(module) if self.torch_compile else module


def _without_precision(module: nn.Module) -> nn.Module:
    """The module without the mixed precision that accelerate leaves on it after training; the parameters are shared."""
    if "_original_forward" not in vars(module):
        return module
    bare = copy.copy(module)
    del bare.forward
    return bare

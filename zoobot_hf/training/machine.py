"""What the machine needs to be told once before the work starts."""

import ctypes
import functools
import sys

# glibc's mallopt(3): parameter numbers from <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@functools.cache
def tune_memory_allocator() -> bool:
    """Whether glibc was told to keep large buffers, which makes networks on a CPU up to 2.7 times as fast.

    Left alone, it gives a layer's activations back to the kernel after each layer, and the page faults cost more than
    the arithmetic. The price is that the process keeps up to 2 GiB that it no longer uses. Other C libraries are left
    as they are.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))

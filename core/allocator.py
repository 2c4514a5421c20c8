"""The C library's allocator, for processes that allocate the same tensors over and over."""

import ctypes
import sys

# Of malloc.h (mallopt(3)); mallopt takes ints, so 2 GiB is the most that can be named.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_THRESHOLD = 32 << 20  # of M_MMAP_THRESHOLD on 64 bits
_PAD = 32 << 20


def keep_freed_memory() -> bool:
    """Have this process keep up to 2 GiB of what it frees, of pieces below 32 MiB; False where the system has no such
    setting.

    Otherwise the tensors of every step are given back to the kernel and asked for again, and it clears each page of
    4 kB as it is touched: 4,500 of them a step of the embedded default, 2 to 3 % of its processor time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # musl has none
        return False
    settings = {_M_MMAP_THRESHOLD: _LARGEST_THRESHOLD, _M_TRIM_THRESHOLD: (1 << 31) - 1, _M_TOP_PAD: _PAD}
    return all([mallopt(name, value) for name, value in settings.items()])

"""The allocator of the process. The library leaves it alone; the command line and the benchmarks set it."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

# mallopt's numbers, of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# No single block of a forward pass is as large.
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let memory that was freed be taken again by this process, instead of going back to the kernel each time.

    A forward pass frees and takes the same large blocks again and again, and for every 4 kB that come anew the kernel
    clears a page: 41 layers of a small model were scored at 0.7 of the bare forward pass's speed, with this at 0.9
    (docs/performance.md). Does nothing but on Linux with glibc.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
            libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)

"""Settings of the process's allocator. Only the command line and the benchmarks change them, not the library."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Larger than any single block of a forward pass.
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Keep freed memory in the process for reuse, instead of returning it to the kernel.

    A forward pass frees and allocates the same large blocks repeatedly, and the kernel clears every page that it hands
    out: 41 layers of a small model were scored at 0.7 of the speed of the bare forward pass, with this at 0.9
    (docs/performance.md). Has no effect except on Linux with glibc.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
            libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)

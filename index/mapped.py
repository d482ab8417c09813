"""Files that stay readable when their names are gone: mapped as a whole when their folder is opened.

Python's own `mmap` keeps a descriptor for each map (before 3.13 always), of which a process has 1,024 by default: too
few for a datastore of 151 layers in many shards. The system needs none, so it is asked directly.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import weakref
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
# POSIX: mmap(3p) gives this address where it fails.
_FAILED = ctypes.c_void_p(-1).value


class Stamp(NamedTuple):
    """Tells a file, and whether it was written to."""

    device: int
    number: int
    size: int
    changed_ns: int


class Mapped(NamedTuple):
    """A file's bytes, read-only; they are in memory only as far as they are read."""

    data: Bytes
    stamp: Stamp


class OpenFolder:
    """A folder that is meant whatever its name comes to mean: files are looked up in it, not along a path."""

    def __init__(self, path: str | Path) -> None:
        """:raises OSError: there is no such folder."""
        self.path = Path(path)
        self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> OpenFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)

    @property
    def is_replaced(self) -> bool:
        """Whether another folder, or none, is at the path by now."""
        try:
            now = self.path.stat()
        except OSError:
            return True
        opened = os.fstat(self._handle)
        return (now.st_dev, now.st_ino) != (opened.st_dev, opened.st_ino)

    def map(self, name: str) -> Mapped:
        """A file's bytes.

        :param name: its place in the folder, with `/`.
        :raises OSError: it is missing, no regular file, or may not be read.
        """
        # A pipe would wait for its writer for ever without O_NONBLOCK.
        handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._handle)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "no regular file", name)
            return Mapped(_map(handle, found.st_size), _stamp(found))
        finally:
            os.close(handle)


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of the file that is at a path now; None where there is none."""
    try:
        return _stamp(path.stat())
    except OSError:
        return None


def _stamp(found: os.stat_result) -> Stamp:
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _map(handle: int, size: int) -> Bytes:
    if not size:
        return np.empty(0, np.uint8)
    address = _system().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory = (ctypes.c_uint8 * size).from_address(address)
    # Not when Python ends: a thread may still be reading, and the system unmaps all there is.
    weakref.finalize(memory, _system().munmap, address, size).atexit = False
    return np.frombuffer(memoryview(memory).toreadonly(), np.uint8)  # keeps `memory`


@cache
def _system() -> Any:  # noqa: ANN401  (ctypes has no types)
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library

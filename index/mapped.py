"""Memory-mapped files that stay readable after they are renamed or removed.

Python's own `mmap` keeps a file descriptor for each map (before 3.13 always), and a process has 1,024 by default: too
few for a datastore of 151 layers in many shards. The system call needs none, so it is called directly.
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
# POSIX: mmap(3p) returns this address on failure.
_FAILED = ctypes.c_void_p(-1).value


class Stamp(NamedTuple):
    """Identity of a file and of its state: changes if the file is replaced or written to."""

    device: int
    number: int
    size: int
    changed_ns: int


class Mapped(NamedTuple):
    """A file's bytes, read-only, loaded as they are read."""

    data: Bytes
    stamp: Stamp


class OpenFolder:
    """An opened folder: files are looked up in it even if another folder takes its path."""

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
        """Whether the path now leads to another folder, or to none."""
        try:
            now = self.path.stat()
        except OSError:
            return True
        opened = os.fstat(self._handle)
        return (now.st_dev, now.st_ino) != (opened.st_dev, opened.st_ino)

    def map(self, name: str) -> Mapped:
        """Return a file's bytes and stamp.

        :param name: path in the folder, with `/`.
        :raises OSError: it is missing, no regular file, or may not be read.
        """
        # Without O_NONBLOCK opening a pipe would block until it has a writer.
        handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._handle)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "no regular file", name)
            return Mapped(_map(handle, found.st_size), _stamp(found))
        finally:
            os.close(handle)


def map_handle(handle: int) -> Bytes:
    """Return the bytes of an open file, read-only; it may be closed afterwards, and need not have a name."""
    return _map(handle, os.fstat(handle).st_size)


def release(array: NDArray[Any]) -> None:
    """Take a mapped array's pages out of this process's memory; they are loaded again when they are next read.

    An array that is no part of a mapped file is left as it is.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if not (isinstance(owner, memoryview) and isinstance(owner.obj, ctypes.Array)):  # as `_map` makes them
        return
    first = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    size = array.ctypes.data + array.nbytes - first
    if size > 0:
        _system().madvise(first, size, mmap.MADV_DONTNEED)


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of the file now at a path; None if there is none."""
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
    # Not at exit: a thread may still be reading, and the system unmaps everything.
    weakref.finalize(memory, _system().munmap, address, size).atexit = False
    return np.frombuffer(memoryview(memory).toreadonly(), np.uint8)  # keeps `memory`


@cache
def _system() -> Any:  # noqa: ANN401  (ctypes has no types)
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library

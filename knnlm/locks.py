"""Ownership of folders: a lock file that only knnlm writes, and that the system unlocks when the process dies.

The lock, not a name or a PID, distinguishes the leftovers of a dead run from a running one, in another container too,
and from a folder that is not knnlm's. On a file system without locks nothing counts as a leftover.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".knnlm-lock"
BEING_WRITTEN = f"{LOCK}.new"
WORDS = b"knnlm works in this folder, or was stopped in it\n"


def lock_folder(folder: Path) -> int:
    """Put a lock file into a folder; it is locked before it gets its name.

    Return the handle that holds the lock, which `os.close` or the end of the process releases.
    """
    new = folder / BEING_WRITTEN
    handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        os.write(handle, WORDS)
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(folder / LOCK)
    except BaseException:
        os.close(handle)
        new.unlink(missing_ok=True)
        raise
    return handle


def holds_lock(folder: Path) -> bool:
    """Return whether this is a folder, not a link to one, with a lock file of knnlm's."""
    handle = _open_lock(folder)
    if handle is not None:
        os.close(handle)
    return handle is not None


def take_lock(folder: Path) -> int | None:
    """Lock a folder that a dead run left, and return the handle; None for any other folder."""
    handle = _open_lock(folder)
    if handle is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or the file system has no locks: then no run is known to be dead
        os.close(handle)
        return None
    if not is_locked_by(handle, folder):  # removed between opening and locking
        os.close(handle)
        return None
    return handle


def is_at_work(folder: Path) -> bool:
    """Return whether a run works in this folder; True also if it cannot be known to be dead."""
    handle = take_lock(folder)
    if handle is None:
        return holds_lock(folder)
    os.close(handle)
    return False


def is_locked_by(handle: int, folder: Path) -> bool:
    """Return whether the folder's lock file is the one that this handle has open."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(folder / LOCK))
    except OSError:
        return False


def sweep(parent: Path, pattern: str) -> None:
    """Remove the folders that dead runs left; one without a lock file of knnlm's is never touched.

    :param pattern: regular expression of their whole names.
    """
    for path in [path for path in parent.iterdir() if re.fullmatch(pattern, path.name)] if parent.is_dir() else []:
        handle = take_lock(path)
        if handle is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Lock a folder for the duration of the block.

    The lock is on the folder itself, so that nothing is written into it. Yields True, or False, without waiting, if the
    file system has no locks.
    :param wait: until the folder is free.
    :raises BlockingIOError: it is not free, and `wait` is false.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            alone = True
        except BlockingIOError:
            raise
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(handle)


def _open_lock(folder: Path) -> int | None:
    """The handle of the folder's lock file; None if it is no folder, or has no lock file of knnlm's."""
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            return None
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(handle).st_mode) and os.pread(handle, len(WORDS), 0) == WORDS:
        return handle
    os.close(handle)
    return None

"""Whose a folder is: a lock file in it, which only knnlm writes and the system unlocks when its process dies.

That, and neither a name nor a PID, tells what a dead run left from a run at work, in another container too, and from
a folder that is not knnlm's at all. Where a file system has no locks, nothing counts as left by the dead.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".knnlm-lock"
BEING_WRITTEN = f"{LOCK}.new"
WORDS = b"knnlm works in this folder, or was stopped in it\n"


def lock_folder(folder: Path) -> int:
    """Put our lock file into a folder; it is locked from the moment on at which it has its name.

    Gives the handle that holds the lock: it is let go with `os.close`, or when the process ends.
    """
    new = folder / BEING_WRITTEN
    handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        os.write(handle, WORDS)
        with suppress(OSError):  # no locks here
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(folder / LOCK)
    except BaseException:
        os.close(handle)
        new.unlink(missing_ok=True)
        raise
    return handle


def holds_lock(folder: Path) -> bool:
    """Is this a folder, no link to one, with a lock file that we wrote?"""
    handle = _open_lock(folder)
    if handle is not None:
        os.close(handle)
    return handle is not None


def take_lock(folder: Path) -> int | None:
    """The lock of a folder that a dead run left; None where it is no such folder, or its run is at work."""
    handle = _open_lock(folder)
    if handle is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or no locks here: then nobody is known to be dead
        os.close(handle)
        return None
    if not is_locked_by(handle, folder):  # removed between opening and locking
        os.close(handle)
        return None
    return handle


def is_at_work(folder: Path) -> bool:
    """Does a run work in this folder? Also where nothing tells whether it is dead."""
    handle = take_lock(folder)
    if handle is None:
        return holds_lock(folder)
    os.close(handle)
    return False


def is_locked_by(handle: int, folder: Path) -> bool:
    """Is it this handle's file that lies in the folder?"""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(folder / LOCK))
    except OSError:
        return False


def sweep(parent: Path, prefix: str) -> None:
    """Remove the folders with such a name that dead runs left; what has no lock file of ours is never touched."""
    for path in [path for path in parent.iterdir() if path.name.startswith(prefix)] if parent.is_dir() else []:
        handle = take_lock(path)
        if handle is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep others from changing a folder while the block lasts; waits for its turn.

    The lock is on the folder itself, so that nothing is written into it. Where there are no locks, nobody waits, and
    what is given is False.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(handle)


def _open_lock(folder: Path) -> int | None:
    """The lock file, if the folder is one and the file ours."""
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

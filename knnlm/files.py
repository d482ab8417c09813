"""Atomic output: folders and files that are either complete or absent, renamed into place.

A folder is built under a hidden name beside its place (`.NAME.partial`), with a lock file in it (`knnlm.locks`), and
renamed when it is complete. The hidden name is the same for all runs, so that a second run for a place fails at once.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnlm.errors import DatastoreError, DatastoreExists
from knnlm.locks import LOCK, holds_lock, is_locked_by, lock_folder, sweep, take_lock
from knnlm.places import (
    DATASTORE,
    UNFINISHED,
    at_work,
    has_parts,
    is_free,
    is_ours,
    is_whole,
    link_unfinished,
    refuse_existing,
    refuse_inputs,
    remove_ours,
    take_up,
    working_folder,
)

# Errors of the disk, not of the code or the input.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


@contextmanager
def new_folder(
    path: str | Path,
    *,
    overwrite: bool = False,
    inputs: Sequence[str | Path] = (),
    manifest: str = DATASTORE,
    work: str = "",
) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` if the block succeeds, and is removed if it fails.

    Leftovers of dead runs are removed first, and missing parents made. An empty folder at `path` is replaced; a
    non-empty one only with `overwrite`, if all its content is knnlm's, and after the new one is complete. If the block
    fails after `places.mark_unfinished` and `path` is free, a whole datastore is kept there, and one with finished
    parts under its temporary name; a note on the error says so. Without `overwrite`, the folder then holds what the
    same work has left.

    :param inputs, manifest, work: as in `places.refuse_inputs` and `places.refuse_existing`.
    :raises DatastoreExists: `path` holds something already (before the block runs), or another run is writing it.
    :raises DatastoreError: the disk is full, or the parent cannot be written.
    """
    allowed = Allowed(overwrite, manifest, work)
    with claim_folder(path, allowed, inputs) as temporary, put_in_place(temporary, path, allowed), disk_errors(path):
        yield temporary


@dataclass(frozen=True)
class Allowed:
    """What a new folder may replace; fields as in `places.refuse_existing`."""

    overwrite: bool = False
    manifest: str = DATASTORE
    work: str = ""

    def check(self, path: str | Path) -> None:
        """Raises as `places.refuse_existing`."""
        refuse_existing(path, overwrite=self.overwrite, manifest=self.manifest, work=self.work)


@contextmanager
def claim_folder(path: str | Path, allowed: Allowed, inputs: Sequence[str | Path] = ()) -> Iterator[Path]:
    """The first half of `new_folder`: reserve the place for the duration of the block. Nothing is put there."""
    target = Path(path).resolve()
    with ExitStack() as stack:
        with disk_errors(path, OSError):
            refuse_inputs(path, inputs)
            stack.callback(remove_empty, make_parents(target))
            temporary = stack.enter_context(_claimed(target, allowed))
            _bring_back(target, allowed.manifest)
            allowed.check(path)
        yield temporary


@contextmanager
def put_in_place(temporary: Path, path: str | Path, allowed: Allowed) -> Iterator[None]:
    """The second half of `new_folder`: move the claimed folder into place if the block succeeds."""
    target = Path(path).resolve()
    try:
        yield
        with disk_errors(path, OSError):
            _sync_tree(temporary)
            allowed.check(path)
            (temporary / UNFINISHED).unlink(missing_ok=True)
            _swap(temporary, target, allowed.manifest)
    except BaseException as error:
        _end_badly(error, temporary, target, path)
        raise


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yield a temporary folder, removed after the block; leftovers of dead runs are removed first.

    :raises DatastoreError: it cannot be made; names TMPDIR.
    """
    parent = Path(tempfile.gettempdir())
    with ExitStack() as stack:
        with disk_errors(parent, OSError, "TMPDIR"):
            sweep(parent, re.escape(prefix) + ".*")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
            stack.callback(os.close, lock_folder(folder))
        yield folder


def write_json(path: str | Path, document: Mapping[str, Any]) -> None:
    """Write strict JSON; NaN and infinity become null, NumPy numbers plain ones. Raises as `write_text`."""
    write_text(path, json.dumps(strict_json(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, atomically.

    :raises OSError: the folder is missing or read-only, or the disk is full; names `path`, which is unchanged.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        with temporary.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(target)
        raise
    fsync_folder(target.parent)


@contextmanager
def all_or_none(*paths: Path) -> Iterator[None]:
    """Make the parents of files that the block writes; if it fails, remove the new files and folders.

    The same command can then be run again. A file that was there before stays.
    """
    with ExitStack() as stack:
        for path in paths:
            stack.callback(remove_empty, make_parents(path))
            if not os.path.lexists(path):
                stack.callback(path.unlink, missing_ok=True)
        yield
        stack.pop_all()


def fsync_folder(folder: str | Path) -> None:
    """Make the names in a folder durable, if the file system supports it."""
    try:
        _fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _fsync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_error(error: OSError, place: str | Path, named_by: str = "`out`") -> DatastoreError:
    """Return a failed write as one line for the user; `named_by` is the field or variable that named the place."""
    remedy = "free some space or choose" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose"
    return DatastoreError(f"cannot write {place}: {error.strerror or error}; {remedy} another {named_by}")


def path_tails(name: str) -> list[str]:
    """Return the suffixes of a path, longest first: `runs/a/final` -> `runs/a/final`, `a/final`, `final`."""
    parts = name.rstrip("/").split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def short_names(names: Sequence[str]) -> list[str]:
    """Return each name's shortest suffix that no other has: `a/x`, `b/x` and `b/y` -> `a/x`, `b/x`, `y`.

    A name that is a suffix of another stays whole.
    """
    owners = Counter(tail for name in dict.fromkeys(names) for tail in path_tails(name))
    return [next((tail for tail in reversed(path_tails(name)) if owners[tail] == 1), name) for name in names]


def make_parents(target: Path) -> list[Path]:
    """Make the missing parents and return them, deepest first."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target.parent)) from None
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove the empty ones among the folders, in this order."""
    for folder in folders:
        with suppress(OSError):  # not empty: it holds the output
            folder.rmdir()


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _fsync(Path(parent, name))
        fsync_folder(parent)


def strict_json(value: Any, lower: Callable[[Any], Any] = lambda value: value) -> Any:  # noqa: ANN401  (any JSON)
    """Return strict JSON values: NaN and infinity become null, NumPy numbers plain ones.

    :param lower: applied to every value first; replaces values of types that JSON lacks.
    """
    value = lower(value.item() if hasattr(value, "item") else value)  # a NumPy number, recognised without NumPy
    if isinstance(value, Mapping):
        return {str(key): strict_json(item, lower) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item, lower) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def disk_errors(place: str | Path, kind: type[OSError] | None = None, named_by: str = "`out`") -> Iterator[None]:
    """Turn errors of the disk into DatastoreError; with `kind` every OSError, for code that only handles files."""
    try:
        yield
    except OSError as error:
        if kind is None and error.errno not in DISK_ERRORS:
            raise
        told = disk_error(error, place, named_by)
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        raise told from error


# A folder that is being made


@contextmanager
def _claimed(target: Path, allowed: Allowed) -> Iterator[Path]:
    """The hidden folder in which the target is built, reserved for the duration of the block."""
    place = working_folder(target)
    sweep(target.parent, re.escape(f"{place.name}-") + "[0-9a-f]{16}")
    work = "" if allowed.overwrite else allowed.work
    handle = take_up(place, work)
    if handle is None:
        handle = _made(place, target)
        link_unfinished(target, place, work)
    try:
        yield place
    finally:
        # Not of another run, after ours was renamed.
        if is_locked_by(handle, place) and not (has_parts(place) and is_free(target)):
            shutil.rmtree(place, ignore_errors=True)
        os.close(handle)


def _made(place: Path, target: Path) -> int:
    """Make the hidden folder, and return its lock."""
    ready = _aside(place)
    ready.mkdir()
    try:
        handle = lock_folder(ready)
    except BaseException:
        shutil.rmtree(ready, ignore_errors=True)
        raise
    try:
        _clear(place, target)
        _take_name(ready, place, target)
    except BaseException:
        os.close(handle)
        raise
    finally:
        shutil.rmtree(ready, ignore_errors=True)
    return handle


def _take_name(ready: Path, place: Path, target: Path) -> None:
    """Rename to the hidden name, which the system gives to one run only."""
    try:
        ready.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise at_work(target) from None


def _clear(place: Path, target: Path) -> None:
    """Remove the leftovers of a dead run; a complete datastore among them moves to the target, if that is free."""
    if not os.path.lexists(place):
        return
    if not holds_lock(place):
        if place.is_symlink() or not place.is_dir() or any(place.iterdir()):
            raise DatastoreExists(f"{place} is in the way, and knnlm did not make it; move it, or choose another `out`")
        return
    handle = take_lock(place)
    if handle is None:
        raise at_work(target)
    try:
        if is_whole(place) and is_free(target):
            _publish(place, target)
        else:
            dead = place.rename(_aside(place))
            shutil.rmtree(dead, ignore_errors=True)
    finally:
        os.close(handle)


def _aside(place: Path) -> Path:
    return place.with_name(f"{place.name}-{secrets.token_hex(8)}")


def old_folder(target: Path) -> Path:
    """Return where the old folder is kept between two renames, on systems that cannot exchange two names."""
    return target.parent / f".{target.name}.old"


def _bring_back(target: Path, manifest: str) -> None:
    """Restore the old folder of a run that died between its two renames; delete it if the new one is in place."""
    old = old_folder(target)
    handle = take_lock(old)
    if handle is None:
        return
    try:
        if is_free(target):
            _publish(old, target)
        elif is_ours(target, manifest):  # not a user's folder that was made there meanwhile
            shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(handle)


def _publish(folder: Path, target: Path) -> None:
    folder.rename(target)
    (target / LOCK).unlink(missing_ok=True)
    fsync_folder(target.parent)


def _end_badly(error: BaseException, temporary: Path, target: Path, path: str | Path) -> None:
    """After an error, keep a complete datastore if the target is free, and say so in a note with the final path."""
    _rename_in(error, str(temporary), str(path))
    kept = target
    if isinstance(error, DatastoreExists) and not is_free(target):  # somebody took the place meanwhile
        kept = target.with_name(f"{target.name}-{secrets.token_hex(4)}")
    if is_whole(temporary) and is_free(kept):
        with suppress(OSError):  # a full disk may refuse to sync
            _sync_tree(temporary)
        with suppress(OSError):
            _publish(temporary, kept)
            error.add_note(
                f"{path if kept == target else kept} is a whole datastore, though without all that was to come (index, "
                "fitted settings, report): use it as it is, or give the same command again"
            )
    elif has_parts(temporary) and is_free(target):
        error.add_note("what is finished is kept: the same command goes on with it")
    elif not isinstance(error, Exception) and not is_free(target):
        error.add_note(f"{path} is as it was, and nothing half-written was left behind")


def _rename_in(error: BaseException, temporary: str, path: str) -> None:
    error.args = tuple(one.replace(temporary, path) if isinstance(one, str) else one for one in error.args)
    if isinstance(error, OSError) and isinstance(error.filename, str):
        error.filename = error.filename.replace(temporary, path)


def _swap(temporary: Path, target: Path, manifest: str) -> None:
    """Put the new folder in place; an old one is deleted only afterwards, and restored on failure."""
    if is_free(target):
        _publish(temporary, target)
        return
    handle = lock_folder(target)  # marks it as a leftover, whatever its name
    try:
        old = temporary if _exchange(temporary, target) else _two_renames(temporary, target)
        fsync_folder(target.parent)
        with suppress(OSError):  # the new folder is in place; the next run removes what is left of the old one
            remove_ours(old, manifest)
    finally:
        (target / LOCK).unlink(missing_ok=True)
        os.close(handle)


def _two_renames(temporary: Path, target: Path) -> Path:
    old = old_folder(target)
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException as error:
        try:
            old.rename(target)
        except OSError:
            error.add_note(f"what was there before is in {old}")
        raise
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; False if the system cannot."""
    system = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(one), os.fsencode(other)
    if hasattr(system, "renameat2"):  # Linux; -100: the paths are absolute
        return bool(system.renameat2(-100, first, -100, second, 2) == 0)
    if hasattr(system, "renamex_np"):  # macOS
        return bool(system.renamex_np(first, second, 2) == 0)
    return False

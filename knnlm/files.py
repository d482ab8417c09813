"""Files that are whole or absent: folders that appear at once, text and JSON that are renamed into place.

A folder is built under a hidden name beside its place (`.NAME.partial-PID`) and renamed when it is complete. The
builder holds a lock on it, which the system drops when the process dies: that, and not the PID, tells a dead run's
leftover from a run at work, in another container too.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from knnlm.errors import DatastoreError, DatastoreExists, InputError

# A folder with one of these, holding a JSON object whose "format" starts so, was made by this package.
OUR_MANIFESTS = ("datastore.json", "report.json", "train.json")
OUR_FORMAT = "knnlm-"
# Errors of the disk and not of the code or the input.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder that takes the place of `path` when the block ends well, and vanishes when it does not.

    What dead runs left behind is removed first. Missing parents are made. An empty folder at `path` is replaced; one
    with content only with `overwrite`, only if this package made it, and only after the new one is complete.
    :raises DatastoreExists: `path` holds something already (before the block runs), or another run is writing it.
    :raises DatastoreError: the disk is full, or the parent cannot be written.
    """
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    with ExitStack() as stack:
        with _disk_errors(path, OSError):
            _clear_leftovers(target)
            refuse_existing(path, overwrite=overwrite)
            stack.callback(remove_empty, make_parents(target))
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            temporary.mkdir()
            stack.callback(os.close, _lock(temporary))
        with _disk_errors(path):
            yield temporary
        with _disk_errors(path, OSError):
            _sync_tree(temporary)
            refuse_existing(path, overwrite=overwrite)
            _swap(temporary, target)


def refuse_existing(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a place for output that holds something; with `overwrite` only what this package did not make.

    :raises DatastoreExists: names the path and what to do.
    """
    target = Path(path).resolve()
    if not target.exists():
        return
    if not target.is_dir():
        raise DatastoreExists(f"{path} is a file; choose another `out`")
    if target.is_mount():
        raise DatastoreExists(f"{path} is a mount point, which cannot be replaced; choose a folder inside it as `out`")
    if any(target.iterdir()):
        if not overwrite:
            advice = ", or add `overwrite=True`" if is_ours(target) else ""  # which would be refused
            raise DatastoreExists(f"{path} exists and is not empty; choose another `out`{advice}")
        if not is_ours(target):
            raise DatastoreExists(
                f"{path} is not a knnlm folder and is kept despite `overwrite=True`; choose another `out`"
            )


def write_json(path: str | Path, document: Mapping[str, Any]) -> None:
    """Write strict JSON; NaN and infinity become null, numpy's numbers plain ones. Raises as `write_text`."""
    write_text(path, json.dumps(strict_json(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all.

    :raises OSError: the folder is missing or read-only, or the disk is full; `path` is as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(target.parent)


def fsync_folder(folder: str | Path) -> None:
    """Make the names in a folder durable, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def disk_error(error: OSError, place: str | Path, named_by: str = "`out`") -> DatastoreError:
    """The system's refusal to write as one line for the user; `named_by`, a field or a variable, named the place."""
    remedy = "free some space or choose" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose"
    return DatastoreError(f"cannot write {place}: {error.strerror or error}; {remedy} another {named_by}")


def is_ours(folder: Path) -> bool:
    """Was this folder made by this package? Only such a folder may be overwritten."""
    for name in OUR_MANIFESTS:
        with suppress(OSError, ValueError):
            document = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(document, dict) and str(document.get("format", "")).startswith(OUR_FORMAT):
                return True
    return False


def strict_json(value: Any, lower: Callable[[Any], Any] = lambda value: value) -> Any:  # noqa: ANN401  (any JSON)
    """Values of strict JSON: NaN and infinity become null, numpy's numbers plain ones.

    :param lower: is shown every value first, and gives what stands for one that JSON has no kind for.
    """
    value = lower(value.item() if hasattr(value, "item") else value)  # a NumPy number, told without NumPy
    if isinstance(value, Mapping):
        return {str(key): strict_json(item, lower) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item, lower) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _disk_errors(place: str | Path, kind: type[OSError] | None = None) -> Iterator[None]:
    """Turn errors of the disk into a line for the user; with `kind`, every OSError, for code that does files only."""
    try:
        yield
    except OSError as error:
        if kind is None and error.errno not in DISK_ERRORS:
            raise
        raise disk_error(error, place) from error


def _clear_leftovers(target: Path) -> None:
    """Remove what dead runs left; bring back the old folder if a run died between its two renames."""
    for partial in _siblings(target, "partial"):
        if _is_locked(partial):
            raise DatastoreExists(
                f"another run is writing {target} (in {partial}); wait for it, or choose another `out`"
            )
        shutil.rmtree(partial, ignore_errors=True)
    for old in _siblings(target, "old"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def _siblings(target: Path, kind: str) -> list[Path]:
    prefix = f".{target.name}.{kind}-"
    if not target.parent.exists():
        return []
    return [
        path for path in target.parent.iterdir() if path.name.startswith(prefix) and path.name[len(prefix) :].isdigit()
    ]


def _lock(folder: Path) -> int:
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks: the folder then counts as in use, which deletes nothing
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _is_locked(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def make_parents(target: Path) -> list[Path]:
    """Make the missing parents; gives those made, deepest first."""
    missing = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders that hold nothing, in this order."""
    for folder in folders:
        with suppress(OSError):  # not empty: it holds what was made
            folder.rmdir()


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        fsync_folder(parent)


def _swap(temporary: Path, target: Path) -> None:
    """Put the new folder in place; an old one is deleted only after that, and comes back if it fails."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        if target.exists() and any(target.iterdir()):
            target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    fsync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def path_tails(name: str) -> list[str]:
    """The ends of a path at its slashes, the whole first: `runs/a/final` -> `runs/a/final`, `a/final`, `final`."""
    parts = name.rstrip("/").split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def short_names(names: Sequence[str]) -> list[str]:
    """Of each name the shortest end that no other has: `a/x`, `b/x` and `b/y` -> `a/x`, `b/x`, `y`.

    A name that is the end of another stays whole.
    """
    owners = Counter(tail for name in dict.fromkeys(names) for tail in path_tails(name))
    return [next((tail for tail in reversed(path_tails(name)) if owners[tail] == 1), name) for name in names]


def check_new_folder(path: str | Path, *, overwrite: bool = False) -> None:
    """Find out before any work whether a datastore can be made here.

    :raises DatastoreExists: the folder holds something.
    :raises InputError: it lies where nothing can be written.
    """
    refuse_existing(path, overwrite=overwrite)
    _check_writable(Path(path), "out")


def check_new_file(path: str | Path, *, field: str = "out", overwrite: bool = False) -> None:
    """:raises InputError: before any work, that the file is there already or cannot be written; names the field."""
    file = Path(path)
    if file.is_dir():
        raise InputError(f"`{field}` {file} is a folder; name a file in it")
    if file.exists() and not file.is_file():
        raise InputError(f"`{field}` {file} is no regular file, and would be replaced by one; choose another `{field}`")
    if file.exists() and not overwrite:
        raise InputError(f"`{field}` {file} exists; choose another `{field}`, or add `overwrite=True`")
    _check_writable(file, field)


def check_report_folder(path: str | Path) -> None:
    """:raises InputError: before any work, that the folder holds something already or cannot be written."""
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"`report` {folder} exists and is not an empty folder; choose another `report`")
    _check_writable(folder, "report")


def _check_writable(path: Path, field: str) -> None:
    there = next(parent for parent in path.resolve().parents if parent.exists())
    if not there.is_dir():
        raise InputError(f"`{field}` {path} cannot be made: {there} is a file; choose another `{field}`")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"`{field}` {path} cannot be made: {there} cannot be written; choose another `{field}`")

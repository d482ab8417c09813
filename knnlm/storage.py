"""Files that are whole or absent: folders that appear at once, JSON that is renamed into place, .npy files that count.

A folder is built under a hidden name beside its place (`.NAME.partial-PID`) and renamed when it is complete. The
builder holds a lock on it, which the system drops when the process dies: that, and not the PID, tells a dead run's
leftover from a run at work, in another container too.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from knnlm.errors import DatastoreCorrupt, DatastoreError, DatastoreExists

# A folder with one of these, holding a JSON object whose "format" starts so, was made by this package.
OUR_MANIFESTS = ("datastore.json", "report.json")
OUR_FORMAT = "knnlm-"
# Errors of the disk and not of the code or the input.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


@contextmanager
def new_folder(
    path: str | Path, *, overwrite: bool = False, exists_error: type[DatastoreError] = DatastoreExists
) -> Iterator[Path]:
    """Give a temporary folder that takes the place of `path` when the block ends well, and vanishes when it does not.

    What dead runs left behind is removed first. Missing parents are made. An empty folder at `path` is replaced; one
    with content only with `overwrite`, only if this package made it, and only after the new one is complete.
    :raises exists_error: `path` holds something already (before the block runs), or another run is writing it.
    :raises DatastoreError: the disk is full, or the parent cannot be written.
    """
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    with ExitStack() as stack:
        with _disk_errors(path, OSError):
            _clear_leftovers(target, exists_error)
            refuse_existing(path, overwrite=overwrite, exists_error=exists_error)
            stack.callback(_remove_empty, _make_parents(target))
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            temporary.mkdir()
            stack.callback(os.close, _lock(temporary))
        with _disk_errors(path):
            yield temporary
        with _disk_errors(path, OSError):
            _sync_tree(temporary)
            refuse_existing(path, overwrite=overwrite, exists_error=exists_error)
            _swap(temporary, target)


def refuse_existing(
    path: str | Path, *, overwrite: bool = False, exists_error: type[DatastoreError] = DatastoreExists
) -> None:
    """Refuse a place for output that holds something; with `overwrite` only what this package did not make.

    :raises exists_error: names the path and what to do.
    """
    target = Path(path).resolve()
    if not target.exists():
        return
    if not target.is_dir():
        raise exists_error(f"{path} is a file; choose another --out")
    if target.is_mount():
        raise exists_error(f"{path} is a mount point, which cannot be replaced; choose a folder inside it as --out")
    if any(target.iterdir()):
        if not overwrite:
            raise exists_error(f"{path} exists and is not empty; choose another --out, or add --overwrite")
        if not is_ours(target):
            raise exists_error(f"{path} is not a knnlm folder and is kept despite --overwrite; choose another --out")


def write_json(path: str | Path, document: Mapping[str, Any]) -> None:
    """Write strict JSON whole or not at all; NaN and infinity become null, numpy's numbers plain ones.

    :raises OSError: the folder is missing or read-only, or the disk is full; `path` is as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    text = json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
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


def disk_error(error: OSError, place: str | Path) -> DatastoreError:
    """The system's refusal to write as one line for the user."""
    remedy = "free some space or choose" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose"
    return DatastoreError(f"cannot write {place}: {error.strerror or error}; {remedy} another --out")


class NpyWriter:
    """Appends rows to a .npy file whose number of rows is not known beforehand.

    The header stands for no rows until `close`, then for the rows that came: a file's size is counted, never typed.
    `sha256` is of the data, without the header.
    """

    def __init__(self, path: str | Path, dtype: DTypeLike, columns: int | None = None) -> None:
        self.path = Path(path)
        self.rows = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._row_shape = () if columns is None else (columns,)
        self._digest = hashlib.sha256()
        # Unbuffered: after a full disk, closing must not try to write the rest once more.
        self._file = self.path.open("xb", buffering=0)
        try:
            self._header_bytes = self._write_header()
        except BaseException:
            self.abort()
            raise

    @property
    def sha256(self) -> str:
        """Of the data so far."""
        return self._digest.hexdigest()

    def append(self, rows: NDArray[Any]) -> None:
        """Add rows, [n] or [n, columns], of exactly the file's type: nothing is cast here.

        :raises ValueError: another shape or type.
        """
        if rows.dtype != self._dtype or rows.shape[1:] != self._row_shape or not rows.ndim:
            raise ValueError(
                f"{self.path.name} takes rows {self._row_shape} of {self._dtype}, got {rows.shape} of {rows.dtype}"
            )
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        self._write(data.data)
        self._digest.update(data.data)
        self.rows += len(rows)

    def close(self) -> None:
        """Write the true header and make the file durable. Closing twice does nothing."""
        if self._file.closed:
            return
        with self._file:
            self._file.seek(0)
            if self._write_header() != self._header_bytes:
                raise ValueError(f"the header of {self.path} grew")
            os.fsync(self._file.fileno())

    def abort(self) -> None:
        """Close the file as it is; it stands for no rows."""
        self._file.close()

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def _write_header(self) -> int:
        # numpy pads the first axis to 21 digits, so that the header keeps its length however many rows come.
        header = {
            "descr": npy.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.rows, *self._row_shape),
        }
        npy.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def _write(self, data: memoryview) -> None:
        while data:  # one unbuffered write may take a part only, on Linux at most 2 GiB
            data = data[self._file.write(data) :]


def npy_offset(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> int:
    """Where the data of a .npy file begin, after its header and its size have been checked.

    :raises DatastoreCorrupt: the file is missing, no .npy file, of another shape or type, short or long.
    """
    expected = (tuple(shape), False, np.dtype(dtype).newbyteorder("<"))
    try:
        with path.open("rb") as file:
            npy.read_magic(file)
            found = npy.read_array_header_1_0(file)
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise DatastoreCorrupt(f"{path} is missing; build the datastore again") from None
    except (OSError, ValueError, SyntaxError, TypeError, EOFError) as error:
        raise DatastoreCorrupt(f"{path} cannot be read as a .npy file ({_first_line(error)}); build it again") from None
    if found != expected:
        raise DatastoreCorrupt(
            f"{path} holds {found[2]} {found[0]}, but the manifest says {expected[2]} {expected[0]}; build it again"
        )
    needed = offset + math.prod(shape) * expected[2].itemsize
    if size != needed:
        raise DatastoreCorrupt(f"{path} has {size} bytes, but its rows need {needed}; build it again")
    return offset


def open_npy(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array in a .npy file, read-only, mapped and not loaded. Raises as `npy_offset`."""
    offset = npy_offset(path, dtype, shape)
    kind = np.dtype(dtype).newbyteorder("<")
    if not math.prod(shape):
        return np.empty(shape, kind)
    return np.asarray(np.memmap(path, kind, "r", offset, shape))


def is_ours(folder: Path) -> bool:
    """Was this folder made by this package? Only such a folder may be overwritten."""
    for name in OUR_MANIFESTS:
        with suppress(OSError, ValueError):
            document = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(document, dict) and str(document.get("format", "")).startswith(OUR_FORMAT):
                return True
    return False


def _plain(value: Any) -> Any:  # noqa: ANN401  (any JSON)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _disk_errors(place: str | Path, kind: type[OSError] | None = None) -> Iterator[None]:
    """Turn errors of the disk into a line for the user; with `kind`, every OSError, for code that does files only."""
    try:
        yield
    except OSError as error:
        if kind is None and error.errno not in DISK_ERRORS:
            raise
        raise disk_error(error, place) from error


def _clear_leftovers(target: Path, exists_error: type[DatastoreError]) -> None:
    """Remove what dead runs left; bring back the old folder if a run died between its two renames."""
    for partial in _siblings(target, "partial"):
        if _is_locked(partial):
            raise exists_error(f"another run is writing {target} (in {partial}); wait for it, or choose another --out")
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


def _make_parents(target: Path) -> list[Path]:
    """Make the missing parents; gives those made, deepest first."""
    missing = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
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

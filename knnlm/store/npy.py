"""Files of arrays: .npy, written before it is known how many rows come, and opened after a look at header and size."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from knnlm.errors import DatastoreCorrupt


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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

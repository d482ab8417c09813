"""Arrays in .npy files: written without knowing the number of rows, and opened after checks of header and size."""

from __future__ import annotations

import hashlib
import math
import os
import re
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from index.mapped import Bytes, OpenFolder, Stamp
from knnlm.errors import DatastoreCorrupt

# Magic string of version 1.0.
MAGIC = b"\x93NUMPY\x01\x00"
# Bytes that are read and checked at a time.
VERIFY_BYTES = 1 << 24
# A whole header, for messages only.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<descr>[<>|=][biufcO]\d{0,2})' *, "
    rb"'fortran_order': (?:False|True), 'shape': \((?P<shape>[\d, ]*)\), \}",
    re.DOTALL,
)


class NpyWriter:
    """Appends rows to a .npy file whose number of rows is not known beforehand.

    The header says 0 rows until `close`, then the number of rows appended. `sha256` is of the data, without the header.
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
        """SHA-256 of the data so far."""
        return self._digest.hexdigest()

    def append(self, rows: NDArray[Any]) -> None:
        """Append rows, [n] or [n, columns], of exactly the file's type: nothing is cast.

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
        """Write the final header and make the file durable. Closing again does nothing."""
        if self._file.closed:
            return
        with self._file:
            self._file.seek(0)
            if self._write_header() != self._header_bytes:
                raise ValueError(f"the header of {self.path} grew")
            os.fsync(self._file.fileno())

    def abort(self) -> None:
        """Close the file as it is; its header says 0 rows."""
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
        self._write(memoryview(npy_header(self._dtype, (self.rows, *self._row_shape))))
        return self._file.tell()

    def _write(self, data: memoryview) -> None:
        while data:  # an unbuffered write may be partial, on Linux at most 2 GiB
            data = data[self._file.write(data) :]


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the header, byte for byte as NumPy writes it: version 1.0, little-endian, C order.

    The first axis has room for 21 digits, so that the header's length does not depend on the number of rows.
    """
    text = f"{{'descr': {npy.dtype_to_descr(dtype)!r}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (21 - len(str(shape[0])))
    length = len(MAGIC) + 2 + len(text) + 1
    text += " " * (-length % 64) + "\n"
    return MAGIC + len(text).to_bytes(2, "little") + text.encode("ascii")


def array_in(data: Bytes, path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the array in the bytes of a .npy file, as a view. The header is compared, not parsed.

    :param path: the file's path, for errors.
    :raises DatastoreCorrupt: no .npy file, another shape or type, or too short or long.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    header = npy_header(kind, shape)
    if data[: len(header)].tobytes() != header:
        raise DatastoreCorrupt(_difference(data[: 2 * len(header)].tobytes(), path, kind, shape))
    needed = len(header) + math.prod(shape) * kind.itemsize
    if len(data) != needed:
        raise DatastoreCorrupt(f"{path} has {len(data)} bytes, but its rows need {needed}; build it again")
    return data[len(header) :].view(kind).reshape(shape)


def map_npy(folder: OpenFolder, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> tuple[NDArray[Any], Stamp]:
    """Return the array in a .npy file of a folder, read-only and memory-mapped, and the file's stamp.

    :raises DatastoreCorrupt: the file is missing, or as `array_in`.
    """
    path = folder.path / name
    try:
        found = folder.map(name)
    except FileNotFoundError:
        raise DatastoreCorrupt(f"{path} is missing; build the datastore again") from None
    except OSError as error:
        raise DatastoreCorrupt(f"{path} cannot be read ({error.strerror}); build the datastore again") from None
    return array_in(found.data, path, dtype, shape), found.stamp


def open_npy(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the array in a .npy file, read-only and memory-mapped. Raises as `map_npy`."""
    with OpenFolder(path.parent) as folder:
        return map_npy(folder, path.name, dtype, shape)[0]


def digest_of(data_N: NDArray[Any]) -> tuple[str, bool]:
    """Return the SHA-256 of an array of one axis, and whether it has neither NaN nor infinity."""
    digest, finite = hashlib.sha256(), True
    step = VERIFY_BYTES // data_N.itemsize
    for start in range(0, len(data_N), step):
        part = data_N[start : start + step]
        digest.update(part.data)
        finite &= part.dtype.kind != "f" or bool(np.isfinite(part).all())
    return digest.hexdigest(), finite


def _difference(begin: bytes, path: Path, kind: np.dtype[Any], shape: tuple[int, ...]) -> str:
    """The error for a header other than the manifest implies."""
    found = _HEADER.match(begin)
    if found is None:
        return f"{path} cannot be read as a .npy file; build it again"
    described, found_shape = found["descr"].decode(), f"({found['shape'].decode()})"
    with suppress(TypeError, ValueError):
        described = str(np.dtype(described))
    if (described, found_shape) == (str(kind), str(shape)):
        return f"{path} has a header that was changed after it was written; build it again"
    return f"{path} holds {described} {found_shape}, but the manifest says {kind} {shape}; build it again"

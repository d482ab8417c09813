"""Writing one part of a datastore: the files of its folder, and how its keys become what is stored.

Legend: N keys, D dimension.
"""

from __future__ import annotations

import errno
import hashlib
import math
import secrets
import shutil
from array import array
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.mapped import OpenFolder
from index.typed import CHECKSUM
from knnlm.errors import DatastoreCorrupt, DatastoreError, ModelError
from knnlm.files import fsync_folder, write_json
from knnlm.places import PART, PARTS
from knnlm.store.half import FLOAT16_MAX, all_finite, to_float16
from knnlm.store.manifest import LayerKeys, PartEntry, centre_file
from knnlm.store.npy import NpyWriter, map_npy
from knnlm.store.part import COLUMNS, DOCUMENTS, VALUES, Part, Shard, keys_file, part_files, part_name, read_part

# Files synced to disk at once.
CLOSING_THREADS = 8
# Numbers converted, checksummed and written at a time: they stay in cache, and up to this many torch converts in the
# calling thread; for more it waits for threads on the cores that the model computes on.
BLOCK = 1 << 15
# A layer is scaled so that its first keys stay below the largest float16 by this factor.
HEADROOM = 64
# If all components are smaller, float16 loses bits of the small ones (subnormals begin at 6e-5): scaled up to about 1.
FLOAT16_SMALL = 2.0**-4
INT32 = np.dtype(np.int32)


class TextHasChanged(DatastoreError):
    """A part that is there already was made from another text, or with another frame."""


class BadKey(Exception):
    """A key that cannot be stored, identified by its row in the part; the writer adds the document."""

    def __init__(self, row: int, kind: type[DatastoreError] | type[ModelError], message: str) -> None:
        super().__init__(message)
        self.row, self._kind, self._message = row, kind, message

    def located(self, where: str) -> DatastoreError | ModelError:
        """Return the error for the user."""
        return self._kind(self._message.format(where=where))


class LayerFrame:
    """Centre and scale of a layer: from its first keys, or as they were fixed before."""

    def __init__(self, name: str, dim: int, dtype: np.dtype[Any]) -> None:
        self.name, self.dim, self.dtype = name, dim, dtype
        self.centre: NDArray[np.float32] | None = None
        self.scale = 1.0

    def fix(self, vectors_ND: NDArray[np.float32]) -> None:
        """Fix both from the first keys, unless they are fixed."""
        if self.centre is not None:
            return
        self.check(vectors_ND, math.inf, 0)
        centre = vectors_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
        if self.dtype != np.float32:
            self.scale = _scale(_peak(vectors_ND), _peak(vectors_ND - centre))
        self.centre = centre

    def stored(self, vectors_ND: NDArray[np.float32], row: int) -> NDArray[Any]:
        """Return raw vectors as they are stored.

        :param row: the first one's row in the part, for errors.
        :raises BadKey: one overflows, or is not finite.
        """
        assert self.centre is not None
        stored_ND = vectors_ND - self.centre
        if self.dtype == np.float32:
            self.check(stored_ND, math.inf, row)
            return stored_ND
        if self.scale != 1:
            stored_ND *= np.float32(1 / self.scale)  # exact: a power of two
        halves_ND = to_float16(stored_ND)
        if not all_finite(halves_ND):
            self.check(stored_ND, FLOAT16_MAX, row)
        return halves_ND

    def check(self, rows_ND: NDArray[np.float32], limit: float, row: int) -> None:
        """Raise BadKey for the first row that is not finite, or has a component over the limit."""
        peak = _peak(rows_ND)
        if math.isfinite(peak) and peak <= limit:
            return
        sizes_N = np.abs(rows_ND).max(axis=1)
        bad = int(np.flatnonzero(~(np.isfinite(sizes_N) & (sizes_N <= limit)))[0])
        if math.isfinite(sizes_N[bad]):
            message = f"layer {self.name} overflows float16 at {{where}}; take `key_dtype='float32'`"
            raise BadKey(row + bad, DatastoreError, message)
        message = f"layer {self.name} gives NaN or infinite values at {{where}}; leave the layer out with `layers`"
        raise BadKey(row + bad, ModelError, message)

    def write_centre(self, folder: Path) -> LayerKeys:
        """Write the centre into a datastore's folder, unless it is there, and return the manifest's entry."""
        assert self.centre is not None
        path = folder / centre_file(self.name)
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        with NpyWriter(path, np.float32) as file:
            file.append(self.centre)
        return LayerKeys(self.dim, self.dtype.name, self.scale, Shard(file.rows, file.sha256))


class Documents:
    """Documents of a part as they come: the rows of documents.npy, and the names of their sources."""

    def __init__(self) -> None:
        self._numbers = array("q")
        self._sources: dict[str, int] = {}

    def add(self, row: int, first_token: int, source: str, number: int, start: int) -> None:
        """Begin a document at a row."""
        source_number = self._sources.setdefault(source, len(self._sources))
        self._numbers.extend((row, int(first_token), source_number, int(number), int(start)))

    def add_or_continue(self, row: int, first_token: int, source: str, number: int, start: int) -> None:
        """Begin a document at a row, unless it is the rest of the one before, which was cut there."""
        if not (start and len(self) and self.position(row) == (source, number, start)):
            self.add(row, first_token, source, number, start)

    def __len__(self) -> int:
        return len(self._numbers) // COLUMNS

    @property
    def rows(self) -> NDArray[np.int64]:
        """int64 [documents, 5]."""
        return np.array(self._numbers, np.int64).reshape(-1, COLUMNS)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources."""
        return tuple(self._sources)

    def position(self, row: int) -> tuple[str, int, int]:
        """Return a row's document, by source and number, and its position in it.

        :raises IndexError: no document was begun.
        """
        at = int(np.searchsorted(self.rows[:, 0], row, side="right")) - 1
        if at < 0:
            raise IndexError(f"row {row} comes before the first document")
        first, _, source, number, start = self.rows[at].tolist()
        return self.sources[source], number, start + row - first

    def place(self, row: int) -> str:
        """Name the document of a row, or only the row if no document was begun."""
        if not len(self):
            return f"key {row}"
        source, number, position = self.position(row)
        return f"token {position} of {source}, document {number}"


class PartWriter:
    """The files of one part, under a temporary name until `finish`."""

    def __init__(self, folder: Path, number: int, frames: Mapping[str, LayerFrame]) -> None:
        self._parts, self._number, self._frames = folder / PARTS, number, frames
        self._folder = self._parts / f".{number:05d}-{0:08x}.partial-{secrets.token_hex(4)}"
        (self._folder / "keys").mkdir(parents=True)
        self.documents = Documents()
        with ExitStack() as opened:
            self._values = opened.enter_context(NpyWriter(self._folder / VALUES, INT32))
            self._keys = {
                name: opened.enter_context(NpyWriter(self._folder / keys_file(name), one.dtype, one.dim))
                for name, one in frames.items()
            }
            opened.pop_all()

    @property
    def rows(self) -> int:
        """Values so far."""
        return self._values.rows

    def append_values(self, tokens_N: NDArray[np.int32]) -> None:
        """Append values."""
        self._values.append(tokens_N)

    def append_keys(self, layer: str, vectors_ND: NDArray[np.floating[Any]]) -> None:
        """Append raw vectors; called in the writing thread. Raises BadKey."""
        if not len(vectors_ND):
            return
        frame, file = self._frames[layer], self._keys[layer]
        vectors_ND = vectors_ND.astype(np.float32, copy=False)
        frame.fix(vectors_ND)
        rows = max(1, BLOCK // frame.dim)
        for start in range(0, len(vectors_ND), rows):
            file.append(frame.stored(vectors_ND[start : start + rows], file.rows))

    def append_stored(self, layer: str, rows_ND: NDArray[Any]) -> None:
        """Append keys as another part stores them."""
        self._keys[layer].append(rows_ND)

    def finish(self, frame: str) -> PartEntry:
        """Close and sync all files, write part.json, and give the folder its name.

        :param frame: checksum of the frame.
        """
        # Concurrently: syncing forty files at once takes half the time of one after another.
        with ThreadPoolExecutor(CLOSING_THREADS, thread_name_prefix="knnlm-close") as threads:
            list(threads.map(NpyWriter.close, (self._values, *self._keys.values())))
        with NpyWriter(self._folder / DOCUMENTS, np.int64, COLUMNS) as file:
            file.append(self.documents.rows)
        keys = {name: _shard(one) for name, one in self._keys.items()}
        document = Part(frame, _shard(self._values), _shard(file), keys, self.documents.sources).to_json()
        write_json(self._folder / PART, document)
        fsync_folder(self._folder / "keys")
        name = part_name(self._number, document)
        entry = PartEntry(name, document[CHECKSUM], self.rows, self.rows)
        self._take_name(entry)
        fsync_folder(self._parts)
        return entry

    def _take_name(self, entry: PartEntry) -> None:
        """Rename the folder, unless the same part is there, of a process that died or that makes it too."""
        place = self._parts / entry.name
        try:
            self._folder.rename(place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            layers = {name: (one.dim, one.dtype.name) for name, one in self._frames.items()}
            if is_whole(self._parts.parent, entry, layers):
                shutil.rmtree(self._folder, ignore_errors=True)
            else:
                shutil.rmtree(place, ignore_errors=True)
                self._folder.rename(place)

    def abort(self) -> None:
        """Close the files as they are."""
        for file in (self._values, *self._keys.values()):
            file.abort()


class StoredPart:
    """A part that is there already, in the place of its writer: what would be written is compared with it."""

    def __init__(self, entry: PartEntry, part: Part, documents: NDArray[np.int64]) -> None:
        self._entry, self._part, self._stored = entry, part, documents
        self._digest = hashlib.sha256()
        self.documents = Documents()
        self.rows = 0

    def append_values(self, tokens_N: NDArray[np.int32]) -> None:
        """Add values to those that are compared."""
        self._digest.update(np.ascontiguousarray(tokens_N, INT32).data)
        self.rows += len(tokens_N)

    def finish(self, frame: str) -> PartEntry:
        """Return the entry of the part.

        :raises TextHasChanged: it was made from another text, or with another frame.
        """
        same = (self._digest.hexdigest(), self.documents.sources, frame) == (
            self._part.values.sha256,
            self._part.sources,
            self._part.frame,
        )
        if not (same and np.array_equal(self.documents.rows, self._stored)):
            raise TextHasChanged(
                f"the text or the model has changed since part {self._entry.name} was made, so this work cannot go on; "
                "begin anew with `overwrite=True`"
            )
        return self._entry

    def abort(self) -> None:
        """Nothing is open."""


def stored_part(opened: OpenFolder, entry: PartEntry, layers: Mapping[str, LayerKeys]) -> StoredPart:
    """Return a finished part, whose files have the right sizes; raises DatastoreCorrupt."""
    part = read_part(opened, entry.name, entry.checksum)
    files = part_files(entry.name, part, {name: (one.dim, one.dtype) for name, one in layers.items()})
    documents, *_ = [map_npy(opened, one.file, one.dtype, one.shape)[0] for one in files]
    return StoredPart(entry, part, documents)


def is_whole(folder: Path, entry: PartEntry, layers: Mapping[str, tuple[int, str]]) -> bool:
    """Return whether all files of a part are there, with the right sizes; dim and dtype of each layer are given."""
    try:
        with OpenFolder(folder) as opened:
            for one in part_files(entry.name, read_part(opened, entry.name, entry.checksum), layers):
                map_npy(opened, one.file, one.dtype, one.shape)
    except DatastoreCorrupt:
        return False
    return True


def _shard(file: NpyWriter) -> Shard:
    return Shard(file.rows, file.sha256)


def _peak(rows_ND: NDArray[np.float32]) -> float:
    """The largest absolute component; NaN if there is one."""
    return float(np.maximum(rows_ND.max(), -rows_ND.min()))


def _scale(raw_peak: float, centred_peak: float) -> float:
    """1 if float16 represents keys well, else a power of two; from the largest components of the first vectors."""
    if 0 < raw_peak < FLOAT16_SMALL:
        return _power_of_two(raw_peak)
    # The raw peak counts too: if the first append is a single vector, the centred peak is zero.
    needed = max(centred_peak, raw_peak / HEADROOM) * HEADROOM / FLOAT16_MAX
    return _power_of_two(needed) if needed > 1 else 1.0


def _power_of_two(number: float) -> float:
    """The smallest one at or above a number, clipped so that its inverse is exact in float32 too."""
    return 2.0 ** min(max(math.ceil(math.log2(number)), -100), 100)

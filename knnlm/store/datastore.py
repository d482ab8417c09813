"""A datastore on disk: the keys of one or more layers of a model over a text, and the token that followed each.

    nursing.knn/
      datastore.json                 the manifest, written last: counts, checksums, the model's fingerprint, scores
      values-00000.npy ...           int32 next tokens in the text's order, shared by all layers
      documents.npy                  int64 [documents, 4]: first row among the values, first token (no value, as it
                                     has no predecessor), number of its source, number inside the source
      keys/11.ffn_input/00000.npy    float16 or float32 [n, D]: (vector - centre) / scale
      keys/11.ffn_input/centre.npy   float32 [D]
      index/11.ffn_input/...         written by the index package

Subtracting a constant from all vectors does not change squared L2, but reduces rounding in float16: the constant is the
centre, the mean of the layer's first few thousand vectors. File headers are checked against the manifest when a
datastore is opened, the data by `verify`, and those of small files also when they are used.

Legend: N keys, D dimension.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.errors import CorruptIndex
from index.mapped import OpenFolder, Stamp, stamp_of
from index.saved import SavedIndex
from knnlm.errors import DatastoreCorrupt, DatastoreError, DatastoreMismatch
from knnlm.files import disk_error, write_json
from knnlm.locks import locked
from knnlm.progress import Advance
from knnlm.shown import brief
from knnlm.store.hub import on_disk, refuse_cached
from knnlm.store.keys import Keys
from knnlm.store.manifest import NAME, LayerKeys, Manifest, Shard, open_folder, read_manifest
from knnlm.store.npy import map_npy

# Two models with these hashes in common give the same vectors. The name may differ: folders move.
MODEL_PARTS = ("config", "weights", "tokenizer")
VERIFY_BYTES = 1 << 24
# The end of the name of a file or an index that is being written.
PARTIAL = "partial-" + 8 * "[0-9a-f]"
# Attempts to open a datastore that is replaced meanwhile.
OPENINGS = 5


def open_datastore(folder: str | Path) -> Datastore:
    """Open a datastore, as `Datastore.open`."""
    return Datastore.open(folder)


def as_datastore(store: str | Path | Datastore) -> Datastore:
    """Return an opened datastore as it is, or open the one in a folder. Raises as `Datastore.open`."""
    return store if isinstance(store, Datastore) else Datastore.open(store)


class Datastore:
    """A finished datastore, opened for reading; arrays are memory-mapped."""

    def __init__(self, folder: Path, manifest: Manifest, opened: OpenFolder) -> None:
        self.folder = folder
        self._manifest = manifest
        self._keys: dict[str, Keys] = {}
        self._changing = False
        # Opens every file now: later its name may refer to another file.
        self._files = {one.shard.file: _map_file(opened, one) for one in _described(manifest)}
        self._indexes = {layer: _open_index(self.index_folder(layer)) for layer in manifest.indexes}

    @classmethod
    def open(cls, folder: str | Path) -> Datastore:
        """Read the manifest, map every file, and check its size, shape and type; the data are not read.

        The files stay mapped, so that the datastore stays the same even if the folder is replaced. No file descriptors
        are held. `hf:USER/NAME[@REVISION]` names a datastore on the Hugging Face hub (`knnlm.store.hub`).
        :raises DatastoreError: the folder is no datastore, or made by a newer knnlm.
        :raises DatastoreCorrupt: a file is missing, short or does not fit the manifest; names the file.
        """
        store = cls.look(folder)
        for found in store._files.values():
            if isinstance(found, DatastoreCorrupt):
                raise found
        return store

    @classmethod
    def look(cls, folder: str | Path) -> Datastore:
        """As `open`, but errors of single files are left to `verify`."""
        folder = on_disk(folder, cls.look)
        for _ in range(OPENINGS):
            with open_folder(Path(folder)) as opened:
                try:
                    store = cls(Path(folder), read_manifest(opened), opened)
                except DatastoreError:
                    if not opened.is_replaced:
                        raise
                    continue
                broken = any(isinstance(found, DatastoreCorrupt) for found in store._files.values())
                if not (broken and opened.is_replaced):
                    return store
        raise DatastoreError(f"{folder} is replaced again and again while it is opened; try again when that is over")

    def __repr__(self) -> str:
        about = f"{self.count:,} keys, {len(self.layers)} layers of {self._manifest.model}: {brief(self.layers)}"
        return f"<Datastore {self.folder}: {about}>"

    @property
    def manifest(self) -> Manifest:
        """The content of datastore.json."""
        return self._manifest

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers whose keys are stored."""
        return tuple(self._manifest.layers)

    @property
    def count(self) -> int:
        """N, the number of keys of each layer and of values."""
        return self._manifest.count

    def __len__(self) -> int:
        return self.count

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files, with indexes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @cached_property
    def values(self) -> NDArray[np.int32]:
        """The next token of each key, int32 [N], read-only.

        Memory-mapped if it is one shard (up to 536 million tokens), else loaded (4 x N bytes). The checksum is checked,
        which is quick compared with reading keys: a token outside the vocabulary could crash the process anywhere.
        :raises DatastoreCorrupt: the values have changed since they were written.
        """
        shards = [self._checked_array(shard) for shard in self._manifest.values]
        values: NDArray[np.int32] = shards[0] if len(shards) == 1 else np.concatenate(shards)
        values.flags.writeable = False
        return values

    @cached_property
    def documents(self) -> NDArray[np.int64]:
        """int64 [documents, 4]: first row, first token, place in `manifest.sources`, number in the source.

        :raises DatastoreCorrupt: the file has changed since it was written.
        """
        return self._checked_array(self._manifest.documents)

    def keys(self, layer: str) -> Keys:
        """Return the layer's keys: vector - centre, in float32.

        :raises DatastoreMismatch: the layer is not stored; lists the stored ones.
        :raises DatastoreCorrupt: the centre has changed since it was written.
        """
        if layer not in self._keys:
            entry = self._layer(layer)
            centre = np.array(self._checked_array(entry.centre))
            self._keys[layer] = Keys([self._array(one) for one in entry.shards], centre, entry.scale)
        return self._keys[layer]

    def saved_index(self, layer: str) -> SavedIndex:
        """Return the layer's index as it was when the datastore was opened, or saved since; not yet loaded.

        :raises index.errors.CorruptIndex: there is no index, or one of its files is missing or short.
        """
        if layer not in self._indexes:
            self._indexes[layer] = _open_index(self.index_folder(layer))
        found = self._indexes[layer]
        if isinstance(found, CorruptIndex):
            raise found
        return found

    def index_folder(self, layer: str) -> Path:
        """Return the path of the layer's index, which need not exist. Raises as `keys`."""
        self._layer(layer)
        return self.folder / "index" / layer

    def document_of(self, row: int) -> tuple[str, int]:
        """Return the name of the source of a row's document, and the document's number in it."""
        _, _, source, number = self.documents[self._document(row)].tolist()
        return self._manifest.sources[source], number

    def context(self, row: int, width: int) -> NDArray[np.int32]:
        """Return the `width` tokens before the value of a row, or all that its document has."""
        first, first_token = self.documents[self._document(row), :2].tolist()
        start = max(first, row - width)
        tokens = self.values[start:row]
        if row - start < width:
            return np.concatenate([np.array([first_token], np.int32), tokens])
        return tokens

    def continuation(self, row: int, width: int) -> NDArray[np.int32]:
        """Return the `width` tokens after the value of a row, or all that its document has."""
        next_document = self._document(row) + 1
        ends = self.documents[next_document : next_document + 1, 0].tolist() or [self.count]
        return self.values[row + 1 : min(row + 1 + width, ends[0])]

    def check_model(self, fingerprint: Mapping[str, str]) -> None:
        """Check that a model's vectors and tokens are those of the datastore.

        :raises DatastoreMismatch: they differ; names which of config, weights and tokenizer, with the first 8 digits of
            both hashes.
        """
        ours = self._manifest.fingerprint
        different = [
            f"{part} {ours.get(part, 'unknown')[:8]} here and {fingerprint.get(part, 'unknown')[:8]} there"
            for part in MODEL_PARTS
            if ours.get(part) != fingerprint.get(part)
        ]
        if different:
            raise DatastoreMismatch(
                f"{self.folder} was made with another model ({self._manifest.model}) than {fingerprint.get('model')}: "
                f"{', '.join(different)}; take the model that it was made with, or build it again"
            )

    def verify(
        self, advance: Advance = lambda done, total: None, layers: Collection[str] | None = None
    ) -> tuple[str, ...]:
        """Read all files and return one line for each problem, none if the datastore is intact.

        Checks sizes, every checksum, NaN and infinity in keys, and that documents lie inside values and sources.
        :param advance: called with the bytes read and their total.
        :param layers: check only the keys of these layers; None: all.
        """
        files = list(_described(self._manifest, layers))
        total = sum(one.data_bytes for one in files)
        problems: list[str] = []
        done = 0
        for one in files:
            problems += self._problems(one.shard)
            done += one.data_bytes
            advance(done, total)
        return tuple(problems or self._document_problems())

    def check_untouched(self) -> None:
        """Check that the opened files have not been written to; a replaced folder does not matter.

        :raises DatastoreCorrupt: a file was written to and has changed; results obtained meanwhile may be wrong.
        """
        for one in _described(self._manifest):
            found = self._files[one.shard.file]
            now = stamp_of(self.folder / one.shard.file)
            if isinstance(found, DatastoreCorrupt) or now is None or now[:2] != found.stamp[:2] or now == found.stamp:
                continue
            for problem in self._problems(one.shard):
                raise DatastoreCorrupt(f"{problem}; it was written to while it was read, so that no result is shown")

    def describe(self) -> dict[str, Any]:
        """Return a summary as plain values, for `knnlm info`."""
        manifest = self._manifest
        return {
            "folder": str(self.folder),
            "model": manifest.model,
            "keys": manifest.count,
            "documents": manifest.documents.rows,
            "sources": len(manifest.sources),
            "layers": {name: self._describe_keys(one) for name, one in manifest.layers.items()},
            "context": manifest.context,
            "stride": manifest.stride,
            "bytes": self.size_bytes,
            "indexes": manifest.indexes,
            "choice": manifest.scores.get("choice") if isinstance(manifest.scores, dict) else None,
            "fitted": manifest.fitted,
            "versions": manifest.versions,
        }

    def _describe_keys(self, layer: LayerKeys) -> dict[str, Any]:
        size = self.count * layer.dim * np.dtype(layer.dtype).itemsize
        return {"dim": layer.dim, "dtype": layer.dtype, "scale": layer.scale, "bytes": size}

    def update_manifest(
        self,
        *,
        scores: object = None,
        fitted: object = None,
        indexes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Replace the given fields atomically; None keeps a field, and `indexes` is merged with other layers' entries.

        Changes made by other processes since the datastore was opened are kept.

        :raises DatastoreError: the folder cannot be written.
        :raises DatastoreMismatch: another datastore is in its place by now.
        """
        with self.changing():
            self._write(scores, fitted, indexes or {})

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Lock the datastore against changes by other processes for the block, and read the manifest again.

        Leftovers of processes that died during a change are removed. If the file system has no locks, nothing is locked
        or removed. Raises as `update_manifest`.
        """
        if self._changing:
            yield
            return
        refuse_cached(self.folder)
        with locked(self.folder) as alone:
            self._read_again()
            if alone:
                self._remove_leftovers()
            self._changing = True
            try:
                yield
            finally:
                self._changing = False

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(f".{NAME}.{PARTIAL}"):
            path.unlink()
        for layer in self.layers:
            for path in (self.folder / "index").glob(f".{layer}.{PARTIAL}"):
                shutil.rmtree(path, ignore_errors=True)

    def _read_again(self) -> None:
        ours, now = self._manifest, read_manifest(self.folder)
        if (now.layers, now.values, now.documents) != (ours.layers, ours.values, ours.documents):
            raise DatastoreMismatch(f"{self.folder} is another datastore than the one that was opened; open it again")
        self._manifest = now

    def _write(self, scores: object, fitted: object, indexes: Mapping[str, Mapping[str, Any]]) -> None:
        old = self._manifest
        new = replace(
            old,
            scores=old.scores if scores is None else scores,
            fitted=old.fitted if fitted is None else fitted,
            indexes={**old.indexes, **indexes},
        )
        try:
            write_json(self.folder / NAME, new.to_json())
        except OSError as error:
            raise disk_error(error, self.folder / NAME) from error
        self._manifest = read_manifest(self.folder)
        for layer in indexes or ():
            self._indexes.pop(layer, None)

    def _layer(self, layer: str) -> LayerKeys:
        if layer not in self._manifest.layers:
            raise DatastoreMismatch(f"{self.folder} has no keys of layer {layer}; it has {', '.join(self.layers)}")
        return self._manifest.layers[layer]

    def _document(self, row: int) -> int:
        """The number of the row's document, from 0; documents without values do not own a row."""
        if not 0 <= row < self.count:
            raise IndexError(f"row {row} of {self.count} keys")
        return int(np.searchsorted(self.documents[:, 0], row, side="right")) - 1

    def _array(self, shard: Shard) -> NDArray[Any]:
        found = self._files[shard.file]
        if isinstance(found, DatastoreCorrupt):
            raise found
        return found.array

    def _checked_array(self, shard: Shard) -> NDArray[Any]:
        """The array of a small file, verified: it is read as a whole anyway."""
        for problem in self._problems(shard):
            raise DatastoreCorrupt(problem)
        return self._array(shard)

    def _problems(self, shard: Shard) -> Iterator[str]:
        path = self.folder / shard.file
        try:
            data = self._array(shard).reshape(-1)
        except DatastoreCorrupt as error:
            yield str(error)
            return
        digest, finite = hashlib.sha256(), True
        step = VERIFY_BYTES // data.itemsize
        for start in range(0, len(data), step):
            part = data[start : start + step]
            digest.update(part.data)
            finite &= part.dtype.kind != "f" or bool(np.isfinite(part).all())
        if digest.hexdigest() != shard.sha256:
            yield f"{path} has changed: its data do not give the checksum in the manifest; build the datastore again"
        if not finite:
            yield f"{path} holds NaN or infinite values; build the datastore again"

    def _document_problems(self) -> Iterator[str]:
        first_rows, _, sources, _ = self.documents.T
        if (
            not len(first_rows)
            or first_rows[0]
            or first_rows[-1] > self.count
            or np.any(np.diff(first_rows) < 0)
            or not np.all((sources >= 0) & (sources < len(self._manifest.sources)))
        ):
            yield f"{self.folder / self._manifest.documents.file} does not fit the values; build the datastore again"


class _Described(NamedTuple):
    """A file of the manifest, with the type of its numbers and the shape of a row."""

    shard: Shard
    dtype: str
    row_shape: tuple[int, ...]

    @property
    def data_bytes(self) -> int:
        return self.shard.rows * math.prod(self.row_shape) * np.dtype(self.dtype).itemsize


class _File(NamedTuple):
    """A mapped file."""

    array: NDArray[Any]
    stamp: Stamp


def _described(manifest: Manifest, layers: Collection[str] | None = None) -> Iterator[_Described]:
    """All files of the manifest; with `layers`, the shared files and the keys of these layers."""
    yield _Described(manifest.documents, "int64", (4,))
    for shard in manifest.values:
        yield _Described(shard, "int32", ())
    for name, layer in manifest.layers.items():
        if layers is None or name in layers:
            yield _Described(layer.centre, "float32", ())
            for shard in layer.shards:
                yield _Described(shard, layer.dtype, (layer.dim,))


def _map_file(opened: OpenFolder, one: _Described) -> _File | DatastoreCorrupt:
    try:
        return _File(*map_npy(opened, one.shard.file, one.dtype, (one.shard.rows, *one.row_shape)))
    except DatastoreCorrupt as error:
        return error


def _open_index(folder: Path) -> SavedIndex | CorruptIndex:
    try:
        return SavedIndex.open(folder)
    except CorruptIndex as error:
        return error

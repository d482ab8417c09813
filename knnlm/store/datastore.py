"""A datastore on disk: the keys of one or more layers of a model over a text, and the token that followed each.

    nursing.knn/
      datastore.json              the manifest, written last: the frame, the parts, scores
      frame/11.ffn_input.npy      the centre of a layer's keys
      parts/00000-5f1c09aa/       values, documents and keys (knnlm.store.part), which never change
      index/11.ffn_input/...      written by the index package

Documents can be removed: their rows stay in their part, but nobody sees them. Rows are numbered over all that count.

Subtracting a constant from all vectors does not change squared L2, but reduces rounding in float16: the constant is the
centre, the mean of the layer's first few thousand vectors. File headers are checked against the manifest when a
datastore is opened, the data by `verify`, and those of small files also when they are used.

Legend: N keys, D dimension.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.errors import CorruptIndex
from index.mapped import OpenFolder, stamp_of
from index.saved import SavedIndex
from knnlm.errors import DatastoreCorrupt, DatastoreError, DatastoreMismatch
from knnlm.places import PARTS
from knnlm.progress import Advance
from knnlm.shown import brief
from knnlm.store.changeable import Changeable
from knnlm.store.document_table import PartDocuments, document_table, index_runs, rows_that_count
from knnlm.store.drift import key_drift, stale_lines
from knnlm.store.hub import on_disk
from knnlm.store.joined import LOADED_BYTES, joined
from knnlm.store.keys import Keys
from knnlm.store.live import LiveRows
from knnlm.store.manifest import (
    MODEL_PARTS,
    LayerKeys,
    Manifest,
    centre_file,
    open_folder,
    read_manifest,
)
from knnlm.store.model_place import absolute_place
from knnlm.store.npy import digest_of
from knnlm.store.opening import is_changed, map_file, open_saved_index
from knnlm.store.part import DOCUMENTS, VALUES, PartFile, part_files, read_part
from knnlm.store.stored_text import StoredText

# Attempts to open a datastore that is replaced meanwhile.
OPENINGS = 5


def open_datastore(folder: str | Path) -> Datastore:
    """Open a datastore, as `Datastore.open`."""
    return Datastore.open(folder)


def as_datastore(store: str | Path | Datastore) -> Datastore:
    """Return an opened datastore as it is, or open the one in a folder. Raises as `Datastore.open`."""
    return store if isinstance(store, Datastore) else Datastore.open(store)


class Datastore(Changeable, StoredText):
    """A finished datastore, opened for reading; arrays are memory-mapped."""

    def __init__(self, folder: Path, manifest: Manifest, opened: OpenFolder) -> None:
        self.folder = folder
        self._manifest = manifest
        self._keys: dict[str, Keys] = {}
        self._changing = False
        # Opens every file now: later its name may refer to another file.
        self._parts = tuple(read_part(opened, entry.name, entry.checksum) for entry in manifest.parts)
        self._files = {one.file: map_file(opened, one) for one in self._described()}
        self._indexes = {layer: open_saved_index(self.index_folder(layer)) for layer in manifest.built_indexes}

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
        store.live_rows  # noqa: B018  (removals that do not fit are refused now)
        return store

    @classmethod
    def look(cls, folder: str | Path) -> Datastore:
        """As `open`, but errors of single files are left to `verify`."""
        folder = on_disk(folder, cls.look)
        for _ in range(OPENINGS):
            with open_folder(Path(folder)) as opened:
                manifest = read_manifest(opened)
                try:
                    store = cls(Path(folder), manifest, opened)
                except DatastoreError:
                    if not is_changed(opened, manifest):
                        raise
                    continue
                found = (*store._files.values(), *store._indexes.values())
                broken = any(isinstance(one, DatastoreCorrupt | CorruptIndex) for one in found)
                if not (broken and is_changed(opened, manifest)):
                    return store
        raise DatastoreError(f"{folder} is replaced again and again while it is opened; try again when that is over")

    def __repr__(self) -> str:
        about = f"{self.count:,} keys, {len(self.layers)} layers of {self.model}: {brief(self.layers)}"
        return f"<Datastore {self.folder}: {about}>"

    @property
    def stores(self) -> tuple[Datastore, ...]:
        """Itself: it stands where several may (`knnlm.store.joint`)."""
        return (self,)

    @property
    def first(self) -> Datastore:
        """Itself."""
        return self

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.resolve().name

    @property
    def manifest(self) -> Manifest:
        """The content of datastore.json."""
        return self._manifest

    @property
    def model(self) -> str:
        """The name to load the model by: an id on the hub, or a path; the manifest has it relative to the folder."""
        return absolute_place(self._manifest.model, self.folder)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers whose keys are stored."""
        return tuple(self._manifest.layers)

    @property
    def count(self) -> int:
        """N, the number of keys of each layer and of values."""
        return self._manifest.count

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files, with indexes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def loaded_bytes(self) -> int:
        """Memory that `values` takes: none where they are mapped."""
        mapped = len(self._manifest.parts) == 1 and self.live_rows is None
        return 0 if mapped else min(4 * self.count, LOADED_BYTES)

    @cached_property
    def values(self) -> NDArray[np.int32]:
        """The next token of each key, int32 [N], read-only.

        Memory-mapped if it is one part without removals, else loaded (4 x N bytes), or mapped from a temporary file
        (`knnlm.store.joined`). The checksum is checked, which is quick compared with reading keys: a token outside the
        vocabulary could crash the process anywhere.
        :raises DatastoreCorrupt: the values have changed since they were written.
        """
        parts = [self._checked_array(one) for one in self._described(()) if one.file.endswith(f"/{VALUES}")]
        values = joined(parts)
        if self.live_rows is not None:
            values = joined(self.live_rows.pick(values))
        values.flags.writeable = False
        return values

    @property
    def documents(self) -> NDArray[np.int64]:
        """int64 [documents, 4]: first row, first token, place in `sources`, number in the source.

        :raises DatastoreCorrupt: a file has changed since it was written.
        """
        return self._table[0]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the texts; the third column of `documents` counts in them. Raises as `documents`."""
        return self._table[1]

    @cached_property
    def _table(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        for problem in self._document_problems():
            raise DatastoreCorrupt(problem)
        return document_table(self.part_documents, self.live_rows)

    @cached_property
    def part_documents(self) -> tuple[PartDocuments, ...]:
        """The documents of each part, removed ones too. Raises as `documents`."""
        found = [self._checked_array(one) for one in self._described(()) if one.file.endswith(f"/{DOCUMENTS}")]
        return tuple(map(PartDocuments, self._manifest.parts, self._parts, found))

    @cached_property
    def live_rows(self) -> LiveRows | None:
        """The rows that count; None: all."""
        return rows_that_count(self.part_documents) if any(part.removed for part in self._manifest.parts) else None

    def keys(self, layer: str) -> Keys:
        """Return the layer's keys: vector - centre, in float32.

        :raises DatastoreMismatch: the layer is not stored; lists the stored ones.
        :raises DatastoreCorrupt: the centre has changed since it was written.
        """
        if layer not in self._keys:
            entry = self._layer(layer)
            centre_of, *parts = [one for one in self._described({layer}) if one.layer]
            centre = np.array(self._checked_array(centre_of))
            self._keys[layer] = Keys([self._array(one) for one in parts], centre, entry.scale, live=self.live_rows)
        return self._keys[layer]

    def saved_index(self, layer: str) -> SavedIndex:
        """Return the layer's index as it was when the datastore was opened, or saved since; not yet loaded.

        :raises index.errors.CorruptIndex: there is no index, or one of its files is missing or short.
        """
        if layer not in self._indexes:
            self._indexes[layer] = open_saved_index(self.index_folder(layer))
        found = self._indexes[layer]
        if isinstance(found, CorruptIndex):
            raise found
        return found

    def index_folder(self, layer: str) -> Path:
        """Return the path of the layer's index, which need not exist. Raises as `keys`."""
        self._layer(layer)
        entry = self._manifest.index_entry(layer)
        return self.folder / "index" / ((entry and entry.folder) or layer)

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
                f"{self.folder} was made with another model ({self.model}) than {fingerprint.get('model')}: "
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
        files = list(self._described(layers))
        total = sum(one.data_bytes for one in files)
        problems: list[str] = []
        done = 0
        for one in files:
            problems += self._problems(one)
            done += one.data_bytes
            advance(done, total)
        return tuple(problems or self._document_problems())

    def check_layers(self, layers: Iterable[str]) -> None:
        """Raise DatastoreMismatch, which lists the stored layers, unless all of these are among them."""
        for layer in layers:
            self._layer(layer)

    def check_untouched(self) -> None:
        """Check that the opened files have not been written to; a replaced folder does not matter.

        :raises DatastoreCorrupt: a file was written to and has changed; results obtained meanwhile may be wrong.
        """
        for one in self._described():
            found = self._files[one.file]
            now = stamp_of(self.folder / one.file)
            if isinstance(found, DatastoreCorrupt) or now is None or now[:2] != found.stamp[:2] or now == found.stamp:
                continue
            for problem in self._problems(one):
                raise DatastoreCorrupt(f"{problem}; it was written to while it was read, so that no result is shown")

    def describe(self) -> dict[str, Any]:
        """Return a summary as plain values, for `knnlm info`."""
        manifest = self._manifest
        drift = {layer: key_drift(self.keys(layer), manifest.built_keys) for layer in self.layers}
        return {
            "folder": str(self.folder),
            "model": self.model,
            "keys": manifest.count,
            "documents": len(self.documents),
            "sources": len(self.sources),
            "parts": len(manifest.parts),
            "removed": sum(part.rows - part.live for part in manifest.parts),
            "generation": manifest.generation,
            "layers": {name: self._describe_keys(one) for name, one in manifest.layers.items()},
            "context": manifest.context,
            "stride": manifest.stride,
            "bytes": self.size_bytes,
            "indexes": manifest.indexes,
            "choice": manifest.scores.get("choice") if isinstance(manifest.scores, dict) else None,
            "fitted": manifest.fitted,
            "drift": {layer: one and asdict(one) for layer, one in drift.items()},
            "stale": list(stale_lines(manifest, self._lacking(), drift)),
            "versions": manifest.versions,
        }

    def _lacking(self) -> dict[str, int]:
        """For each layer whose index lacks keys, how many: all, where it is still to be built."""
        runs = {layer: self.index_runs(layer) for layer in self._manifest.indexes}
        found = {layer: self.count - int(runs_R3[:, 2].sum()) for layer, runs_R3 in runs.items() if runs_R3 is not None}
        return {layer: keys for layer, keys in found.items() if keys}

    def _describe_keys(self, layer: LayerKeys) -> dict[str, Any]:
        size = self.count * layer.dim * np.dtype(layer.dtype).itemsize
        return {"dim": layer.dim, "dtype": layer.dtype, "scale": layer.scale, "bytes": size}

    def index_runs(self, layer: str) -> NDArray[np.int64] | None:
        """Return which keys of the layer's index are which rows: first of each, and number, [R, 3]; None: all in order.

        :raises DatastoreCorrupt: the index's parts do not fit the datastore's.
        """
        entry = self._manifest.index_entry(layer)
        if entry is None or entry.parts is None:
            return None
        return index_runs(entry.parts, self.part_documents, self.live_rows)

    def part_arrays(self, name: str) -> tuple[NDArray[np.int32], dict[str, NDArray[Any]]]:
        """Return a part's values and keys as they are stored, removed rows too; every byte is checked.

        :raises DatastoreCorrupt: a file has changed since it was written.
        """
        own = [one for one in self._described() if one.file.startswith(f"{PARTS}/{name}/")]
        values = next(one for one in own if one.file.endswith(VALUES))
        return self._checked_array(values), {one.layer: self._checked_array(one) for one in own if one.layer}

    def _layer(self, layer: str) -> LayerKeys:
        if layer not in self._manifest.layers:
            raise DatastoreMismatch(f"{self.folder} has no keys of layer {layer}; it has {', '.join(self.layers)}")
        return self._manifest.layers[layer]

    def _described(self, layers: Collection[str] | None = None) -> Iterator[PartFile]:
        """All files of the frame and the parts; with `layers`, the shared files and those of these layers."""
        wanted = {name: one for name, one in self._manifest.layers.items() if layers is None or name in layers}
        for name, layer in wanted.items():
            yield PartFile(centre_file(name), layer.centre, "float32", (), name)
        kinds = {name: (layer.dim, layer.dtype) for name, layer in wanted.items()}
        for entry, part in zip(self._manifest.parts, self._parts, strict=True):
            yield from part_files(entry.name, part, kinds)

    def _array(self, one: PartFile) -> NDArray[Any]:
        found = self._files[one.file]
        if isinstance(found, DatastoreCorrupt):
            raise found
        return found.array

    def _checked_array(self, one: PartFile) -> NDArray[Any]:
        """The array of a small file, verified: it is read as a whole anyway."""
        for problem in self._problems(one):
            raise DatastoreCorrupt(problem)
        return self._array(one)

    def _problems(self, one: PartFile) -> Iterator[str]:
        path = self.folder / one.file
        try:
            data = self._array(one).reshape(-1)
        except DatastoreCorrupt as error:
            yield str(error)
            return
        digest, finite = digest_of(data)
        if digest != one.shard.sha256:
            yield f"{path} has changed: its data do not give the checksum in the manifest; build the datastore again"
        if not finite:
            yield f"{path} holds NaN or infinite values; build the datastore again"

    def _document_problems(self) -> Iterator[str]:
        for one in self.part_documents:
            if problem := one.problem():
                yield f"{self.folder / PARTS / one.entry.name / DOCUMENTS} {problem}; build the datastore again"

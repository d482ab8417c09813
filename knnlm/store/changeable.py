"""Changes of a datastore's manifest: one writer, by a lock on the folder, and any number of readers.

Each change is one new generation: what it lists is written before, and what it no longer lists is removed after.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from index.errors import CorruptIndex
from index.saved import SavedIndex
from knnlm.errors import DatastoreError, DatastoreMismatch
from knnlm.files import disk_error, write_json
from knnlm.locks import locked
from knnlm.places import INDEX_FILES, UNFINISHED, read_work, remove_files
from knnlm.store.hub import refuse_cached
from knnlm.store.manifest import NAME, Manifest, PartEntry, read_manifest, with_parts
from knnlm.store.part import remove_unlisted

# The end of the name of a file or an index that is being written.
PARTIAL = "partial-" + 8 * "[0-9a-f]"


class Changeable(ABC):
    """The part of a datastore that writes its manifest."""

    folder: Path
    _manifest: Manifest
    _indexes: dict[str, SavedIndex | CorruptIndex]
    _changing: bool

    @classmethod
    @abstractmethod
    def open(cls, folder: str | Path) -> Self:
        """Open the newest generation."""

    @abstractmethod
    def index_folder(self, layer: str) -> Path:
        """Return the path of the layer's index."""

    def update_manifest(
        self,
        *,
        scores: object = None,
        fitted: object = None,
        indexes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Replace the given fields atomically; None keeps a field, and `indexes` is merged with other layers' entries.

        Changes made by other processes since the datastore was opened are kept. If nothing changes, nothing is written.

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
                self.remove_leftovers()
            self._changing = True
            try:
                yield
            finally:
                self._changing = False

    @contextmanager
    def writing(self, work: str = "") -> Iterator[Self]:
        """Lock the datastore for a change of its parts; yields its newest generation, opened for the block.

        :param work: what a killed process has left of the same work (`places.work_of`) is kept; all else is removed.
        :raises DatastoreError: another process is changing it.
        :raises DatastoreMismatch: another datastore is in its place by now.
        """
        refuse_cached(self.folder)
        with ExitStack() as stack:
            try:
                alone = stack.enter_context(locked(self.folder, wait=False))
            except BlockingIOError:
                raise DatastoreError(f"{self.folder} is being changed by another process; try again later") from None
            newest = type(self).open(self.folder)
            if newest._manifest.frame != self._manifest.frame:
                raise _replaced(self.folder)
            if alone and not (work and read_work(self.folder) == work):
                newest.remove_leftovers()
            newest._changing = True
            yield newest

    def commit_parts(self, parts: Sequence[PartEntry], *, keep_indexes: bool = True, built: int | None = None) -> None:
        """Write the next generation, if its parts are others, and remove what it does not list; inside of `writing`.

        Indexes go on: what they lack is compared exactly. This object is of no more use then.
        :param keep_indexes: False: they are removed, and are to be trained anew (`renew_indexes`).
        :param built: the manifest's field, where it changes.
        :raises DatastoreError: the folder cannot be written.
        """
        # The mark goes first: after a kill between the two, parts are made again, and never listed twice.
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        if tuple(parts) != self._manifest.parts:
            self._put(with_parts(self._manifest, parts, keep_indexes=keep_indexes, built=built))
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """What the manifest does not list: of processes that died, and of older generations."""
        for path in self.folder.glob(f".{NAME}.{PARTIAL}"):
            path.unlink()
        remove_unlisted(self.folder, {part.name for part in self._manifest.parts})
        kept, indexes = {self.index_folder(layer) for layer in self._manifest.built_indexes}, self.folder / "index"
        for layer in self._manifest.layers:
            for pattern in (f".{layer}.{PARTIAL}", f".{layer}~*.{PARTIAL}"):
                for path in indexes.glob(pattern):
                    shutil.rmtree(path, ignore_errors=True)
            for path in {indexes / layer, *indexes.glob(f"{layer}~*")} - kept:
                remove_files(path, INDEX_FILES)

    def _read_again(self) -> None:
        ours, now = self._manifest, read_manifest(self.folder)
        if (now.frame, now.parts) != (ours.frame, ours.parts):
            raise _replaced(self.folder)
        self._manifest = now

    def _write(self, scores: object, fitted: object, indexes: Mapping[str, Mapping[str, Any]]) -> None:
        old = self._manifest
        new = replace(
            old,
            scores=old.scores if scores is None else scores,
            fitted=old.fitted if fitted is None else fitted,
            indexes={**old.indexes, **indexes},
        )
        if new != old:
            self._put(replace(new, generation=old.generation + 1))
        for layer in indexes or ():
            self._indexes.pop(layer, None)

    def _put(self, manifest: Manifest) -> None:
        try:
            write_json(self.folder / NAME, manifest.to_json())
        except OSError as error:
            raise disk_error(error, self.folder / NAME) from error
        self._manifest = read_manifest(self.folder)


def _replaced(folder: Path) -> DatastoreMismatch:
    return DatastoreMismatch(f"{folder} is another datastore than the one that was opened; open it again")

"""Adding parts to a datastore that is there already."""

from __future__ import annotations

from index.mapped import OpenFolder
from knnlm.errors import DatastoreCorrupt, DatastoreError
from knnlm.store.datastore import Datastore
from knnlm.store.manifest import PartEntry, unlisted_entry
from knnlm.store.part import part_names, part_number
from knnlm.store.part_writer import stored_part
from knnlm.store.writer import DatastoreWriter


class DatastoreAppender(DatastoreWriter):
    """Adds parts to a datastore, inside of `Datastore.writing`; nobody sees them before `commit`.

    It goes on after parts that a killed process has left, unless `writing` has removed them.
    """

    def __init__(self, store: Datastore, *, part_rows: int | None = None) -> None:
        manifest = store.manifest
        self._store = store
        super().__init__(
            store.folder,
            {name: layer.dim for name, layer in manifest.layers.items()},
            fingerprint=manifest.fingerprint,
            context=manifest.context,
            stride=manifest.stride,
            key_dtype=next(iter(manifest.layers.values())).dtype,
            part_rows=part_rows,
            resume=True,
            named_by="folder",
        )

    def commit(self) -> tuple[PartEntry, ...]:
        """Finish the last part, write the next generation, and return what was added.

        :raises DatastoreError: nothing was written, or as `finish`.
        """
        with self._guard():
            self._end_part()
            if not self._entries:
                raise DatastoreError("no next tokens were written, so there is nothing to add; give more text")
            self._store.commit_parts([*self._store.manifest.parts, *self._entries])
        self.close()
        return tuple(self._entries)

    def _list_parts(self) -> None:
        """Nobody lists them yet."""

    def _take_up(self) -> None:
        listed = {part.name for part in self._store.manifest.parts}
        self._first = 1 + max(map(part_number, listed))
        with OpenFolder(self._folder) as opened:
            self._take_frame(opened, self._store.manifest)
            for number, name in enumerate(name for name in part_names(self._folder) if name not in listed):
                try:
                    entry = unlisted_entry(opened, name)
                    self._stored.append(stored_part(opened, entry, self._kept))
                except DatastoreCorrupt:
                    break
                if part_number(name) != self._first + number:
                    self._stored.pop()
                    break

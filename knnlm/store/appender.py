"""Adding parts to a datastore that is there already."""

from __future__ import annotations

from index.mapped import OpenFolder
from knnlm.errors import DatastoreCorrupt, DatastoreError
from knnlm.store.datastore import Datastore
from knnlm.store.manifest import PartEntry, unlisted_entry
from knnlm.store.part import part_names, part_number, read_any_part
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

    def commit(self, *, once: bool = False) -> tuple[PartEntry, ...]:
        """Finish the last part, write the next generation, and return what was added.

        :param once: add nothing, and return nothing, if all parts are there with the same documents: the same work was
            done before, by a process that was killed after it.
        :raises DatastoreError: nothing was written, or as `finish`.
        """
        with self._guard():
            self._end_part()
            if not self._entries:
                raise DatastoreError("no next tokens were written, so there is nothing to add; give more text")
            added = [] if once and self._are_listed() else self._entries
            self._store.commit_parts([*self._store.manifest.parts, *added])
        self.close()
        return tuple(added)

    def _list_parts(self) -> None:
        """Nobody lists them yet."""

    def _are_listed(self) -> bool:
        """Whether the datastore has parts with the same documents, none of them removed."""
        with OpenFolder(self._folder) as opened:
            listed = [_content(opened, part.name) for part in self._store.manifest.parts if not part.removed]
            return all(_content(opened, entry.name) in listed for entry in self._entries)

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


def _content(opened: OpenFolder, name: str) -> object:
    """What a part was made of: the same text has the same."""
    part, _ = read_any_part(opened, name)
    return part.values, part.documents, part.sources

"""Parts of a datastore that other processes make: one process plans and lists them, any process makes one.

A part's bytes are a function of the frame and the text, so that it may be made twice, and again after a failure.

Legend: N keys, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.mapped import OpenFolder
from knnlm.errors import DatastoreCorrupt, DatastoreError
from knnlm.store.manifest import LayerKeys, PartEntry, frame_checksum, unlisted_entry
from knnlm.store.part import part_names, part_number, read_any_part
from knnlm.store.part_writer import BadKey, stored_part
from knnlm.store.writer import DatastoreWriter


@dataclass(frozen=True, eq=False)
class PartFrame:
    """All that a part is made with besides the model and the text; small enough to be sent with every part."""

    folder: Path
    layers: Mapping[str, LayerKeys]
    centres: Mapping[str, NDArray[np.float32]]
    """The centre of each layer, [D]."""
    fingerprint: Mapping[str, str]
    context: int
    stride: int

    @property
    def key_dtype(self) -> str:
        """Type of the keys, the same for all layers."""
        return next(iter(self.layers.values())).dtype


class PartsElsewhere(DatastoreWriter):
    """Writes a datastore whose parts are made by others: each is taken before its documents and values are given.

    These are then compared with what the part holds, as `resume` does with parts that were there before.
    """

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that are stored."""
        return tuple(self._frames)

    @property
    def needs_frame(self) -> bool:
        """Whether the centres are still to be fixed, by the first vectors of all layers."""
        return not self._kept

    @property
    def has_centres(self) -> bool:
        """Whether a frame gave them, so that no vectors are needed."""
        return all(frame.centre is not None for frame in self._frames.values())

    def fix_frame(self, first: Mapping[str, NDArray[np.float32]]) -> None:
        """Fix and write the centres.

        :param first: for each layer the vectors [N, D] that would be its first append; none where a frame gave them.
        :raises ModelError: a vector has NaN or infinite values; names the layer.
        """
        with self._guard():
            for name, vectors_ND in first.items():
                try:
                    self._frames[name].fix(vectors_ND)
                except BadKey as error:
                    raise error.located(f"key {error.row} of the first batch") from None
            self._kept = {name: frame.write_centre(self._folder) for name, frame in self._frames.items()}

    @property
    def part_frame(self) -> PartFrame:
        """What each part is to be made with, once the centres are fixed."""
        centres = {name: frame.centre for name, frame in self._frames.items() if frame.centre is not None}
        return PartFrame(self._folder, self._kept, centres, self._fingerprint, self._context, self._stride)

    def left_behind(self) -> dict[int, PartEntry]:
        """Return whole parts of this frame, by number, that a killed process has left unlisted."""
        with OpenFolder(self._folder) as opened:
            entries = dict(self._unlisted(opened))
        return {number: entry for number, entry in entries.items() if number >= len(self._stored)}

    def take(self, entry: PartEntry) -> None:
        """Take the next part, which another process has made.

        :raises DatastoreError: its files are not in the folder.
        """
        with self._guard(), OpenFolder(self._folder) as opened:
            try:
                self._stored.append(stored_part(opened, entry, self._kept))
            except DatastoreCorrupt as error:
                raise DatastoreError(
                    f"part {entry.name} was made, but not all of it is here ({error}); `out` has to be in a folder "
                    "that all machines share"
                ) from None

    def _unlisted(self, opened: OpenFolder) -> Iterator[tuple[int, PartEntry]]:
        frame = frame_checksum(self._fingerprint, self._kept, self._context, self._stride)
        for name in part_names(self._folder):
            try:
                entry = unlisted_entry(opened, name)
                stored_part(opened, entry, self._kept)
                if read_any_part(opened, name)[0].frame == frame:
                    yield part_number(name), entry
            except DatastoreCorrupt:
                continue


class PartAlone(DatastoreWriter):
    """Writes one part of a datastore, which others list. `DatastoreWriter` says how; `finish_part` ends it."""

    def __init__(self, frame: PartFrame, number: int) -> None:
        super().__init__(
            frame.folder,
            {name: layer.dim for name, layer in frame.layers.items()},
            fingerprint=frame.fingerprint,
            context=frame.context,
            stride=frame.stride,
            key_dtype=frame.key_dtype,
            part_rows=1 << 62,  # where it ends was decided before
            resume=True,
        )
        self._first, self._kept = number, dict(frame.layers)
        for name, one in self._frames.items():
            one.centre, one.scale = frame.centres[name], frame.layers[name].scale

    def finish_part(self) -> PartEntry:
        """Finish the part and return its entry.

        :raises DatastoreError: it has no values, or as `DatastoreWriter.finish`.
        """
        with self._guard():
            self._end_part()
            if not self._entries:
                raise DatastoreError("no next tokens were written, so there is no part; give more text")
        self.close()
        return self._entries[0]

    def _list_parts(self) -> None:
        """Others list it."""

    def _take_up(self) -> None:
        """The frame was given."""

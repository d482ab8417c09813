"""Writing a datastore: values and keys as they arrive, part by part, with counts and checksums; the manifest last.

Legend: N keys, D dimension.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from index.mapped import OpenFolder
from knnlm.config import LONGEST_PART, PART_ROWS
from knnlm.errors import DatastoreCorrupt, DatastoreError, InputError
from knnlm.files import disk_error, write_json
from knnlm.store.datastore import Datastore
from knnlm.store.manifest import (
    KEY_DTYPES,
    NAME,
    LayerKeys,
    Manifest,
    PartEntry,
    centre_file,
    frame_checksum,
    read_manifest,
)
from knnlm.store.npy import map_npy
from knnlm.store.part import remove_unlisted
from knnlm.store.part_writer import INT32, BadKey, LayerFrame, PartWriter, StoredPart, stored_part
from knnlm.version import __version__

# Bytes of keys queued for the writing thread; beyond this, extraction waits.
PENDING_BYTES = 256 << 20
INT32_MAX = np.iinfo(INT32).max


class DatastoreWriter:
    """Writes one datastore into an existing empty folder; a context manager. docs/own-vectors.md has an example.

    For each document `begin_document`, then `append_values` with the tokens after the first, and for each layer
    `append_keys` with as many vectors, in pieces of any size; at the end `finish`. The vector at position t of a
    document has seen tokens 0 to t, and token t + 1 is its value.

    Keys are stored as (vector - centre) / scale. The centre is the mean of a layer's first append and then fixed:
    distances do not depend on it, and for float16 any constant near the mean will do. float32 keys are centred, never
    scaled.

    A part is finished when the next one begins: it then has its final name, and a manifest lists it. With `resume`, a
    writer on the same folder goes on after the finished parts: the same documents and values are given to it from the
    beginning, and of a part that is there already they are compared; its keys are not given (`begin_part`).

    Conversion, checksums and writing run in a separate thread, whose errors are raised by the next call.

    :param layers: name and vector size D of each layer.
    :param fingerprint, context, stride: the manifest's fields: the model (`LanguageModel.fingerprint`), and the
        windows, in tokens, that it was run on.
    :param key_dtype: type of the keys on disk: `float16`, or `float32` for vectors that overflow it.
    :param part_rows: keys after which the next document begins a new part; at twice as many a document is cut.
    :param resume: go on with the parts that the folder holds.
    :param frame: a datastore whose centres and scales are taken, so that both can be merged.
    :param named_by: the field or variable that named the folder, for errors of the disk: `out` or TMPDIR.
    :raises InputError: no layers, or an unknown `key_dtype`.
    :raises DatastoreError: the folder holds a datastore already; with `resume`, one of other layers. Every method: the
        disk is full, or the writer is closed, as it is after any error.
    """

    def __init__(
        self,
        folder: str | Path,
        layers: Mapping[str, int],
        *,
        fingerprint: Mapping[str, str],
        context: int,
        stride: int,
        key_dtype: str = "float16",
        part_rows: int | None = None,
        resume: bool = False,
        frame: Datastore | None = None,
        named_by: str = "`out`",
    ) -> None:
        if key_dtype not in KEY_DTYPES:
            raise InputError(f"`key_dtype` is {key_dtype!r}, but must be one of {', '.join(KEY_DTYPES)}")
        if not layers:
            raise InputError("a datastore needs at least one layer; give `layers`")
        self._folder, self._named_by = Path(folder), named_by
        self._fingerprint, self._context, self._stride = dict(fingerprint), context, stride
        self.part_rows = part_rows or PART_ROWS
        """Keys after which the next document begins a new part."""
        self._frames = {name: LayerFrame(name, dim, np.dtype(key_dtype)) for name, dim in layers.items()}
        if frame is not None:
            for name, one in self._frames.items():
                one.centre, one.scale = frame.keys(name).centre, frame.manifest.layers[name].scale
        self._kept: dict[str, LayerKeys] = {}
        self._stored: list[StoredPart] = []
        # Parts of the folder's manifest.
        self._listed = 0
        self._entries: list[PartEntry] = []
        # The number of the first part.
        self._first = 0
        if (self._folder / NAME).exists():
            if not resume:
                raise DatastoreError(f"{folder} holds a datastore already; write into an empty folder")
            self._take_up()
        self._part: PartWriter | StoredPart | None = None
        self._last_token = 0
        self._counts = dict.fromkeys(layers, 0)
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._pending_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="knnlm-datastore")
        self._closed = False

    @property
    def stored_parts(self) -> int:
        """Finished parts that the folder held when the writer was made."""
        return len(self._stored)

    def use_stored(self, parts: int) -> None:
        """Go on after the first `parts` finished ones; the others are made again."""
        del self._stored[parts:]
        self._listed = min(self._listed, parts)

    @property
    def needs_document(self) -> bool:
        """Whether values must not come before `begin_document`: the part has none yet."""
        return self._part is None or not len(self._part.documents)

    def begin_part(self) -> bool:
        """Finish the part that is being written, and begin the next one.

        Return whether it is stored already: then its documents and values are still to be given, its keys are not.
        :raises DatastoreError: layers differ in their number of keys; the part that ends is stored and differs.
        """
        with self._guard():
            self._end_part()
            return isinstance(self._open_part(), StoredPart)

    def begin_document(self, first_token: int, source: str, number: int, *, start: int = 0) -> None:
        """Start a document with its first token, which has no predecessor, and its origin.

        A part that has `part_rows` keys ends before it.
        :param source: name of the text.
        :param number: the document's number in that text.
        :param start: position of the first token in the document; not 0 where a part continues it.
        """
        with self._guard():
            if self._has_rows(self.part_rows):
                self._end_part()
            self._open_part().documents.add(self._open_part().rows, first_token, source, number, start)

    def append_values(self, next_tokens_N: NDArray[np.integer[Any]]) -> None:
        """Append the next tokens of N further positions of the document, whole numbers [N].

        :raises DatastoreError: a token does not fit into int32, there is no document, or as `append_keys`.
        """
        with self._guard():
            if self._part is None or self.needs_document:
                raise DatastoreError("values came before begin_document; begin a document first")
            tokens = np.asarray(next_tokens_N)
            if tokens.size and not (0 <= tokens.min() and tokens.max() <= INT32_MAX):
                raise DatastoreError(
                    f"tokens from {tokens.min()} to {tokens.max()} cannot be stored; take 0 to {INT32_MAX}"
                )
            self._cut_long_part()
            self._part.append_values(tokens.astype(INT32, copy=False))
            self._last_token = int(tokens[-1]) if tokens.size else self._last_token

    def append_keys(self, layer: str, vectors_ND: NDArray[np.floating[Any]]) -> None:
        """Append the layer's raw (not centred) vectors of the next N positions, floating-point [N, D].

        Layers may come in any order, before or after their values. The writing thread reads the array later: do not
        change it.

        :raises DatastoreError: the disk is full, or a key overflows float16; the message names the layer.
        :raises ModelError: an earlier vector has NaN or infinite values.
        """
        with self._guard():
            frame = self._frames.get(layer)
            if frame is None:
                raise DatastoreError(f"the datastore was begun without layer {layer}; it has {', '.join(self._frames)}")
            if vectors_ND.ndim != 2 or vectors_ND.shape[1] != frame.dim:
                raise DatastoreError(f"layer {layer} gave vectors {vectors_ND.shape}, but takes [n, {frame.dim}]")
            self._cut_long_part()
            part = self._open_part()
            if not isinstance(part, PartWriter):
                raise DatastoreError("the part is stored already; begin the next one with begin_part")
            self._wait(PENDING_BYTES - vectors_ND.nbytes)
            self._counts[layer] += len(vectors_ND)
            self._pending.append((self._thread.submit(part.append_keys, layer, vectors_ND), vectors_ND.nbytes))
            self._pending_bytes += vectors_ND.nbytes

    def finish(
        self,
        *,
        corpus: str = "",
        scores: object = None,
        fitted: object = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Wait for the thread, finish the last part, and write the manifest.

        The parameters are the manifest's fields. Numbers in `scores` that are not finite become null.
        :raises DatastoreError: nothing was written, or a layer's number of keys differs from that of values.
        """
        with self._guard():
            self._end_part()
            if not self._entries:
                raise DatastoreError("no next tokens were written, so there is nothing to retrieve; give more text")
            self._write_manifest(1, corpus, scores, fitted, versions)
            remove_unlisted(self._folder, {entry.name for entry in self._entries})
        self.close()

    def close(self) -> None:
        """Stop the thread and close the files; without `finish` there is no datastore. Closing again does nothing."""
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        if self._part is not None:
            self._part.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Refuse a closed writer, close it on any error, and turn errors of the disk into DatastoreError."""
        if self._closed:
            raise DatastoreError("the datastore writer is closed; begin a new datastore")
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, BadKey) and self._part is not None:
                raise error.located(self._part.documents.place(error.row)) from None
            if isinstance(error, OSError):
                raise disk_error(error, f"in {self._folder.parent}", self._named_by) from error
            raise

    def _wait(self, most_bytes: int) -> None:
        """Wait until at most `most_bytes` are queued (-1: nothing is); raises the thread's errors."""
        while self._pending and (self._pending_bytes > most_bytes or self._pending[0][0].done()):
            future, size = self._pending.popleft()
            self._pending_bytes -= size
            future.result()

    def _has_rows(self, rows: int) -> bool:
        """Whether so many rows of a part are written, and each value has its keys."""
        part = self._part
        if not isinstance(part, PartWriter) or part.rows < rows:
            return False
        return all(keys == part.rows for keys in self._counts.values())

    def _open_part(self) -> PartWriter | StoredPart:
        """The part that is being written; the next one, if there is none."""
        if self._part is None:
            number = len(self._entries)
            stored = number < len(self._stored)
            self._part = (
                self._stored[number] if stored else PartWriter(self._folder, self._first + number, self._frames)
            )
        return self._part

    def _cut_long_part(self) -> None:
        """Begin a part inside of a document that is too long for one."""
        if self._part is None or not self._has_rows(LONGEST_PART * self.part_rows):
            return
        source, number, position = self._part.documents.position(self._part.rows)
        self._end_part()
        self._open_part().documents.add(0, self._last_token, source, number, position)

    def _end_part(self) -> None:
        """Finish the part, if one with values is being written, and list it in a manifest."""
        if self._part is None:
            return
        self._wait(-1)
        self._check_counts(self._part)
        if not self._part.rows:
            return
        if not self._kept:
            self._kept = {name: frame.write_centre(self._folder) for name, frame in self._frames.items()}
        frame = frame_checksum(self._fingerprint, self._kept, self._context, self._stride)
        self._entries.append(self._part.finish(frame))
        if len(self._entries) > self._listed:
            self._list_parts()
        self._part, self._counts = None, dict.fromkeys(self._counts, 0)

    def _list_parts(self) -> None:
        """List the parts that are finished so far."""
        self._write_manifest(0)

    def _check_counts(self, part: PartWriter | StoredPart) -> None:
        for layer, keys in self._counts.items():
            if keys != part.rows and isinstance(part, PartWriter):
                raise DatastoreError(
                    f"layer {layer} has {keys} keys, but there are {part.rows} values; each value needs one key"
                )

    def _write_manifest(
        self,
        generation: int,
        corpus: str = "",
        scores: object = None,
        fitted: object = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        manifest = Manifest(
            fingerprint=self._fingerprint,
            layers=self._kept,
            count=sum(entry.rows for entry in self._entries),
            parts=tuple(self._entries),
            context=self._context,
            stride=self._stride,
            generation=generation,
            corpus=corpus,
            scores=scores,
            fitted=fitted,
            versions={"python": platform.python_version(), "numpy": np.__version__, "knnlm": __version__}
            | dict(versions or {}),
        )
        write_json(self._folder / NAME, manifest.to_json())

    def _take_up(self) -> None:
        """Read frame and finished parts of the folder; from the first part that is not whole on, all are made again."""
        with OpenFolder(self._folder) as opened:
            manifest = read_manifest(opened)
            ours = {name: (frame.dim, frame.dtype.name) for name, frame in self._frames.items()}
            if {name: (layer.dim, layer.dtype) for name, layer in manifest.layers.items()} != ours:
                raise DatastoreError(f"{self._folder} holds keys of other layers; begin anew with `overwrite=True`")
            self._take_frame(opened, manifest)
            for entry in manifest.parts:
                try:
                    self._stored.append(stored_part(opened, entry, manifest.layers))
                except DatastoreCorrupt:
                    break
        self._listed = len(self._stored)

    def _take_frame(self, opened: OpenFolder, manifest: Manifest) -> None:
        for name, layer in manifest.layers.items():
            frame = self._frames[name]
            frame.centre = np.array(map_npy(opened, centre_file(name), np.float32, (layer.dim,))[0])
            frame.scale = layer.scale
        self._kept = dict(manifest.layers)

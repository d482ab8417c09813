"""Writing a datastore: values and keys as they arrive, with counts and checksums; the manifest last.

Legend: N keys, D dimension.
"""

from __future__ import annotations

import math
import platform
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnlm.errors import DatastoreError, InputError, ModelError
from knnlm.files import disk_error, write_json
from knnlm.store.half import FLOAT16_MAX, all_finite, to_float16
from knnlm.store.manifest import KEY_DTYPES, NAME, LayerKeys, Manifest, Shard
from knnlm.store.npy import NpyWriter
from knnlm.version import __version__

# A shard's maximum size, so that copying or checking one takes seconds.
SHARD_BYTES = 1 << 31
# Bytes of keys queued for the writing thread; beyond this, extraction waits.
PENDING_BYTES = 256 << 20
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
INT32_MAX = np.iinfo(INT32).max


class DatastoreWriter:
    """Writes one datastore into an existing empty folder, best one of `files.new_folder`; a context manager.

    Keys are stored as (vector - centre) / scale. The centre is the mean of a layer's first append and then fixed:
    distances do not depend on it, and for float16 any constant near the mean will do. float32 keys are centred, never
    scaled.

    Conversion, checksums and writing run in a separate thread, whose errors are raised by the next call.

    :param layers: name and vector size of each layer.
    :param shard_rows: rows of every shard; by default as many as fit into 2 GiB, for the widest layer and for values.
    :param named_by: the field or variable that named the folder, for errors of the disk: `out` or TMPDIR.
    :raises InputError: no layers, or an unknown `key_dtype`.
    """

    def __init__(
        self,
        folder: str | Path,
        layers: Mapping[str, int],
        *,
        key_dtype: str = "float16",
        shard_rows: int | None = None,
        named_by: str = "`out`",
    ) -> None:
        if key_dtype not in KEY_DTYPES:
            raise InputError(f"`key_dtype` is {key_dtype!r}, but must be one of {', '.join(KEY_DTYPES)}")
        if not layers:
            raise InputError("a datastore needs at least one layer; give `layers`")
        self._folder, self._named_by = Path(folder), named_by
        dtype = np.dtype(key_dtype)
        rows = shard_rows or max(1, SHARD_BYTES // (max(layers.values()) * dtype.itemsize))
        # Values in a single file, up to 536 million, are memory-mapped and never loaded.
        values_rows = shard_rows or SHARD_BYTES // INT32.itemsize
        self._values = _ShardWriter(self._folder, "values-{:05d}.npy", INT32, None, values_rows)
        self._layers = {name: _LayerWriter(self._folder, name, dim, dtype, rows) for name, dim in layers.items()}
        self._counts = dict.fromkeys(layers, 0)
        self._documents = array("q")
        self._sources: dict[str, int] = {}
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._pending_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="knnlm-datastore")
        self._closed = False

    def begin_document(self, first_token: int, source: str, number: int) -> None:
        """Start a document with its first token, which has no predecessor, and its origin.

        :param source: name of the text.
        :param number: the document's number in that text.
        """
        source_number = self._sources.setdefault(source, len(self._sources))
        self._documents.extend((self._values.rows, int(first_token), source_number, int(number)))

    def append_values(self, next_tokens_N: NDArray[np.integer[Any]]) -> None:
        """Append the next tokens of N further positions of the document, [N].

        :raises DatastoreError: a token does not fit into int32, there is no document, or as `append_keys`.
        """
        with self._guard():
            if not self._documents:
                raise DatastoreError("values came before begin_document; begin a document first")
            tokens = np.asarray(next_tokens_N)
            if tokens.size and not (0 <= tokens.min() and tokens.max() <= INT32_MAX):
                raise DatastoreError(
                    f"tokens from {tokens.min()} to {tokens.max()} cannot be stored; take 0 to {INT32_MAX}"
                )
            self._values.append(tokens.astype(INT32, copy=False))

    def append_keys(self, layer: str, vectors_ND: NDArray[np.floating[Any]]) -> None:
        """Append the layer's raw (not centred) vectors of the next N positions, [N, D].

        Layers may come in any order, before or after their values. The writing thread reads the array later: do not
        change it.

        :raises DatastoreError: the disk is full, or a key overflows float16; the message names the layer.
        :raises ModelError: an earlier vector has NaN or infinite values.
        """
        with self._guard():
            writer = self._layers.get(layer)
            if writer is None:
                raise DatastoreError(f"the datastore was begun without layer {layer}; it has {', '.join(self._layers)}")
            if vectors_ND.ndim != 2 or vectors_ND.shape[1] != writer.dim:
                raise DatastoreError(f"layer {layer} gave vectors {vectors_ND.shape}, but takes [n, {writer.dim}]")
            self._wait(PENDING_BYTES - vectors_ND.nbytes)
            self._counts[layer] += len(vectors_ND)
            self._pending.append((self._thread.submit(writer.append, vectors_ND), vectors_ND.nbytes))
            self._pending_bytes += vectors_ND.nbytes

    def finish(
        self,
        *,
        fingerprint: Mapping[str, str],
        context: int,
        stride: int,
        corpus: str = "",
        scores: object = None,
        fitted: object = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Wait for the thread, close all files, and write documents.npy and, last, the manifest.

        The parameters are the manifest's fields. Numbers in `scores` that are not finite become null.
        :raises DatastoreError: nothing was written, or a layer's number of keys differs from that of values.
        """
        with self._guard():
            self._check_counts()
            self._wait(-1)
            manifest = Manifest(
                fingerprint=dict(fingerprint),
                layers=self._close_layers(),
                count=self._values.rows,
                values=self._values.close(),
                documents=self._write_documents(),
                sources=tuple(self._sources),
                context=context,
                stride=stride,
                corpus=corpus,
                scores=scores,
                fitted=fitted,
                versions={"python": platform.python_version(), "numpy": np.__version__, "knnlm": __version__}
                | dict(versions or {}),
            )
            write_json(self._folder / NAME, manifest.to_json())
        self.close()

    def close(self) -> None:
        """Stop the thread and close the files; without `finish` there is no datastore. Closing again does nothing."""
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        for shards in (self._values, *(writer.shards for writer in self._layers.values())):
            shards.abort()

    def __enter__(self) -> DatastoreWriter:
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
            if isinstance(error, _BadKey):
                raise error.located(self._where(error.row)) from None
            if isinstance(error, OSError):
                raise disk_error(error, f"in {self._folder.parent}", self._named_by) from error
            raise

    def _wait(self, most_bytes: int) -> None:
        """Wait until at most `most_bytes` are queued (-1: nothing is); raises the thread's errors."""
        while self._pending and (self._pending_bytes > most_bytes or self._pending[0][0].done()):
            future, size = self._pending.popleft()
            self._pending_bytes -= size
            future.result()

    def _check_counts(self) -> None:
        count = self._values.rows
        if not count:
            raise DatastoreError("no next tokens were written, so there is nothing to retrieve; give more text")
        for layer, keys in self._counts.items():
            if keys != count:
                raise DatastoreError(
                    f"layer {layer} has {keys} keys, but there are {count} values; each value needs one key"
                )

    def _close_layers(self) -> dict[str, LayerKeys]:
        """Close layers concurrently: syncing forty files at once takes half the time of one after another."""
        with ThreadPoolExecutor(CLOSING_THREADS, thread_name_prefix="knnlm-close") as threads:
            closed = threads.map(_LayerWriter.close, self._layers.values())
            return dict(zip(self._layers, closed, strict=True))

    def _write_documents(self) -> Shard:
        documents = np.frombuffer(self._documents, np.int64).reshape(-1, 4)
        with NpyWriter(self._folder / "documents.npy", np.int64, 4) as file:
            file.append(documents)
        return Shard("documents.npy", file.rows, file.sha256)

    def _where(self, row: int) -> str:
        """Name the document of a key, or only the key if no document was begun."""
        documents = np.array(self._documents, np.int64).reshape(-1, 4)
        at = int(np.searchsorted(documents[:, 0], row, side="right")) - 1
        if at < 0:
            return f"key {row}"
        first, _, source, number = documents[at].tolist()
        return f"token {row - first} of {list(self._sources)[source]}, document {number}"


class _BadKey(Exception):
    """A key that cannot be stored, identified by its row; the writer adds the document."""

    def __init__(self, row: int, kind: type[DatastoreError] | type[ModelError], message: str) -> None:
        super().__init__(message)
        self.row, self._kind, self._message = row, kind, message

    def located(self, where: str) -> DatastoreError | ModelError:
        return self._kind(self._message.format(where=where))


class _ShardWriter:
    """Rows over consecutive .npy files of `shard_rows` rows each."""

    def __init__(self, folder: Path, pattern: str, dtype: np.dtype[Any], columns: int | None, shard_rows: int) -> None:
        self._folder, self._pattern = folder, pattern
        self._dtype, self._columns, self._shard_rows = dtype, columns, shard_rows
        self._file: NpyWriter | None = None
        self._done: list[Shard] = []
        self.rows = 0

    def append(self, rows: NDArray[Any]) -> None:
        start = 0
        while start < len(rows):
            file = self._file = self._file or self._open()
            stop = min(len(rows), start + self._shard_rows - file.rows)
            file.append(rows[start:stop])
            self.rows += stop - start
            start = stop
            if file.rows == self._shard_rows:
                self._close_file(file)

    def close(self) -> tuple[Shard, ...]:
        if self._file is not None:
            self._close_file(self._file)
        return tuple(self._done)

    def abort(self) -> None:
        if self._file is not None:
            self._file.abort()

    def _open(self) -> NpyWriter:
        path = self._folder / self._pattern.format(len(self._done))
        path.parent.mkdir(parents=True, exist_ok=True)
        return NpyWriter(path, self._dtype, self._columns)

    def _close_file(self, file: NpyWriter) -> None:
        file.close()
        self._done.append(Shard(self._pattern.format(len(self._done)), file.rows, file.sha256))
        self._file = None


class _LayerWriter:
    """One layer's keys; everything except the constructor runs in the writing thread."""

    def __init__(self, folder: Path, name: str, dim: int, dtype: np.dtype[Any], shard_rows: int) -> None:
        self.dim = dim
        self.shards = _ShardWriter(folder, f"keys/{name}/{{:05d}}.npy", dtype, dim, shard_rows)
        self._folder, self._name, self._dtype = folder, name, dtype
        self._centre: NDArray[np.float32] | None = None
        self._scale = 1.0

    def append(self, vectors_ND: NDArray[np.floating[Any]]) -> None:
        if not len(vectors_ND):
            return
        vectors_ND = vectors_ND.astype(np.float32, copy=False)
        if self._centre is None:
            self._check(vectors_ND, math.inf)
            self._centre, self._scale = self._frozen(vectors_ND)
        rows = max(1, BLOCK // self.dim)
        for start in range(0, len(vectors_ND), rows):
            self._append_block(vectors_ND[start : start + rows], self._centre)

    def _append_block(self, vectors_ND: NDArray[np.float32], centre: NDArray[np.float32]) -> None:
        stored_ND = vectors_ND - centre
        if self._dtype == np.float32:
            self._check(stored_ND, math.inf)
            self.shards.append(stored_ND)
            return
        if self._scale != 1:
            stored_ND *= np.float32(1 / self._scale)  # exact: a power of two
        halves_ND = to_float16(stored_ND)
        if not all_finite(halves_ND):
            self._check(stored_ND, FLOAT16_MAX)
        self.shards.append(halves_ND)

    def close(self) -> LayerKeys:
        assert self._centre is not None
        name = f"keys/{self._name}/centre.npy"
        with NpyWriter(self._folder / name, np.float32) as file:
            file.append(self._centre)
        centre = Shard(name, file.rows, file.sha256)
        return LayerKeys(self.dim, self._dtype.name, self._scale, centre, self.shards.close())

    def _frozen(self, vectors_ND: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """The centre and the scale of all keys, from the first ones."""
        centre = vectors_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
        if self._dtype == np.float32:
            return centre, 1.0
        return centre, _scale(_peak(vectors_ND), _peak(vectors_ND - centre))

    def _check(self, rows_ND: NDArray[np.float32], limit: float) -> None:
        peak = _peak(rows_ND)
        if math.isfinite(peak) and peak <= limit:
            return
        sizes_N = np.abs(rows_ND).max(axis=1)
        row = int(np.flatnonzero(~(np.isfinite(sizes_N) & (sizes_N <= limit)))[0])
        place = self.shards.rows + row
        if math.isfinite(sizes_N[row]):
            message = f"layer {self._name} overflows float16 at {{where}}; take `key_dtype='float32'`"
            raise _BadKey(place, DatastoreError, message)
        message = f"layer {self._name} gives NaN or infinite values at {{where}}; leave the layer out with `layers`"
        raise _BadKey(place, ModelError, message)


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

"""The keys of one layer as an index reads them: any rows, in float32, transformed for the metric.

Legend: N keys, Q queries, D dimension.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from index.mapped import release
from knnlm.config import METRICS
from knnlm.errors import InputError
from knnlm.store.half import to_float32
from knnlm.store.live import LiveRows

# Rows that `take` gathers at a time: the float16 copy between the file and the float32 result stays in cache.
TAKE_ROWS = 1 << 10
# Elements converted to float32 at a time: 512 kB stay in the second-level cache.
BLOCK = 1 << 17

Floats = NDArray[np.float32]


class Keys:
    """A layer's keys over all shards: an `index.source.VectorSource`.

    From `Datastore.keys` they are vector - centre: subtracting a constant does not change squared L2, and rounding in
    float16 and BLAS is much smaller for small numbers.
    """

    def __init__(
        self,
        shards: Sequence[NDArray[Any]],
        centre: Floats,
        scale: float = 1.0,
        metric: str = "l2",
        live: LiveRows | None = None,
    ) -> None:
        """:param live: the rows of the shards that count; None: all."""
        self.centre = centre
        """float32 [D], the constant that was subtracted from every vector."""
        self.metric = _checked(metric)
        self._shards, self._scale = tuple(shards), np.float32(scale)
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        self._live = live

    @property
    def dim(self) -> int:
        """D."""
        return len(self.centre)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._live is None else len(self._live)

    def for_metric(self, metric: str) -> Keys:
        """Return the keys transformed such that an index's distance is the metric's, up to a constant per query.

        l2: vector - centre. cosine: the vector at unit length, so that squared L2 is 2 - 2 cos. ip: vector - centre,
        which shifts all of a query's inner products by one number and leaves p_kNN unchanged.
        :raises InputError: an unknown metric.
        """
        return Keys(self._shards, self.centre, float(self._scale), metric, self._live)

    def prepare_queries(self, vectors_QD: NDArray[Any], metric: str | None = None) -> Floats:
        """Return raw vectors of the layer as queries under a metric (by default this view's), a new array [Q, D]."""
        metric = _checked(metric or self.metric)
        queries_QD = np.array(vectors_QD, np.float32, order="C")
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.dim:
            raise InputError(f"queries have the shape {queries_QD.shape}, but must be [queries, {self.dim}]")
        if metric == "l2":
            queries_QD -= self.centre
        elif metric == "cosine":
            _normalise(queries_QD)
        return queries_QD

    def read(self, start: int, stop: int) -> Floats:
        """Return rows start to stop (clipped to N), float32 [stop - start, D], C-contiguous.

        :raises IndexError: a negative start, or a stop before it.
        """
        stop = min(stop, len(self))
        if not 0 <= start <= stop:
            raise IndexError(f"rows {start} to {stop} of {len(self)} keys")
        rows_ND, done = np.empty((stop - start, self.dim), np.float32), 0
        for first, last in [(start, stop)] if self._live is None else self._live.runs(start, stop):
            self._read(first, last, rows_ND[done : done + last - first])
            done += last - first
        return self._finish(rows_ND)

    def _read(self, start: int, stop: int, rows_ND: Floats) -> None:
        """Stored rows start to stop."""
        for number in range(int(np.searchsorted(self._ends, start, side="right")), len(self._shards)):
            shard, end = self._shards[number], int(self._ends[number])
            begin = end - len(shard)
            if begin >= stop:
                return
            first, last = max(start, begin), min(stop, end)
            _copy(shard[first - begin : last - begin], rows_ND[first - start : last - start])

    def take(self, ids_N: NDArray[np.int64]) -> Floats:
        """Return the rows of any ids, in the order of the ids, float32 [N, D].

        :raises IndexError: an id below 0 (a search's "absent" is -1) or beyond the last.
        """
        if len(ids_N) and not (0 <= ids_N.min() and ids_N.max() < len(self)):
            raise IndexError(f"ids {ids_N.min()} to {ids_N.max()} of {len(self)} keys")
        if self._live is not None:
            ids_N = self._live.stored(ids_N)
        rows_ND = np.empty((len(ids_N), self.dim), np.float32)
        for start in range(0, len(ids_N), TAKE_ROWS):
            part = slice(start, start + TAKE_ROWS)
            _copy(self._gather(ids_N[part]), rows_ND[part])
        return self._finish(rows_ND)

    def release(self) -> None:
        """Take the keys' pages out of this process's memory, until they are read again: layers are used one by one."""
        for shard in self._shards:
            release(shard)

    def _gather(self, ids_N: NDArray[np.int64]) -> NDArray[Any]:
        """The rows as stored: gathered in half precision, so that conversion to float32 runs once and in order."""
        first, last = map(int, np.searchsorted(self._ends, [ids_N.min(), ids_N.max()], side="right"))
        if first == last:
            shard = self._shards[first]
            rows_ND: NDArray[Any] = np.take(shard, ids_N - (int(self._ends[first]) - len(shard)), axis=0)
            return rows_ND
        shard_N = np.searchsorted(self._ends, ids_N, side="right")
        starts = self._ends - np.array([len(shard) for shard in self._shards])
        return self._memory.take(shard_N, ids_N - starts[shard_N])

    @cached_property
    def _memory(self) -> _Memory:
        return _Memory(self._shards)

    def _finish(self, rows_ND: Floats) -> Floats:
        if self._scale != 1:
            rows_ND *= self._scale
        if self.metric == "cosine":
            rows_ND += self.centre
            _normalise(rows_ND)
        return rows_ND


class _Memory:
    """Rows of several arrays, copied each from its address, as if all memory were one array.

    To pick the rows of each array apart took four times as long with 8 arrays, and seven times with 64.
    """

    def __init__(self, shards: Sequence[NDArray[Any]]) -> None:
        self._shards, self._kind = shards, shards[0].dtype  # they stay mapped
        self._width = shards[0].shape[1]
        addresses = np.array([shard.ctypes.data if len(shard) else 0 for shard in shards])
        first = int(addresses[addresses > 0].min())
        last = max(int(at) + shard.nbytes for at, shard in zip(addresses, shards, strict=True))
        row = np.dtype((np.void, self._width * self._kind.itemsize))
        memory = (ctypes.c_uint8 * (last - first)).from_address(first)
        count = (last - first - row.itemsize) // self._kind.itemsize + 1
        # A row begins at any number, and the next row at the next number: only those of the arrays are ever read.
        one = np.frombuffer(memoryview(memory), row, 1)
        self._rows = as_strided(one, (count,), (self._kind.itemsize,), writeable=False)
        self._begins = (addresses - first) // self._kind.itemsize

    def take(self, shard_N: NDArray[np.int64], row_N: NDArray[np.int64]) -> NDArray[Any]:
        """Rows, by their array and their number in it."""
        rows_N = self._rows[self._begins[shard_N] + row_N * self._width]
        rows_ND: NDArray[Any] = rows_N.view(self._kind).reshape(-1, self._width)
        return rows_ND


def _copy(stored_ND: NDArray[Any], rows_ND: Floats) -> None:
    """Convert stored rows to float32, in blocks that stay in cache."""
    if stored_ND.dtype != np.float16:
        rows_ND[:] = stored_ND
        return
    size = max(1, BLOCK // rows_ND.shape[1])
    for start in range(0, len(rows_ND), size):
        to_float32(stored_ND[start : start + size], rows_ND[start : start + size])


def _checked(metric: str) -> str:
    if metric not in METRICS:
        raise InputError(f"the metric is {metric!r}, but must be one of {', '.join(METRICS)}")
    return metric


def _normalise(rows_ND: Floats) -> None:
    """Scale rows to unit length, in place; zero rows stay."""
    norms_N = np.sqrt(np.einsum("nd,nd->n", rows_ND, rows_ND))
    rows_ND /= np.maximum(norms_N, np.finfo(np.float32).tiny)[:, None]

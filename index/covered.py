"""An index over keys that have changed since: what was removed is passed over, what came later is compared exactly.

Legend: N keys, M keys that the index was built over, Q queries, C candidates, D dimension, R runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.approximate import ApproximateIndex
from index.base import VectorIndex
from index.exact import ExactIndex
from index.metric import Metric
from index.source import VectorSource

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class Cover:
    """Which keys of an index are which rows of its source now."""

    def __init__(self, runs_R3: Ids, indexed: int) -> None:
        """:param runs_R3: first id in the index, first row of the source, number of keys; [R, 3], ascending.

        :param indexed: M, keys in the index; those in no run were removed.
        """
        self._runs_R3, self.indexed = runs_R3.reshape(-1, 3), indexed

    @property
    def removed(self) -> int:
        """Keys of the index that are no rows of the source any more."""
        return self.indexed - int(self._runs_R3[:, 2].sum())

    def rows(self, ids_QC: Ids) -> Ids:
        """Return the rows of ids in the index; -1 for removed ones, and for -1."""
        if not len(self._runs_R3):
            return np.full_like(ids_QC, -1)
        run_QC = np.maximum(np.searchsorted(self._runs_R3[:, 0], ids_QC, side="right") - 1, 0)
        first_QC, row_QC, count_QC = (self._runs_R3[:, column][run_QC] for column in range(3))
        inside_QC = (ids_QC >= first_QC) & (ids_QC < first_QC + count_QC)
        return np.where(inside_QC, ids_QC - first_QC + row_QC, -1)

    def lacking(self, count: int) -> Ids:
        """Return the runs of the source's rows that are not in the index: first, and after the last, [R, 2]."""
        starts, ends = self._runs_R3[:, 1], self._runs_R3[:, 1] + self._runs_R3[:, 2]
        edges = [0, *(edge for run in zip(starts.tolist(), ends.tolist(), strict=True) for edge in run), count]
        return np.array([run for run in list(pairwise(edges))[::2] if run[0] < run[1]], np.int64).reshape(-1, 2)


class RunsSource:
    """Runs of another source's rows, as a source."""

    def __init__(self, source: VectorSource, runs_R2: Ids) -> None:
        self._source, self._runs_R2 = source, runs_R2
        self._ends_R = np.cumsum(runs_R2[:, 1] - runs_R2[:, 0])

    @property
    def dim(self) -> int:
        """D."""
        return self._source.dim

    def __len__(self) -> int:
        return int(self._ends_R[-1]) if len(self._ends_R) else 0

    def rows(self, ids_N: Ids) -> Ids:
        """Return the rows in the other source; -1 for -1."""
        shift_R = self._runs_R2[:, 1] - self._ends_R
        run_N = np.minimum(np.searchsorted(self._ends_R, ids_N, side="right"), len(shift_R) - 1)
        return np.where(ids_N >= 0, ids_N + shift_R[run_N], -1)

    def read(self, start: int, stop: int) -> Floats:
        """Rows start to stop, float32, C-contiguous."""
        begin_R = self._ends_R - (self._runs_R2[:, 1] - self._runs_R2[:, 0])
        found = [np.empty((0, self.dim), np.float32)]
        for (first, _), begin, end in zip(self._runs_R2.tolist(), begin_R.tolist(), self._ends_R.tolist(), strict=True):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                found.append(self._source.read(first + low - begin, first + high - begin))
        return found[1] if len(found) == 2 else np.concatenate(found)

    def take(self, ids_N: Ids) -> Floats:
        """The rows of any ids, in the order of the ids."""
        return self._source.take(self.rows(ids_N))


class CoveredIndex(VectorIndex):
    """An index as it was built, with its keys' present rows."""

    def __init__(self, source: VectorSource, metric: Metric, built: ApproximateIndex, cover: Cover) -> None:
        super().__init__(source, metric)
        self.built, self.cover = built, cover
        self.later = RunsSource(source, cover.lacking(len(source)))
        """The rows that are compared exactly, because the index does not have them."""
        self._exact = ExactIndex(self.later, metric)

    @property
    def spec(self) -> str:
        """The FAISS factory string."""
        return self.built.spec

    @property
    def indexed(self) -> int:
        """Keys that FAISS has, removed ones too."""
        return self.built.indexed

    @property
    def size_bytes(self) -> int:
        """Bytes of the FAISS index."""
        return self.built.size_bytes

    @property
    def parameters(self) -> Mapping[str, float]:
        """`nprobe` or `efSearch`, and `overfetch`."""
        return self.built.parameters

    def save(self, folder: Path) -> tuple[str, ...]:
        """Write the index as it was built."""
        return self.built.save(folder)

    def _candidates_for(self, k: int) -> int:
        return self.built._candidates_for(k)

    def _propose(self, queries_QD: Floats, count: int) -> Ids:
        ids_QC = self._live(queries_QD, count)
        if not len(self.later):
            return ids_QC
        self._exact.work_bytes = self.work_bytes
        later_QC = self.later.rows(self._exact._propose(queries_QD, min(count, len(self.later))))
        return np.concatenate([ids_QC, later_QC], axis=1)

    def _live(self, queries_QD: Floats, count: int) -> Ids:
        """Rows of about the nearest keys that are not removed, as many as wanted wherever the index finds them.

        FAISS is asked for more until there are enough: its own masks are refused by some kinds of index.
        """
        wanted = min(count, self.cover.indexed - self.cover.removed)
        asked = min(self.cover.indexed, wanted + wanted * self.cover.removed // max(1, self.cover.indexed) + 1)
        while True:
            ids_QC = self.built._propose(queries_QD, asked)
            rows_QC = self.cover.rows(ids_QC)
            short_Q = ((rows_QC >= 0).sum(axis=1) < wanted) & (ids_QC >= 0).all(axis=1)
            if asked >= self.cover.indexed or not short_Q.any():
                return rows_QC
            asked = min(self.cover.indexed, 2 * asked)

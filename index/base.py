"""The base of all indexes: a subclass proposes candidates, which are re-ranked by exact distances.

Legend: Q queries, K neighbours, C candidates, D dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.errors import DimensionMismatch, InvalidQuery
from index.metric import Metric
from index.neighbors import Neighbors, absent, stack
from index.rerank import rerank
from index.source import VectorSource

# Candidates beyond the k wanted, against swaps by rounding at the k-th: this many, or a 16th of k.
MARGIN = 16
# Bytes that a search may take by default. A quarter of them holds candidates, with ids, distances and merging buffers
# about 48 bytes each, and about as much the pairs for exact distances; a sixteenth holds a block of keys.
WORK_BYTES = 2 << 30
CANDIDATE_BYTES = 48
# Queries searched together, however little memory there is.
LEAST_QUERIES = 16


class VectorIndex(ABC):
    """Search for the nearest keys of a source. Distances are exact: float32, from the source's keys."""

    def __init__(self, source: VectorSource, metric: Metric) -> None:
        self.source, self.metric = source, Metric(metric)
        self.work_bytes = WORK_BYTES
        """Memory that a search may take, besides the index. With less, fewer queries are searched together."""

    @property
    def dim(self) -> int:
        """D."""
        return self.source.dim

    def __len__(self) -> int:
        return len(self.source)

    @property
    @abstractmethod
    def spec(self) -> str:
        """`exact` or a FAISS factory string."""

    @property
    def size_bytes(self) -> int:
        """Bytes that the index takes beyond the keys themselves."""
        return 0

    @property
    def indexed(self) -> int:
        """Keys that the index itself has."""
        return len(self)

    @property
    def parameters(self) -> Mapping[str, float]:
        """The tuned parameters: `nprobe` or `efSearch`, and `overfetch`; empty for exact search."""
        return {}

    def search(self, queries_QD: NDArray[np.float32], k: int) -> Neighbors:
        """Return the k nearest keys of each query, nearest first; absent ones (-1, +inf) if there are fewer than k.

        :param queries_QD: [Q, D]; Q may be 0.
        :raises DimensionMismatch: queries of another shape.
        :raises InvalidQuery: k below 1; NaN or infinity in a query.
        """
        queries_QD = _checked(queries_QD, self.dim, k)
        if not len(queries_QD) or not len(self):
            return absent(len(queries_QD), k)
        count = min(len(self), self._candidates_for(k))
        rows = max(LEAST_QUERIES, self.work_bytes // (4 * CANDIDATE_BYTES * count))
        parts = [queries_QD[start : start + rows] for start in range(0, len(queries_QD), rows)]
        return stack([rerank(part, self._propose(part, count), self.source, self.metric, k) for part in parts])

    def save(self, folder: Path) -> tuple[str, ...]:
        """Write the index's own files into an existing folder and return their names; `index.storage` adds the rest."""
        return ()

    def _candidates_for(self, k: int) -> int:
        """C, the number of candidates for k neighbours."""
        return k + max(MARGIN, k // 16)

    @abstractmethod
    def _propose(self, queries_QD: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        """Return ids [Q, C] of about the `count` nearest keys, in any order; -1 for none."""


def _checked(queries_QD: NDArray[np.float32], dim: int, k: int) -> NDArray[np.float32]:
    queries_QD = np.ascontiguousarray(queries_QD, np.float32)
    if queries_QD.ndim != 2 or queries_QD.shape[1] != dim:
        raise DimensionMismatch(f"queries have the shape {queries_QD.shape}, but must be [queries, {dim}]")
    if k < 1:
        raise InvalidQuery(f"k is {k}, but must be at least 1")
    finite_Q = np.isfinite(queries_QD).all(axis=1)
    if not finite_Q.all():
        raise InvalidQuery(f"query {int(np.argmin(finite_Q))} holds NaN or infinity; mend or leave out such vectors")
    return queries_QD

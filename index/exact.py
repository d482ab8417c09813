"""Exact search by brute force: blocks of keys against all queries, then exact distances of what they brought.

Legend: N keys, Q queries, C candidates, D dimension.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from index.base import VectorIndex
from index.faiss_index import scan_block
from index.neighbors import nearest
from index.rerank import exact_distances as exact_distances
from index.source import BLOCK_BYTES, blocks, centre_of, centred_queries, rows_in

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class ExactIndex(VectorIndex):
    """Looks at every key. Nothing is built; the keys stay where they are, a block of them is in memory at a time."""

    @property
    def spec(self) -> str:
        """`exact`."""
        return "exact"

    @cached_property
    def _centre_D(self) -> Floats:
        return centre_of(self.source)

    def _propose(self, queries_QD: Floats, count: int) -> Ids:
        """The scan is by centred vectors, whose small norms BLAS can bear (`index.source.centre_of`)."""
        centred_QD = centred_queries(queries_QD, self._centre_D, self.metric)
        distances_QC, ids_QC = np.empty((len(queries_QD), 0), np.float32), np.empty((len(queries_QD), 0), np.int64)
        for first, keys_ND in blocks(self.source, rows_in(BLOCK_BYTES, self.dim)):
            found = scan_block(centred_QD, keys_ND - self._centre_D, min(count, len(keys_ND)), self.metric)
            distances_QC, ids_QC = nearest(
                np.concatenate([distances_QC, found[0]], axis=1),
                np.concatenate([ids_QC, np.where(found[1] < 0, -1, found[1] + first)], axis=1),
                count,
            )
        return ids_QC

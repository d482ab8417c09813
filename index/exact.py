"""Exact search: blocks of keys against all queries, then exact distances of the candidates found.

A long search prunes: most keys are ruled out by a proved bound in 8-bit numbers (`index.pruning`). Where
that would not pay, every key is compared in full.

Legend: N keys, Q queries, C candidates, D dimension, M coordinates of a bound, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from index.base import VectorIndex
from index.faiss_index import pair_distances, thread_count
from index.int8 import Codes, Matches, is_fast
from index.neighbors import nearest
from index.pruning import (
    KEY_ROWS,
    QUERY_ROWS,
    SAMPLE_SHARE,
    Gathered,
    PruningPlan,
    directions,
    is_worth_a_plan,
    make_plan,
)
from index.rerank import exact_distances as exact_distances
from index.scan import scan_block
from index.source import BLOCK_BYTES, centre_of, centred_queries, rows_in, spread_ids
from index.threads import share_out
from index.torch_threads import one_thread

# Sampled keys from which the directions of variance come: this many for each dimension.
ROWS_PER_DIMENSION = 8

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class ExactIndex(VectorIndex):
    """Exact search over all keys. Nothing is built; keys stay in their source, and one block is in memory at a time."""

    @property
    def spec(self) -> str:
        """`exact`."""
        return "exact"

    @cached_property
    def _centre_D(self) -> Floats:
        return centre_of(self.source)

    @cached_property
    def _rotation_DD(self) -> Floats:
        return directions(self._sample(ROWS_PER_DIMENSION * self.dim))

    def _propose(self, queries_QD: Floats, count: int) -> Ids:
        """Uses centred vectors, whose small norms limit rounding errors in BLAS (`index.source.centre_of`)."""
        centred_QD = centred_queries(queries_QD, self._centre_D, self.metric)
        plan = self._plan(centred_QD, count)
        if plan is None:
            return self._scan(centred_QD, count)
        found = [
            self._prune(centred_QD[part], count, plan, plan.thresholds_Q[part]) for part in _parts(len(centred_QD))
        ]
        ids_QC = np.concatenate(found)
        if (short_Q := (ids_QC < 0).any(axis=1)).any():
            ids_QC[short_Q] = self._scan(centred_QD[short_Q], count)
        return ids_QC

    def _plan(self, centred_QD: Floats, count: int) -> PruningPlan | None:
        if not (is_worth_a_plan(len(self), len(centred_QD), self.dim) and is_fast()):
            return None
        sample_SD = self._sample(min(len(self) // SAMPLE_SHARE, self._rows))
        if not len(sample_SD):
            return None
        return make_plan(centred_QD, sample_SD, self._rotation_DD, self.metric, keys=len(self), count=count)

    @property
    def _rows(self) -> int:
        """Keys of a block."""
        return rows_in(min(BLOCK_BYTES, self.work_bytes // 16), self.dim)

    def _sample(self, rows: int) -> Floats:
        """Centred keys spread over the source, without those that hold NaN or infinity."""
        ids = spread_ids(len(self), max(1, min(len(self), rows)), np.random.default_rng(0))
        keys_SD: Floats = self.source.take(ids) - self._centre_D
        return keys_SD[np.isfinite(keys_SD).all(axis=1)]

    def _block(self, first: int, rows: int) -> Floats:
        """Centred keys from the first row on."""
        return self.source.read(first, min(first + rows, len(self))) - self._centre_D

    def _scan(self, centred_QD: Floats, count: int) -> Ids:
        """Candidates from a full comparison with every key."""
        distances_QC, ids_QC = np.empty((len(centred_QD), 0), np.float32), np.empty((len(centred_QD), 0), np.int64)
        for first in range(0, len(self), self._rows):
            keys_ND = self._block(first, self._rows)
            found = scan_block(centred_QD, keys_ND, min(count, len(keys_ND)), self.metric)
            distances_QC, ids_QC = nearest(
                np.concatenate([distances_QC, found[0]], axis=1),
                np.concatenate([ids_QC, np.where(found[1] < 0, -1, found[1] + first)], axis=1),
                count,
            )
        return ids_QC

    def _prune(self, centred_QD: Floats, count: int, plan: PruningPlan, thresholds_Q: Floats) -> Ids:
        """The nearest keys within each query's threshold; -1 where there are fewer than wanted."""
        bound, gathered = plan.bound, Gathered(thresholds_Q, count)
        numbers_QM, offsets_Q = bound.queries(centred_QD)
        queries = Codes(numbers_QM, bound.query_floors(offsets_Q, thresholds_Q))
        lock, threads = Lock(), thread_count()  # asked for before torch's number, which can be FAISS's, becomes one

        def work(starts: Iterator[int]) -> None:
            matches = Matches(queries, KEY_ROWS)
            for first in starts:
                keys_ND = self._block(first, KEY_ROWS)
                rows_P, keys_P = matches.pairs(bound.keys(keys_ND))
                distances_P = pair_distances(centred_QD, rows_P, keys_ND, keys_P, self.metric)
                near_P = distances_P <= gathered.thresholds_Q[rows_P]
                near = rows_P[near_P], distances_P[near_P], keys_P[near_P] + first
                with lock:
                    fallen = gathered.add(*near)
                    queries.floors_N[fallen] = bound.query_floors(offsets_Q[fallen], gathered.thresholds_Q[fallen])

        with one_thread():  # so that the steps after a product are spread over threads too
            share_out(range(0, len(self), KEY_ROWS), work, threads)
        return gathered.ids()


def _parts(queries: int) -> list[slice]:
    return [slice(start, start + QUERY_ROWS) for start in range(0, queries, QUERY_ROWS)]

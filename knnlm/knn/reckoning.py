"""Seconds that a search, its fit, scores and an index will take, before any of them is measured.

They are reckoned: work of the sizes at hand, in nanoseconds of one machine (2 cores, AVX-512), times what a small
search takes here over what it takes there.

Legend: N keys, Q queries, D dimension.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from index.exact import ExactIndex
from index.metric import Metric
from index.source import ArraySource

# A search of every key: for each pair of query and key, its product by dimension and its rank; for each neighbour, its
# exact distance by dimension and its place.
_DIMENSION_NS, _RANK_NS, _DISTANCE_NS, _NEIGHBOUR_NS = 0.008, 1.8, 0.09, 60.0
# For each query: k, λ and T of 1,188 settings on two parts, the gate, and the losses.
_FIT_NS = 90_000.0
# For each number of a layer's sampled vectors: effective rank, probe and intrinsic dimension.
_SCORE_NS = 20.0
# For each number of the keys: clusters, lists and codes of an index, and its tuning (110 for 10 million keys × 64, 200
# for 60,000 × 576).
_INDEX_NS = 180.0
SAMPLED = 8192
# The search that is timed.
_TRIAL_KEYS, _TRIAL_QUERIES, _TRIAL_DIM, _TRIAL_K = 8192, 256, 256, 512


@dataclass(frozen=True)
class Reckoning:
    """Seconds of work that is not measured yet."""

    slowness: float
    """Seconds here for a second there."""

    def searching(self, keys: int, queries: int, dim: int, k: int) -> float:
        """Seconds of one layer's exact search, and of fitting."""
        of_a_key, of_a_neighbour = _DIMENSION_NS * dim + _RANK_NS, _DISTANCE_NS * dim + _NEIGHBOUR_NS
        return self._seconds(queries * (keys * of_a_key + min(k, keys) * of_a_neighbour + _FIT_NS))

    def scoring(self, tokens: int, dim: int) -> float:
        """Seconds of one layer's scores on the sample."""
        return self._seconds(min(tokens, SAMPLED) * dim * _SCORE_NS)

    def indexing(self, keys: int, dim: int) -> float:
        """Seconds of building and tuning an index."""
        return self._seconds(keys * dim * _INDEX_NS)

    def _seconds(self, nanoseconds: float) -> float:
        return 1e-9 * nanoseconds * self.slowness


def reckon() -> Reckoning:
    """Time a small search, some hundredths of a second."""
    rng = np.random.default_rng(0)
    index = ExactIndex(ArraySource(rng.standard_normal((_TRIAL_KEYS, _TRIAL_DIM), np.float32)), Metric.L2)
    queries_QD, taken = rng.standard_normal((_TRIAL_QUERIES, _TRIAL_DIM), np.float32), []
    for _ in range(3):
        start = time.perf_counter()
        index.search(queries_QD, _TRIAL_K)
        taken.append(time.perf_counter() - start)
    there = Reckoning(1.0)
    fitted = there.searching(_TRIAL_KEYS, _TRIAL_QUERIES, _TRIAL_DIM, _TRIAL_K)
    return Reckoning(min(taken) / (fitted - 1e-9 * _FIT_NS * _TRIAL_QUERIES))

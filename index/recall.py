"""Quality of an index against exact search: recall@k, with ties as hits, and the error of distances.

Legend: Q queries, K neighbours, D dimension.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.base import WORK_BYTES, VectorIndex
from index.errors import TooFewKeys
from index.exact import ExactIndex
from index.manifest import Recall
from index.metric import Metric
from index.neighbors import Neighbors
from index.source import VectorSource, spread_ids

QUERIES = 256
# Distances within this share of the k-th are ties: about the rounding error of a float32 sum of D terms.
TIE = 1e-6


@dataclass(frozen=True)
class Trial:
    """Queries whose exact neighbours are known."""

    queries_QD: NDArray[np.float32]
    own_Q: NDArray[np.int64] | None
    """Row of each query among the keys, which it must not find; None: the queries are not keys."""
    exact: Neighbors

    @property
    def k(self) -> int:
        """Neighbours that are compared."""
        return int(self.exact.ids_QK.shape[1])


def measure_recall(
    index: VectorIndex,
    source: VectorSource,
    *,
    k: int,
    queries: int | NDArray[np.float32] = QUERIES,
    seed: int = 0,
) -> Recall:
    """Compare an index with exact search over the same source.

    :param k: number of neighbours, clipped to the number of other keys.
    :param queries: how many stored keys to sample (each without itself), or vectors [Q, D].
    :raises TooFewKeys: no key is left to be found.
    """
    # Other keys than those that tuning used with the same seed.
    rng = np.random.default_rng([seed, 1])
    return run_trial(
        index, make_trial(source, index.metric, k=k, queries=queries, rng=rng, work_bytes=index.work_bytes)
    )


def make_trial(
    source: VectorSource,
    metric: Metric,
    *,
    k: int,
    queries: int | NDArray[np.float32],
    rng: np.random.Generator,
    work_bytes: int = WORK_BYTES,
) -> Trial:
    """Return a trial, with exact neighbours of the queries.

    :param work_bytes: memory that the exact search may take.
    :raises TooFewKeys: no key is left to be found.
    """
    exact = ExactIndex(source, metric)
    exact.work_bytes = work_bytes
    if not isinstance(queries, int):
        return Trial(queries, None, exact.search(queries, _clipped(k, len(source))))
    k = _clipped(k, len(source) - 1)
    own_Q = spread_ids(len(source), min(max(1, queries), len(source)), rng)
    queries_QD = source.take(own_Q)
    return Trial(queries_QD, own_Q, exact.search(queries_QD, k + 1).without(own_Q, k))


def _clipped(k: int, others: int) -> int:
    if others < 1:
        raise TooFewKeys("recall needs at least one key other than the query itself; add keys")
    return min(k, others)


def run_trial(index: VectorIndex, trial: Trial) -> Recall:
    """Search with the index and compare with the trial's exact neighbours."""
    start = time.perf_counter()
    found = index.search(trial.queries_QD, trial.k + (trial.own_Q is not None))
    seconds = time.perf_counter() - start
    if trial.own_Q is not None:
        found = found.without(trial.own_Q, trial.k)
    queries = len(trial.queries_QD)
    return Recall(
        recall=_share_found(found, trial.exact),
        k=trial.k,
        queries=queries,
        max_distance_error=_distance_error(found, trial.exact),
        milliseconds_per_query=1000 * seconds / max(1, queries),
    )


def _share_found(found: Neighbors, exact: Neighbors) -> float:
    """Recall; a hit is no farther than the farthest exact neighbour."""
    there_QK = exact.ids_QK >= 0
    radius_Q = np.where(there_QK, exact.distances_QK, -np.inf).max(axis=1, initial=-np.inf).astype(np.float64)
    limit_Q = radius_Q + TIE * np.abs(radius_Q) + np.finfo(np.float32).tiny
    hits_QK = (found.distances_QK <= limit_Q[:, None]) & (found.ids_QK >= 0)
    return float(hits_QK.sum() / max(1, there_QK.sum()))


def _distance_error(found: Neighbors, exact: Neighbors) -> float:
    """The largest distance error, relative to the k-th distance: that of the nearest is 0 for duplicate keys."""
    both_QK = (found.ids_QK >= 0) & (exact.ids_QK >= 0)
    radius_Q = np.abs(np.where(exact.ids_QK >= 0, exact.distances_QK, 0)).max(axis=1, initial=0)
    both_QK &= radius_Q[:, None] > 0
    apart_QK = np.where(both_QK, found.distances_QK, 0) - np.where(both_QK, exact.distances_QK, 0)
    return float(np.max(apart_QK / np.where(radius_Q > 0, radius_Q, 1)[:, None], initial=0.0))

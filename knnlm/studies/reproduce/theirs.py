"""The search of neulab/knn-transformers (knnlm.py): distances of product-quantizer codes, and the same ids exactly.

Legend: N keys, Q queries, K neighbours, D dimension, T training points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.faiss_index import FaissIndex, create_index
from index.metric import Metric
from index.source import VectorSource
from knnlm.knn.mixing import Search, knn_log_probs, mix
from knnlm.knn.searcher import QUERY_BLOCK
from knnlm.progress import Advance, ignore
from knnlm.store.datastore import Datastore

Floats = NDArray[np.float32]
# FAISS's own seed of k-means, which that project leaves as it is.
KMEANS_SEED = 1234
# FAISS's distance of a neighbour that was not found.
ABSENT = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class TheirSettings:
    """The defaults of that project's run_clm.py."""

    k: int = 1024
    lam: float = 0.25
    temperature: float = 1.0
    lists: int = 4096
    code_bytes: int = 64
    probes: int = 32
    training_points: int = 1_000_000
    rows_at_a_time: int = 1_000_000


class RawKeys:
    """A layer's keys as that project stores them: raw vectors in float16. An `index.source.VectorSource`."""

    def __init__(self, store: Datastore, layer: str) -> None:
        self._keys = store.keys(layer)

    @property
    def dim(self) -> int:
        """D."""
        return self._keys.dim

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, start: int, stop: int) -> Floats:
        """Return rows start to stop, float32 [stop - start, D]."""
        return self._raw(self._keys.read(start, stop))

    def take(self, ids: NDArray[np.int64]) -> Floats:
        """Return the rows with these ids, float32 [len(ids), D]."""
        return self._raw(self._keys.take(ids))

    def _raw(self, centred_ND: Floats) -> Floats:
        return (centred_ND + self._keys.centre).astype(np.float16).astype(np.float32)


class TheirIndex(NamedTuple):
    """FAISS's index, and the keys that it indexes."""

    native: FaissIndex
    keys: VectorSource


def build_their_index(keys: VectorSource, settings: TheirSettings, advance: Advance = ignore) -> TheirIndex:
    """Build `IndexIVFPQ` over uncentred keys, trained on the same rows as theirs, with their number of probes.

    :raises index.errors.VectorIndexError: too few keys for the lists, or codes that do not divide the dimension.
    """
    spec, count = f"IVF{settings.lists},PQ{settings.code_bytes}", len(keys)
    native = create_index(spec, keys.dim, Metric.L2)
    # np.random.seed(1); np.random.choice(np.arange(N), size=[T], replace=False)
    rows_T = np.random.RandomState(1).choice(count, size=min(settings.training_points, count), replace=False)
    native.train(keys.take(rows_T), KMEANS_SEED)
    for start in range(0, count, settings.rows_at_a_time):
        native.add(keys.read(start, min(start + settings.rows_at_a_time, count)))
        native.end_run(None)
        advance(len(native), count)
    native.finish(None)
    native.set_effort("nprobe", settings.probes)
    return TheirIndex(native, keys)


class Losses(NamedTuple):
    """-log p of every target, [Q]."""

    by_codes_Q: NDArray[np.float64]
    exact_Q: NDArray[np.float64]


def their_losses(
    index: TheirIndex,
    values_N: NDArray[np.int32],
    vectors_QD: Floats,
    targets_Q: NDArray[np.int32],
    lm_Q: NDArray[np.float64],
    settings: TheirSettings,
    advance: Advance = ignore,
) -> Losses:
    """Return the mixture's losses with the distances of the codes, and with exact distances of the same neighbours.

    :param lm_Q: the plain LM's log-probability of each target.
    """
    parts = []
    for start in range(0, len(targets_Q), QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        searches = _searches(index, values_N, vectors_QD[rows], targets_Q[rows], settings.k)
        parts.append([_losses(one, lm_Q[rows], settings) for one in searches])
        advance(min(rows.stop, len(targets_Q)), len(targets_Q))
    return Losses(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _searches(
    index: TheirIndex, values_N: NDArray[np.int32], queries_QD: Floats, targets_Q: NDArray[np.int32], k: int
) -> Iterator[Search]:
    distances_QK, ids_QK = index.native.search(queries_QD, k)
    yield _search(np.where(distances_QK >= ABSENT, np.inf, distances_QK), ids_QK, values_N, targets_Q)
    exact_QK = _exact_distances(index.keys, queries_QD, ids_QK)
    order_QK = np.argsort(exact_QK, axis=1)
    sorted_QK, ids_QK = np.take_along_axis(exact_QK, order_QK, 1), np.take_along_axis(ids_QK, order_QK, 1)
    yield _search(sorted_QK, ids_QK, values_N, targets_Q)


def _exact_distances(keys: VectorSource, queries_QD: Floats, ids_QK: NDArray[np.int64]) -> Floats:
    """Squared L2 of each query and the keys that were found for it; infinite where there is none."""
    distances_QK = np.full(ids_QK.shape, np.inf, np.float32)
    for query_D, ids_K, distances_K in zip(queries_QD, ids_QK, distances_QK, strict=True):
        there = ids_K >= 0
        distances_K[there] = np.sum((keys.take(ids_K[there]) - query_D) ** 2, axis=1)
    return distances_QK


def _search(
    distances_QK: Floats, ids_QK: NDArray[np.int64], values_N: NDArray[np.int32], targets_Q: NDArray[np.int32]
) -> Search:
    hits_QK = (values_N[ids_QK] == targets_Q[:, None]) & (ids_QK >= 0)
    return Search(distances_QK, hits_QK)


def _losses(search: Search, lm_Q: NDArray[np.float64], settings: TheirSettings) -> NDArray[np.float64]:
    return -mix(lm_Q, knn_log_probs(search, settings.k, settings.temperature), settings.lam)

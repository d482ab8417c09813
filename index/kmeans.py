"""K-means of key vectors (Lloyd 1982): the lists of an inverted file, and clusters of contexts.

FAISS's own takes four to five times as long here, as all of it is a product that torch computes faster.

Legend: N vectors, C clusters, F clusters that are found in a block, D dimension.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from index.metric import Metric
from index.scan import scan_block
from index.source import rows_in

# Rounds that FAISS gives the lists of an inverted file.
ROUNDS = 10
# Of two halves of a cluster, how far the means are apart, as in FAISS: enough for the next round to tell them apart.
_APART = 1 / 1024
# Bytes of vectors summed at a time: of these there is a copy, sorted by cluster.
_SUMMED_BYTES = 1 << 25

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def cluster_means(
    vectors_ND: Floats, clusters: int, metric: Metric = Metric.L2, *, seed: int, rounds: int = ROUNDS
) -> Floats:
    """Return the means [C, D] of clusters; under inner products they are unit vectors (spherical k-means).

    It begins with vectors drawn at random. A cluster that loses all of its vectors takes half of the largest one.

    :param clusters: at most N.
    """
    drawn_C = np.random.default_rng(seed).permutation(len(vectors_ND))[:clusters]
    means_CD = _directed(vectors_ND[drawn_C], metric)
    for _ in range(rounds):
        sums_CD, counts_C = _sums(vectors_ND, nearest_means(vectors_ND, means_CD, metric), clusters)
        means_CD = sums_CD / np.maximum(counts_C, 1).astype(np.float32)[:, None]
        means_CD = _directed(_split_empty(means_CD, counts_C), metric)
    return means_CD


def nearest_means(vectors_ND: Floats, means_CD: Floats, metric: Metric = Metric.L2) -> Ids:
    """Return the cluster of each vector, int64 [N]."""
    return scan_block(vectors_ND, means_CD, 1, metric)[1][:, 0]


def _sums(vectors_ND: Floats, cluster_N: Ids, clusters: int) -> tuple[Floats, Ids]:
    """Sums [C, D] and number [C] of each cluster's vectors, always in the same order."""
    sums_CD = np.zeros((clusters, vectors_ND.shape[1]), np.float32)
    rows = rows_in(_SUMMED_BYTES, vectors_ND.shape[1])
    for start in range(0, len(vectors_ND), rows):
        block_N = cluster_N[start : start + rows]
        order_N = np.argsort(block_N, kind="stable")
        found_F, starts_F = np.unique(block_N[order_N], return_index=True)
        sums_CD[found_F] += np.add.reduceat(vectors_ND[start : start + rows][order_N], starts_F, axis=0)
    return sums_CD, np.bincount(cluster_N, minlength=clusters)


def _split_empty(means_CD: Floats, counts_C: Ids) -> Floats:
    """Give each empty cluster half of the one that is the largest then, in place."""
    counts_C = counts_C.copy()
    for empty in np.flatnonzero(counts_C == 0):
        largest = int(counts_C.argmax())
        shift_D = np.where(np.arange(means_CD.shape[1]) % 2, -_APART, _APART)
        means_CD[empty] = means_CD[largest] * (1 + shift_D)
        means_CD[largest] *= 1 - shift_D
        counts_C[empty] = counts_C[largest] // 2
        counts_C[largest] -= counts_C[empty]
    return means_CD


def _directed(means_CD: Floats, metric: Metric) -> Floats:
    if metric is Metric.L2:
        return np.ascontiguousarray(means_CD, np.float32)
    lengths_C1 = np.linalg.norm(means_CD, axis=1, keepdims=True)
    return np.ascontiguousarray(means_CD / np.maximum(lengths_C1, np.finfo(np.float32).tiny), np.float32)

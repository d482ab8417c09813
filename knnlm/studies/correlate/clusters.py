"""Clusters of contexts, and mean cosine distances within and between them.

Semantic clusters are contexts followed by the same n tokens (arXiv 2506.24106: n = 10, 100 contexts in a cluster); the
other kind is k-means clusters of unit vectors. With the mean u of a cluster's n unit vectors, the mean cosine distance
within it is exactly n / (n - 1) · (1 - |u|²), and between clusters A and B it is 1 - u_A · u_B.

Legend: S segments, T tokens of a segment, P contexts, C clusters, D dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from index.kmeans import cluster_means, nearest_means
from index.metric import Metric
from knnlm.errors import InputError
from knnlm.scores.dispersion import from_sum, unit_rows

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

# Rounds of k-means, as FAISS takes by default.
_ROUNDS = 25


@dataclass(frozen=True)
class ClusterDistances:
    """Mean cosine distances at one layer; all clusters, and all pairs of clusters, have equal weight."""

    within: float
    between: float
    clusters: int
    contexts: int


@dataclass(frozen=True, eq=False)
class Contexts:
    """Positions in segments, in text order, and the cluster of each, from 0."""

    segment_P: Int64
    position_P: Int64
    cluster_P: Int64


def shared_continuations(tokens_ST: NDArray[np.int32], n: int, size: int) -> Contexts:
    """Return contexts that share their next `n` tokens with at least `size - 1` others; each such n-gram is a cluster.

    A context is a position whose next n tokens lie in its segment. The n-grams may overlap: a repeated passage of 12
    tokens gives three clusters for n = 10.
    :raises InputError: fewer than two clusters; the message suggests settings that give some.
    """
    if not 0 < n < tokens_ST.shape[1]:
        raise InputError(f"`ngram` is {n}, but must be from 1 to {tokens_ST.shape[1] - 1}, inside a segment")
    if size < 2:
        raise InputError(f"`cluster_size` is {size}, but a distance within a cluster needs at least 2 contexts")
    width, vocabulary = tokens_ST.shape[1], int(tokens_ST.max()) + 1
    tokens = tokens_ST.reshape(-1)
    place_P = np.arange(tokens.size).reshape(-1, width)[:, :-n].reshape(-1)
    cluster_P = np.zeros(len(place_P), np.int64)
    # An n-gram is at least as frequent as a longer one that begins with it: most positions drop out after a few tokens.
    for step in range(1, n + 1):
        pairs = cluster_P * vocabulary + tokens[place_P + step]
        _, cluster_P, counts_C = np.unique(pairs, return_inverse=True, return_counts=True)
        if (counts_C >= size).sum() < 2:
            raise _no_clusters(n, size, step, counts_C)
        kept_P = counts_C[cluster_P] >= size
        place_P, cluster_P = place_P[kept_P], cluster_P[kept_P]
    cluster_P = np.unique(cluster_P, return_inverse=True)[1]
    return Contexts(place_P // width, place_P % width, cluster_P)


def _no_clusters(n: int, size: int, step: int, counts_C: Int64) -> InputError:
    """Return the error; `counts_C` are the counts of `step`-grams, of which fewer than two are frequent enough."""
    second = int(np.sort(counts_C)[-2]) if len(counts_C) > 1 else 0
    if step > 1:
        remedy = f"`ngram={step - 1}`, a smaller `cluster_size`, or "
    elif second > 1:
        remedy = f"`ngram=1` and a `cluster_size` of at most {second}, or "
    else:
        remedy = ""
    return InputError(f"the text has no two {n}-grams that follow {size} contexts or more each; take {remedy}more text")


class ContextSums:
    """Sums of unit vectors for each cluster and layer; pass `add` to `measure_segments` as `look`."""

    def __init__(self, contexts: Contexts, dims: Mapping[str, int]) -> None:
        self._contexts = contexts
        self._counts_C = np.bincount(contexts.cluster_P)
        self._sums = {layer: np.zeros((len(self._counts_C), dim)) for layer, dim in dims.items()}

    def add(self, layer: str, vectors_BTD: Tensor, first: int) -> None:
        """Add the contexts in segments `first` to `first + B - 1`."""
        begin, end = np.searchsorted(self._contexts.segment_P, [first, first + len(vectors_BTD)])
        rows_P, positions_P = self._contexts.segment_P[begin:end] - first, self._contexts.position_P[begin:end]
        units_PD = unit_rows(vectors_BTD[rows_P, positions_P])
        np.add.at(self._sums[layer], self._contexts.cluster_P[begin:end], units_PD)

    def distances(self, layer: str) -> ClusterDistances:
        """Distances within and between clusters, after all segments were added."""
        return distances_from_sums(self._sums[layer], self._counts_C)


def kmeans_distances(units_SD: NDArray[np.float32], size: int, *, seed: int) -> ClusterDistances:
    """Distances for k-means clusters of unit vectors, with `size` in each on average; singletons are left out.

    :raises InputError: too few vectors for two clusters.
    """
    count = check_kmeans(len(units_SD), size)
    units_SD = np.ascontiguousarray(units_SD)
    means_CD = cluster_means(units_SD, count, Metric.IP, seed=seed, rounds=_ROUNDS)
    cluster_S = nearest_means(units_SD, means_CD, Metric.IP)
    sums_CD = np.zeros((count, units_SD.shape[1]))
    np.add.at(sums_CD, cluster_S, units_SD)
    return distances_from_sums(sums_CD, np.bincount(cluster_S, minlength=count))


def check_kmeans(contexts: int, size: int) -> int:
    """Return the number of clusters of about `size` contexts.

    :raises InputError: there would be fewer than two.
    """
    if contexts < 2 * size:
        raise InputError(
            f"{contexts} contexts make {contexts // size} cluster(s) of {size}, but distances between clusters need 2; "
            "take a smaller `cluster_size`, or more text"
        )
    return contexts // size


def distances_from_sums(sums_CD: Float64, counts_C: Int64) -> ClusterDistances:
    """Distances from each cluster's sum of unit vectors; NaN for fewer than two clusters of at least two vectors."""
    kept_C = counts_C >= 2
    sums_CD, counts_C = sums_CD[kept_C], counts_C[kept_C]
    means_CD, clusters = sums_CD / counts_C[:, None], len(counts_C)
    total_D = means_CD.sum(axis=0)
    pairs = clusters * (clusters - 1)
    products = float(total_D @ total_D - (means_CD**2).sum())
    return ClusterDistances(
        within=float(from_sum(sums_CD, counts_C).mean()) if clusters else float("nan"),
        between=1 - products / pairs if pairs else float("nan"),
        clusters=clusters,
        contexts=int(counts_C.sum()),
    )

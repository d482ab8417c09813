"""The nearest sampled keys of a layer from other clusters of text: the retrieval probe counts them, the pilot weighs
them.

Legend: M sampled vectors, D dimension, Q queries, K neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from index.neighbors import least, ordered
from knnlm.errors import InputError
from knnlm.scores.sample import Float32, Int64, Sample

# Sampled tokens that serve as queries, and the neighbours of each.
QUERIES = 1024
NEIGHBORS = 128
# Queries searched at a time: 8 MB of distances to 8,192 keys.
_BLOCK = 256
_SMALL, _LARGE = 1e-12, 1e12


@dataclass(frozen=True, eq=False)
class SampleSearch:
    """Neighbours of some sampled vectors among all others that are not of their cluster."""

    distances_QK: Float32
    """Squared L2, ascending; +inf where there are fewer than K others. Up to a constant factor for vectors whose
    largest number is below 1e-12 or above 1e12."""
    hits_QK: NDArray[np.bool_]
    """Does the neighbour have the query's next token?"""
    rows_Q: Int64
    """Place of each query in the sample; queries are in the order of their clusters."""
    cluster_Q: Int64


def query_rows(cluster_M: Int64, *, queries: int = QUERIES, seed: int) -> Int64:
    """Return which sampled vectors are queries, drawn at random: the same for all layers of a sample."""
    drawn_Q = np.random.default_rng(seed).permutation(len(cluster_M))[:queries]
    return drawn_Q[np.argsort(cluster_M[drawn_Q], kind="stable")]


def search_sample(sample: Sample, *, neighbors: int = NEIGHBORS, queries: int = QUERIES, seed: int = 0) -> SampleSearch:
    """Search all keys of other clusters exactly, in float32.

    :raises InputError: fewer than two vectors, a row that is not finite, or numbers below 1.
    """
    if neighbors < 1 or queries < 1:
        raise InputError(f"a sample is searched for at least 1 neighbor of 1 query, got {neighbors} and {queries}")
    rows_Q = query_rows(sample.cluster_M, queries=queries, seed=seed)
    # Random order: layers near the embedding have many identical keys, and ties must not favour early text.
    order_M = np.random.default_rng((seed, 1)).permutation(len(sample.cluster_M))
    keys_MD, query_QD = _centred(sample.vectors_MD, order_M, rows_Q)
    cluster_Q, token_M, token_Q = sample.cluster_M[rows_Q], sample.next_token_M[order_M], sample.next_token_M[rows_Q]
    own_keys = _by_cluster(sample.cluster_M[order_M])
    half_M, most = torch.linalg.vecdot(keys_MD, keys_MD) / 2, min(neighbors, len(keys_MD) - 1)
    buffer_QM = torch.empty(min(_BLOCK, len(rows_Q)), len(keys_MD))
    distances, hits = [], []
    for start in range(0, len(rows_Q), _BLOCK):
        block = slice(start, start + _BLOCK)
        near_QD = query_QD[block]
        half_QM = torch.addmm(half_M, near_QD, keys_MD.T, alpha=-1, out=buffer_QM[: len(near_QD)]).numpy()
        for cluster in np.unique(cluster_Q[block]):
            half_QM[np.ix_(cluster_Q[block] == cluster, own_keys[cluster])] = np.inf
        columns_QK, half_QK = least(half_QM, most)
        found = ordered(half_QK, columns_QK, most)
        norm_Q = torch.linalg.vecdot(near_QD, near_QD).numpy()
        distances.append(np.maximum(2 * found.distances_QK + norm_Q[:, None], 0))
        hits.append((token_M[found.ids_QK] == token_Q[block, None]) & (found.ids_QK >= 0))
    return SampleSearch(np.concatenate(distances), np.concatenate(hits), rows_Q, cluster_Q)


def _by_cluster(cluster_M: Int64) -> dict[int, Int64]:
    """Places of each cluster's vectors."""
    clusters, starts = np.unique(np.sort(cluster_M), return_index=True)
    places = np.split(np.argsort(cluster_M, kind="stable"), starts[1:])
    return dict(zip(clusters.tolist(), places, strict=True))


def _centred(vectors_MD: NDArray[np.floating], order_M: Int64, rows_Q: Int64) -> tuple[Tensor, Tensor]:
    """Keys in the given order and queries, float32, minus the mean: the same distances, with smaller rounding errors.

    :raises InputError: fewer than two vectors, or a row that is not finite.
    """
    if np.ndim(vectors_MD) != 2 or len(vectors_MD) < 2:
        raise InputError(f"a score needs at least 2 vectors as [M, D], got shape {list(np.shape(vectors_MD))}")
    keys_MD = torch.from_numpy(np.asarray(vectors_MD))[torch.from_numpy(order_M)]
    keys_MD = keys_MD.float() if keys_MD.dtype == torch.float16 else keys_MD
    keys_MD -= keys_MD.mean(0)
    largest = float(keys_MD.abs().max())
    if 0 < largest < _SMALL or _LARGE < largest < math.inf:
        keys_MD /= largest  # squares would leave float32
    if not math.isfinite(largest):
        raise InputError(f"row {int(np.isfinite(vectors_MD).all(axis=1).argmin())} of the sample is not finite")
    place_M = torch.from_numpy(np.argsort(order_M))
    return keys_MD.float(), keys_MD[place_M[torch.from_numpy(rows_Q)]].float()

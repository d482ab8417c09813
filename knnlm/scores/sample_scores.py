"""Label-free scores of a layer from a sample of its vectors.

Legend: D dimension, M sampled vectors, Q queries, K neighbours, C clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from index.torch_threads import one_thread
from knnlm.errors import InputError
from knnlm.results import Interval
from knnlm.scores.dispersion import Float64, dispersion
from knnlm.scores.sample import Int64
from knnlm.scores.sample_search import SampleSearch
from knnlm.statistics import jackknife_interval

# Queries scanned at a time: 256 x 8192 float64 distances are 16 MB.
_QUERY_BLOCK = 256
# Up to this many eigenvalues, threads gain less on idle cores than they cost on busy ones.
_ONE_THREAD_SIZE = 1024


@dataclass(frozen=True)
class Probe:
    """The retrieval probe: share of neighbours with the query's next token, with its 95 % interval."""

    value: float
    interval: Interval


def standardized_dispersion(sample_MD: NDArray[np.floating]) -> float:
    """Return the dispersion after dividing each dimension by its standard deviation, so that none dominates.

    On such rogue dimensions: Timkey & van Schijndel 2021. The mean is kept: centred vectors always have a dispersion of
    about 1. Dimensions that are constant to float32 precision are left out; if all are, the vectors are identical and
    the dispersion is 0.

    :raises InputError: fewer than two vectors, or a row that is zero or not finite.
    """
    vectors_MD = _checked(sample_MD)
    deviation_D, varies_D = _deviation(vectors_MD)
    if not varies_D.any():
        return 0.0
    return dispersion(vectors_MD[:, varies_D] / deviation_D[varies_D])


def spectrum(sample_MD: NDArray[np.floating]) -> Float64:
    """Return the non-zero squared singular values of the centred sample, ascending; none if all vectors are identical.

    Eigenvalues of the smaller Gram matrix in float64: min(M, D)^3 operations.

    :raises InputError: fewer than two vectors, or a row that is not finite.
    """
    vectors_MD = _checked(sample_MD)
    centred_MD = _centred(vectors_MD)[:, _deviation(vectors_MD)[1]]
    if not centred_MD.size:
        return np.empty(0)
    matrix = torch.from_numpy(centred_MD.T if centred_MD.shape[0] < centred_MD.shape[1] else centred_MD)
    with one_thread() if matrix.shape[1] <= _ONE_THREAD_SIZE else nullcontext():
        power = torch.linalg.eigvalsh(matrix.T @ matrix).numpy()
    # Smaller eigenvalues are zeros with rounding errors.
    positive: Float64 = power[power > len(power) * np.finfo(np.float64).eps * power[-1]]
    return positive


def effective_rank(power: Float64) -> float:
    """Return exp of the entropy of the normalised singular values (Roy & Vetterli 2007): 1 to min(M, D).

    :param power: squared singular values from `spectrum`; none (identical vectors) give 0.
    """
    if not len(power):
        return 0.0
    share = np.sqrt(power) / np.sqrt(power).sum()
    return math.exp(-float((share * np.log(share)).sum()))


def participation_ratio(power: Float64) -> float:
    """Return (sum of the covariance's eigenvalues)^2 / sum of their squares: 1 to min(M, D); identical vectors give 0.

    The effective number of directions of variance (Gao et al. 2017); a single dominant dimension lowers it more than
    the effective rank.

    :param power: squared singular values from `spectrum`.
    """
    return float(power.sum() ** 2 / (power**2).sum()) if len(power) else 0.0


def intrinsic_dimension(sample_MD: NDArray[np.floating], *, queries: int = 1024, seed: int) -> float:
    """Return the TwoNN estimate (Facco et al. 2017), from the ratio of the second nearest distance to the nearest.

    If the density is locally constant, log(second / nearest) is exponential with the dimension as its rate; the rate is
    fitted through the origin to the lower 90 % of the ratios, as there. `queries` vectors are drawn at random, and
    their neighbours searched among all vectors. Vectors with an identical copy (nearest distance 0) are left out; NaN
    if none remains.

    :raises InputError: fewer than two vectors, or a row that is not finite.
    """
    order_M = np.random.default_rng(seed).permutation(len(sample_MD))
    keys_MD = _centred(_checked(sample_MD))[order_M]
    if len(keys_MD) < 3:
        return math.nan
    squared_Q2 = np.concatenate(list(_two_nearest(keys_MD, min(queries, len(keys_MD)))))
    # Distances below float64's rounding of the norms are those of copies.
    apart_Q2 = squared_Q2[squared_Q2[:, 0] > 1e-12 * np.vecdot(keys_MD, keys_MD).mean()]
    ratio = np.sort(np.log(apart_Q2[:, 1] / apart_Q2[:, 0]) / 2)[: int(0.9 * len(apart_Q2))]
    if not ratio.any():
        return math.nan
    rank = np.arange(1, len(ratio) + 1) / len(apart_Q2)
    return float(-(ratio @ np.log1p(-rank)) / (ratio @ ratio))


def retrieval_probe(search: SampleSearch, *, neighbors: int = 8) -> Probe:
    """Return the share of nearest keys (squared L2) from other clusters that have the query's next token.

    The interval is a jackknife over the queries' clusters, given the keys. A query without a key in another cluster
    does not count; without any such query the value is NaN and the interval (0, 1).

    :raises InputError: no neighbours are wanted.
    """
    if neighbors < 1:
        raise InputError(f"the probe needs at least 1 neighbor, got {neighbors}")
    found_QK = np.isfinite(search.distances_QK[:, :neighbors])
    counts_Q = found_QK.any(axis=1)
    rate_Q = search.hits_QK[counts_Q, :neighbors].sum(axis=1) / found_QK[counts_Q].sum(axis=1)
    cluster_Q = search.cluster_Q[counts_Q]
    return Probe(*_mean_over_clusters(rate_Q, cluster_Q))


def _half_distances(keys_MD: Float64, queries: int) -> Iterator[tuple[slice, Float64]]:
    """By blocks of the first `queries` keys: half the squared distance to every key, minus half the query's squared
    norm, which does not affect the order. The array [Q, M] is overwritten by the next block.
    """
    half_norm_M = np.vecdot(keys_MD, keys_MD) / 2
    buffer_QM = np.empty((min(_QUERY_BLOCK, queries), len(keys_MD)))
    for start in range(0, queries, _QUERY_BLOCK):
        block = slice(start, min(start + _QUERY_BLOCK, queries))
        distance_QM = buffer_QM[: block.stop - start]
        np.subtract(half_norm_M, np.matmul(keys_MD[block], keys_MD.T, out=distance_QM), out=distance_QM)
        yield block, distance_QM


def _nearest(distance_QM: Float64, count: int) -> Int64:
    """Indices of the `count` smallest of each row, unordered; three to five times as fast as np.argpartition."""
    found = torch.topk(torch.from_numpy(distance_QM), count, dim=1, largest=False, sorted=False).indices
    indices: Int64 = found.numpy()
    return indices


def _two_nearest(keys_MD: Float64, queries: int) -> Iterator[Float64]:
    """By blocks of queries, squared distances [Q, 2] to the two nearest others, ascending, by direct differences."""
    for block, distance_QM in _half_distances(keys_MD, queries):
        distance_QM[np.arange(len(distance_QM)), np.arange(block.start, block.stop)] = np.inf
        difference_Q2D = keys_MD[_nearest(distance_QM, 2)] - keys_MD[block, None]
        yield np.sort(np.vecdot(difference_Q2D, difference_Q2D), axis=1)


def _mean_over_clusters(value_Q: Float64, cluster_Q: Int64) -> tuple[float, Interval]:
    """Mean of shares with its interval by a jackknife over clusters; NaN and the interval (0, 1) without values."""
    if not len(value_Q):
        return math.nan, Interval(0.0, 1.0)
    _, cluster_Q = np.unique(cluster_Q, return_inverse=True)
    sum_C = np.bincount(cluster_Q, weights=value_Q)
    count_C = np.bincount(cluster_Q)
    total, count = float(sum_C.sum()), len(value_Q)
    with np.errstate(invalid="ignore"):
        without_C = (total - sum_C) / (count - count_C)
    mean = total / count
    return mean, jackknife_interval(mean, without_C, bounds=(0.0, 1.0), sizes_G=count_C)


def _checked(sample_MD: NDArray[np.floating]) -> Float64:
    """The sample in float64; not to be written to, as it may be the given array itself."""
    if np.ndim(sample_MD) != 2 or len(sample_MD) < 2:
        raise InputError(f"a score needs at least 2 vectors as [M, D], got shape {list(np.shape(sample_MD))}")
    finite_M = np.isfinite(sample_MD).all(axis=1)
    if not finite_M.all():
        raise InputError(f"row {int(finite_M.argmin())} of the sample is not finite")
    return np.asarray(sample_MD, dtype=np.float64)


def _centred(vectors_MD: Float64) -> Float64:
    """The sample minus its mean: the same distances, without the rounding errors of large norms."""
    centred_MD: Float64 = vectors_MD - vectors_MD.mean(axis=0)
    return centred_MD


def _deviation(vectors_MD: Float64) -> tuple[Float64, NDArray[np.bool_]]:
    """Each dimension's standard deviation, and whether it exceeds float32 rounding."""
    deviation_D: Float64 = vectors_MD.std(axis=0)
    return deviation_D, deviation_D > np.finfo(np.float32).eps * np.abs(vectors_MD).max(axis=0)

"""Label-free scores of a layer that need some of its vectors: a bounded uniform sample, the same tokens for all layers.

`SamplePlan` decides once per batch which new tokens enter the sample and which slot each takes; every layer's
`LayerSample` follows it. Each score is a function of (a part of) a `Sample`.

Legend: B batch rows, T positions of a row, D dimension, M sampled tokens, N new tokens, U tokens that enter, Q queries,
K neighbours, C clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from knnlm.dispersion import Float64, Span, dispersion, host_array, jackknife_interval, on_host, widened
from knnlm.errors import InputError
from knnlm.results import Interval

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

# Queries scanned at a time: 256 x 8192 float64 distances are 16 MB.
_QUERY_BLOCK = 256
# Up to this many eigenvalues, threads gain less on idle cores than they lose on busy ones.
_ONE_THREAD_SIZE = 1024

_EMPTY: Int64 = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Sample:
    """One layer's sampled vectors, float32 [M, D], the token that followed each, and the cluster of text of each."""

    vectors_MD: Float32
    next_token_M: Int64
    cluster_M: Int64


@dataclass(frozen=True)
class SampleUpdate:
    """Which vectors of a batch enter the sample: `vectors_BTD[row_U, position_U]` go to `slot_U`, each slot once."""

    row_U: Int64
    position_U: Int64
    slot_U: Int64


@dataclass(frozen=True)
class Probe:
    """The retrieval probe: the share of neighbours that have the query's next token, with its 95 % interval."""

    value: float
    interval: Interval
    queries: int
    """Queries that had a key in another cluster."""


class SamplePlan:
    """Reservoir sampling (Vitter 1985, algorithm R): each token seen so far is in the sample with the same probability.

    The sample depends on the seed and the order of tokens only, not on how they are cut into batches.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        if capacity < 1:
            raise InputError(f"a sample needs a capacity of at least 1, got {capacity}")
        self.capacity = capacity
        self.seen = 0
        self._random = np.random.default_rng(seed)
        self._next_token_M = np.zeros(capacity, dtype=np.int64)
        self._cluster_M = np.zeros(capacity, dtype=np.int64)

    @property
    def size(self) -> int:
        """M, the number of tokens in the sample now."""
        return min(self.seen, self.capacity)

    @property
    def next_token_M(self) -> Int64:
        """The token that followed each sampled one."""
        return self._next_token_M[: self.size]

    @property
    def cluster_M(self) -> Int64:
        """The cluster of text of each sampled token."""
        return self._cluster_M[: self.size]

    def rows(self, num_new: int) -> tuple[Int64, Int64]:
        """Of `num_new` further tokens, the indices [U] that enter and the slots [U] that they take, each slot once."""
        number_N = np.arange(self.seen, self.seen + num_new)
        slot_N = self._random.integers(0, number_N + 1)
        slot_N = np.where(number_N < self.capacity, number_N, slot_N)
        self.seen += num_new
        enters_U = np.flatnonzero(slot_N < self.capacity)
        # Of two new tokens for one slot, the later one stays.
        slot_U, from_end_U = np.unique(slot_N[enters_U][::-1], return_index=True)
        return enters_U[::-1][from_end_U], slot_U

    def add_batch(self, spans: Sequence[Span], next_tokens: Sequence[ArrayLike]) -> SampleUpdate:
        """Decide for the counting positions of a batch; `next_tokens` holds those of each span, one per position.

        :raises InputError: a span and its next tokens differ in number.
        """
        row_N, position_N, cluster_N = _positions(spans)
        given = [np.asarray(tokens, dtype=np.int64) for tokens in next_tokens]
        needed = [span.last - span.first for span in spans]
        if [len(tokens) for tokens in given] != needed:
            raise InputError(f"spans of {needed} positions need as many next tokens, got {[len(t) for t in given]}")
        next_token_N = np.concatenate(given or [_EMPTY])
        enters_U, slot_U = self.rows(len(row_N))
        self._next_token_M[slot_U] = next_token_N[enters_U]
        self._cluster_M[slot_U] = cluster_N[enters_U]
        return SampleUpdate(row_N[enters_U], position_N[enters_U], slot_U)


class LayerSample:
    """One layer's part of the sample: capacity x dim float32, whose memory is touched only as far as it is filled."""

    def __init__(self, plan: SamplePlan, dim: int) -> None:
        self._plan = plan
        self._vectors_MD = np.empty((plan.capacity, dim), dtype=np.float32)

    def write(self, vectors_BTD: Tensor, update: SampleUpdate) -> None:
        """Take this layer's vectors of a batch as the plan decided; every update, in order. The tensor is not kept."""
        if not len(update.slot_U):
            return
        if on_host(vectors_BTD):
            # NumPy for the reason of dispersion._host_sums.
            self._vectors_MD[update.slot_U] = widened(host_array(vectors_BTD)[update.row_U, update.position_U])
            return
        row_U = torch.from_numpy(update.row_U).to(vectors_BTD.device)
        position_U = torch.from_numpy(update.position_U).to(vectors_BTD.device)
        self._vectors_MD[update.slot_U] = vectors_BTD.detach()[row_U, position_U].float().cpu().numpy()

    def sample(self) -> Sample:
        """What has been sampled so far; a view, valid until the next write."""
        return Sample(self._vectors_MD[: self._plan.size], self._plan.next_token_M, self._plan.cluster_M)


def standardized_dispersion(sample_MD: NDArray[np.floating]) -> float:
    """Dispersion with each dimension divided by its standard deviation first, so that no rogue dimension decides.

    Rogue dimensions: Timkey & van Schijndel 2021. The mean stays: without it every cloud has a dispersion of about 1.
    Dimensions that are constant to float32 precision are left out; if all are, the vectors are identical and the
    dispersion is 0.

    :raises InputError: fewer than two vectors, or a row that is zero or not finite.
    """
    vectors_MD = _checked(sample_MD)
    deviation_D, varies_D = _deviation(vectors_MD)
    if not varies_D.any():
        return 0.0
    return dispersion(vectors_MD[:, varies_D] / deviation_D[varies_D])


def effective_rank(sample_MD: NDArray[np.floating]) -> float:
    """exp of the entropy of the normalised singular values of the centred sample (Roy & Vetterli 2007): 1 to min(M, D).

    From the smaller Gram matrix in float64: min(M, D)^3 operations. Identical vectors span nothing and give 0.

    :raises InputError: fewer than two vectors, or a row that is not finite.
    """
    vectors_MD = _checked(sample_MD)
    centred_MD = _centred(vectors_MD)[:, _deviation(vectors_MD)[1]]
    if not centred_MD.size:
        return 0.0
    power = _eigenvalues(centred_MD.T if centred_MD.shape[0] < centred_MD.shape[1] else centred_MD)
    # Below this an eigenvalue is what rounding left of a zero.
    singular = np.sqrt(power[power > len(power) * np.finfo(np.float64).eps * power[-1]])
    share = singular / singular.sum()
    return math.exp(-float((share * np.log(share)).sum()))


def retrieval_probe(
    sample_MD: NDArray[np.floating],
    next_token_M: Int64,
    cluster_M: Int64,
    *,
    neighbors: int = 8,
    queries: int = 1024,
    seed: int,
) -> Probe:
    """Share of a sampled key's nearest keys (squared L2) from other clusters that have the same next token.

    `queries` keys are drawn at random; all keys of other clusters are searched exactly, in float64. The interval is a
    jackknife over the queries' clusters, given the keys. A query without a key in another cluster does not count;
    without any such query the value is NaN and the interval (0, 1).

    :raises InputError: fewer than two vectors, a row that is not finite, or numbers below 1.
    """
    if neighbors < 1 or queries < 1:
        raise InputError(f"the probe needs at least 1 neighbor and 1 query, got {neighbors} and {queries}")
    # Keys in random order: a layer near the embedding has many identical keys, whose ties must not favour early text.
    order_M = np.random.default_rng(seed).permutation(len(sample_MD))
    keys_MD, token_M, group_M = _centred(_checked(sample_MD))[order_M], next_token_M[order_M], cluster_M[order_M]
    rate_Q = np.concatenate(list(_agreement(keys_MD, token_M, group_M, neighbors, min(queries, len(keys_MD)))))
    counts_Q = ~np.isnan(rate_Q)
    return _probe(rate_Q[counts_Q], group_M[: len(rate_Q)][counts_Q])


def _agreement(keys_MD: Float64, token_M: Int64, cluster_M: Int64, neighbors: int, queries: int) -> Iterator[Float64]:
    """By blocks of queries, the share of each query's neighbours with its next token; NaN without a neighbour."""
    half_norm_M = np.vecdot(keys_MD, keys_MD) / 2
    most = min(neighbors, len(keys_MD) - 1)
    buffer_QM = np.empty((min(_QUERY_BLOCK, queries), len(keys_MD)))
    for start in range(0, queries, _QUERY_BLOCK):
        block = slice(start, min(start + _QUERY_BLOCK, queries))
        distance_QM = buffer_QM[: block.stop - start]
        # Half the squared distance, less the query's own half norm, which orders nothing.
        np.subtract(half_norm_M, np.matmul(keys_MD[block], keys_MD.T, out=distance_QM), out=distance_QM)
        distance_QM[cluster_M[block, None] == cluster_M] = np.inf
        # Three to five times as fast as np.argpartition.
        nearest_QK = torch.topk(torch.from_numpy(distance_QM), most, dim=1, largest=False, sorted=False).indices.numpy()
        found_QK = np.isfinite(np.take_along_axis(distance_QM, nearest_QK, axis=1))
        agree_QK = found_QK & (token_M[nearest_QK] == token_M[block, None])
        with np.errstate(invalid="ignore"):
            yield agree_QK.sum(axis=1) / found_QK.sum(axis=1)


def _probe(rate_Q: Float64, cluster_Q: Int64) -> Probe:
    """Mean of the queries' rates with its interval."""
    if not len(rate_Q):
        return Probe(math.nan, Interval(0.0, 1.0), 0)
    _, cluster_Q = np.unique(cluster_Q, return_inverse=True)
    sum_C = np.bincount(cluster_Q, weights=rate_Q)
    count_C = np.bincount(cluster_Q)
    total, count = float(sum_C.sum()), len(rate_Q)
    with np.errstate(invalid="ignore"):
        without_C = (total - sum_C) / (count - count_C)
    return Probe(total / count, jackknife_interval(total / count, without_C, bounds=(0.0, 1.0)), count)


def _checked(sample_MD: NDArray[np.floating]) -> Float64:
    """The sample in float64; a caller may not write to it, it can be the very array that was given."""
    if np.ndim(sample_MD) != 2 or len(sample_MD) < 2:
        raise InputError(f"a score needs at least 2 vectors as [M, D], got shape {list(np.shape(sample_MD))}")
    finite_M = np.isfinite(sample_MD).all(axis=1)
    if not finite_M.all():
        raise InputError(f"row {int(finite_M.argmin())} of the sample is not finite")
    return np.asarray(sample_MD, dtype=np.float64)


def _centred(vectors_MD: Float64) -> Float64:
    """The sample minus its mean: distances stay, the rounding of large norms goes."""
    centred_MD: Float64 = vectors_MD - vectors_MD.mean(axis=0)
    return centred_MD


def _deviation(vectors_MD: Float64) -> tuple[Float64, NDArray[np.bool_]]:
    """Each dimension's standard deviation, and whether it varies at all beyond float32 rounding."""
    deviation_D: Float64 = vectors_MD.std(axis=0)
    return deviation_D, deviation_D > np.finfo(np.float32).eps * np.abs(vectors_MD).max(axis=0)


def _eigenvalues(tall: Float64) -> Float64:
    """Ascending eigenvalues of the Gram matrix of the columns."""
    matrix = torch.from_numpy(tall)
    with _one_thread() if matrix.shape[1] <= _ONE_THREAD_SIZE else nullcontext():
        power: Float64 = torch.linalg.eigvalsh(matrix.T @ matrix).numpy()
    return power


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: on shared cores the threads of a small step wait for one another, 5 s instead of 0.1."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _positions(spans: Sequence[Span]) -> tuple[Int64, Int64, Int64]:
    """Row, position and cluster of each counting position, span by span."""
    counts_S = [span.last - span.first for span in spans]
    row_N = np.repeat(np.array([span.row for span in spans], dtype=np.int64), counts_S)
    cluster_N = np.repeat(np.array([span.cluster for span in spans], dtype=np.int64), counts_S)
    position_N = np.concatenate([np.arange(span.first, span.last) for span in spans] or [_EMPTY])
    return row_N, position_N, cluster_N

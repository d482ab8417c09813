"""p_kNN and the mixture for any (k, temperature, lambda), from one cached search: pure functions of arrays.

A search is kept as distances_QK (ascending, squared L2 or another distance, +inf = absent) and hits_QK (is the
neighbour's value the target?). Then, in the terms of Khandelwal et al. 2020, section 2,

    log p_kNN(target) = logsumexp over hits of (-d/T)  -  logsumexp over all k of (-d/T)
    log p             = log(lambda p_kNN + (1 - lambda) p_LM)

so perplexity needs one number per token, not a distribution over the vocabulary. Generation needs the distribution:
`token_shares` gives the tokens with a neighbour, at most K for each query. Lambda is one number, or one for each query
(`Gate`).
Shapes: Q queries, K neighbours, J nearest of them, T temperatures, S settings of k, M pairs of a query and a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Temperatures that float32 can divide by.
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
# The range of a fitted lambda: neither distribution is ever left out.
LEAST_LAMBDA, MOST_LAMBDA = 1e-4, 1 - 1e-4
# Nearest neighbours whose agreement on the next token is an input of a gate.
NEAREST = 8
# Weights computed at a time: 256 kB stay in cache, which made fitting 1.7 times as fast.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Search:
    """One layer's cached search."""

    distances_QK: NDArray[np.float32]
    hits_QK: NDArray[np.bool_]
    values_QJ: NDArray[np.integer[Any]] | None = None
    """Tokens of the `NEAREST`, -1 for an absent one; only a gate needs them."""

    def rows(self, chosen: NDArray[np.bool_]) -> Search:
        """Return the search for a subset of the queries."""
        values_QJ = None if self.values_QJ is None else self.values_QJ[chosen]
        return Search(self.distances_QK[chosen], self.hits_QK[chosen], values_QJ)


@dataclass(frozen=True)
class Gate:
    """The gate of a mixture of two experts (Jordan & Jacobs 1994): shifts the logit of lambda for each query.

    Neither coefficient is above 0: lambda falls with distance and with disagreement among neighbours.
    """

    offset: float
    distance: float
    """Coefficient of the root of the nearest distance, which Drozdov et al. 2022 use in buckets."""
    different: float
    """Coefficient of the log of the number of distinct tokens among the `NEAREST`, which are counted as in adaptive
    kNN-MT (Zheng et al. 2021)."""


@dataclass(frozen=True)
class Mix:
    """A setting of the kNN-LM."""

    k: int
    temperature: float
    lam: float
    gate: Gate | None = None
    """None: lambda is the same for all queries."""
    by_text: bool = False
    """Whether lambda is also multiplied by the trust that the text so far gives: see `knnlm.knn.trust`."""

    def lambdas(self, distances_QK: NDArray[np.float32], values_QK: NDArray[np.integer[Any]] | None) -> Floats:
        """Return each query's lambda at full trust, [Q]; with a gate, 0 for a query without neighbours.

        :param values_QK: for a gate, each neighbour's token, -1 for an absent one; the `NEAREST` columns are enough.
        """
        if self.gate is None:
            return np.full(len(distances_QK), float(self.lam))
        slopes = np.array([self.gate.distance, self.gate.different])
        logits_Q = logit(self.lam) + self.gate.offset + gate_inputs(distances_QK, values_QK, self.k) @ slopes
        lambdas_Q = np.minimum(sigmoid(logits_Q), MOST_LAMBDA)
        return np.where(np.isfinite(distances_QK[:, 0]), lambdas_Q, 0.0)


@dataclass(frozen=True)
class TokenShares:
    """The non-zero entries of p_kNN as pairs of a query and a token, ordered by query and token."""

    rows_M: NDArray[np.int64]
    tokens_M: NDArray[np.int64]
    log_probs_M: Floats


def knn_log_probs(search: Search, k: int, temperature: float) -> Floats:
    """Return log p_kNN of each target from the nearest k, [Q]; -inf if none of them has it."""
    log_probs_Q: Floats = log_probs_of_grid(search, (k,), (temperature,))[0, 0]
    return log_probs_Q


def neighbor_weights(distances_QK: NDArray[np.float32], temperature: float) -> NDArray[np.floating]:
    """Return exp(-(d - nearest) / T), 0 for absent neighbours; for any temperature above 0.

    The nearest has weight 1, so float32 is precise enough.
    """
    return _weights(_nearness(distances_QK), temperature)


def _nearness(distances_QK: NDArray[np.float32]) -> NDArray[np.float32]:
    """Nearest distance minus d: at most 0, and -inf for an absent neighbour."""
    nearest_Q1 = np.where(np.isfinite(distances_QK[:, :1]), distances_QK[:, :1], 0)
    return np.subtract(nearest_Q1, distances_QK)


def _weights(nearness_QK: NDArray[np.float32], temperature: float) -> NDArray[np.floating]:
    # Outside this range float32 quotients would be 0, inf or 0/0.
    dtype = np.float32 if _SMALLEST <= temperature <= _LARGEST else np.float64
    with np.errstate(over="ignore"):
        weights_QK: NDArray[np.floating] = np.divide(nearness_QK, dtype(temperature), dtype=dtype)
    np.exp(weights_QK, out=weights_QK)
    return weights_QK


def token_shares(
    distances_QK: NDArray[np.float32], values_QK: NDArray[np.integer[Any]], temperature: float
) -> TokenShares:
    """Return p_kNN over the vocabulary: for each token, the weights of its neighbours over the sum of all weights.

    :param values_QK: each neighbour's token, at least 0; for an absent neighbour any.
    """
    weights_QK = neighbor_weights(distances_QK, temperature)
    width = int(values_QK.max(initial=0)) + 1
    cells_QK = np.arange(len(values_QK))[:, None] * width + values_QK
    cells_M, pair_of = np.unique(cells_QK, return_inverse=True)
    sums_M = np.bincount(pair_of.ravel(), weights_QK.ravel(), minlength=len(cells_M))
    there = sums_M > 0
    rows_M, tokens_M = np.divmod(cells_M[there], width)
    totals_Q = weights_QK.sum(axis=1, dtype=np.float64)
    return TokenShares(rows_M, tokens_M, np.log(sums_M[there] / totals_Q[rows_M]))


def log_probs_of_grid(search: Search, ks: Sequence[int], temperatures: Sequence[float]) -> Floats:
    """Return log p_kNN of the targets, [T, S, Q], for each temperature and several ascending k."""
    rows = max(1, _BLOCK // ks[-1])
    share_TSQ = np.empty((len(temperatures), len(ks), len(search.hits_QK)))
    for start in range(0, len(search.hits_QK), rows):
        part = np.s_[start : start + rows, : ks[-1]]
        shares = _shares(search.distances_QK[part], search.hits_QK[part], ks, temperatures)
        for share_SQ, share_QS in zip(share_TSQ, shares, strict=True):
            share_SQ[:, start : start + rows] = share_QS.T
    with np.errstate(divide="ignore"):
        return np.log(share_TSQ, out=share_TSQ)


def _shares(
    distances_QK: NDArray[np.float32], hits_QK: NDArray[Any], ks: Sequence[int], temperatures: Sequence[float]
) -> Iterator[Floats]:
    """p_kNN [Q, S] of the targets for each temperature: weights are computed once and summed between successive k."""
    nearness_QK, starts = _nearness(distances_QK), [0, *ks[:-1]]
    hits_QK = hits_QK.astype(np.float32)
    for temperature in temperatures:
        weights_QK = _weights(nearness_QK, temperature)
        total_QS = np.add.reduceat(weights_QK, starts, axis=1, dtype=np.float64).cumsum(axis=1)
        weights_QK *= hits_QK
        hit_QS = np.add.reduceat(weights_QK, starts, axis=1, dtype=np.float64).cumsum(axis=1)
        # Without any neighbour the total weight is 0, and the target's share is 0.
        yield np.divide(hit_QS, total_QS, out=np.zeros_like(hit_QS), where=total_QS > 0)


def mix(lm_log_probs: Floats, knn: Floats, lam: float | Floats) -> Floats:
    """Return log(lambda p_kNN + (1 - lambda) p_LM); lambda 0 returns the plain LM's numbers exactly.

    :param lam: one for all, or an array with one for each.
    """
    if np.all(lam == 0):
        return lm_log_probs
    if np.all(lam == 1):
        return knn
    with np.errstate(divide="ignore"):
        mixed: Floats = np.logaddexp(knn + np.log(lam), lm_log_probs + np.log1p(-np.asarray(lam)))
    return mixed


def gate_inputs(distances_QK: NDArray[np.float32], values_QK: NDArray[np.integer[Any]] | None, k: int) -> Floats:
    """Return [Q, 2]: root of the nearest distance (of squared L2, L2), and log of the number of distinct near tokens.

    A negative distance, as an inner product may give, counts as 0. A query without neighbours has 0 and 0.
    """
    assert values_QK is not None, "a search without its nearest values"
    nearest_Q = np.where(np.isfinite(distances_QK[:, 0]), distances_QK[:, 0], 0)
    values_QJ = np.sort(values_QK[:, : min(k, NEAREST)], axis=1)
    new_QJ = np.diff(values_QJ, axis=1, prepend=-1) > 0
    return np.column_stack([np.sqrt(np.maximum(nearest_Q, 0)), np.log(np.maximum(new_QJ.sum(axis=1), 1))])


def logit(lam: float) -> float:
    """Return log(λ / (1 - λ)); infinite at 0 and 1."""
    with np.errstate(divide="ignore"):
        return float(np.log(lam) - np.log1p(-lam))


def sigmoid(logits: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)) without overflow; x may be infinite."""
    return np.asarray((1 + np.tanh(logits / 2)) / 2)

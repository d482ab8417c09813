"""From one cached search to any (k, temperature, lambda): pure functions of arrays.

A search is kept as distances_QK (ascending, squared L2 or another distance, +inf = absent) and hits_QK (is the
neighbour's value the target?). Then, in the terms of Khandelwal et al. 2020, section 2,

    log p_kNN(target) = logsumexp over hits of (-d/T)  -  logsumexp over all k of (-d/T)
    log p             = log(lambda p_kNN + (1 - lambda) p_LM)

so perplexity needs one number per token, never a distribution over the vocabulary. Who generates text needs that:
`token_shares` gives the tokens that any neighbour votes for, at most K for each query.
Shapes: Q queries, K neighbours, T temperatures, S settings of k, M pairs of a query and a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Temperatures that float32 can divide by.
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
LAMBDA_CURVE = (*(round(i / 20, 2) for i in range(20)), 0.98)


@dataclass(frozen=True)
class Search:
    """One layer's cached search."""

    distances_QK: NDArray[np.float32]
    hits_QK: NDArray[np.bool_]

    def rows(self, chosen: NDArray[np.bool_]) -> Search:
        """The search of some of the queries."""
        return Search(self.distances_QK[chosen], self.hits_QK[chosen])


@dataclass(frozen=True)
class Mix:
    """A setting of the kNN-LM."""

    k: int
    temperature: float
    lam: float


@dataclass(frozen=True)
class TokenShares:
    """p_kNN where it is not zero, as pairs of a query and a token, ordered by query and token."""

    rows_M: NDArray[np.int64]
    tokens_M: NDArray[np.int64]
    log_probs_M: Floats


def knn_log_probs(search: Search, k: int, temperature: float) -> Floats:
    """log p_kNN of each target with the nearest k; -inf where none of them has it. Shape [Q]."""
    (log_probs_Q,) = _log_probs_of_ks(search, (k,), temperature)
    return log_probs_Q


def neighbor_weights(distances_QK: NDArray[np.float32], temperature: float) -> NDArray[np.floating]:
    """exp(-(d - nearest) / T), 0 for absent neighbours; for any temperature over 0.

    The nearest weighs 1, so float32 weights lose nothing that counts.
    """
    nearest_Q1 = np.where(np.isfinite(distances_QK[:, :1]), distances_QK[:, :1], 0)
    # Outside of this range float32 quotients would be 0, inf or 0/0.
    dtype = np.float32 if _SMALLEST <= temperature <= _LARGEST else np.float64
    weights_QK: NDArray[np.floating] = np.subtract(nearest_Q1, distances_QK, dtype=dtype)
    with np.errstate(over="ignore"):
        weights_QK /= dtype(temperature)
    np.exp(weights_QK, out=weights_QK)
    return weights_QK


def token_shares(
    distances_QK: NDArray[np.float32], values_QK: NDArray[np.integer[Any]], temperature: float
) -> TokenShares:
    """The whole of p_kNN: the weights of the neighbours that have a token, over all weights.

    :param values_QK: each neighbour's token, at least 0; that of an absent neighbour does not matter.
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


def _log_probs_of_ks(search: Search, ks: Sequence[int], temperature: float) -> list[Floats]:
    """log p_kNN for several ascending k at once, S arrays [Q]: weights are computed once and summed piece by piece."""
    weights_QK = neighbor_weights(search.distances_QK[:, : ks[-1]], temperature)
    starts = [0, *ks[:-1]]
    total_QS = np.add.reduceat(weights_QK, starts, axis=1, dtype=np.float64).cumsum(axis=1)
    np.multiply(weights_QK, search.hits_QK[:, : ks[-1]], out=weights_QK)
    hit_QS = np.add.reduceat(weights_QK, starts, axis=1, dtype=np.float64).cumsum(axis=1)
    # No neighbour at all has no weight at all: the target's share is 0.
    share_QS = np.divide(hit_QS, total_QS, out=np.zeros_like(hit_QS), where=total_QS > 0)
    with np.errstate(divide="ignore"):
        return list(np.log(share_QS).T)


def mix(lm_log_probs: Floats, knn: Floats, lam: float) -> Floats:
    """log(lambda p_kNN + (1 - lambda) p_LM); lambda 0 returns the plain LM's numbers to the last bit."""
    if lam == 0:
        return lm_log_probs
    if lam == 1:
        return knn
    mixed: Floats = np.logaddexp(knn + np.log(lam), lm_log_probs + np.log1p(-lam))
    return mixed


def fit_lambda(lm_log_probs: Floats, knn: Floats, *, steps: int = 40) -> float:
    """The weight in (0, 1) that maximises the mean log-probability: concave in lambda, so bisect its derivative.

    The derivative's terms (p_kNN - p_LM) / p are scaled by the larger of the two, so that nothing underflows.
    """
    top = np.maximum(lm_log_probs, knn)
    a, b = np.exp(knn - top), np.exp(lm_log_probs - top)
    low, high = 1e-4, 1 - 1e-4
    for _ in range(steps):
        middle = (low + high) / 2
        rising = np.mean((a - b) / (middle * a + (1 - middle) * b)) > 0
        low, high = (middle, high) if rising else (low, middle)
    return (low + high) / 2


def distance_scale(search: Search) -> float:
    """What temperatures are relative to: the median, over queries, of the spread of a query's distances.

    Layers differ by orders of magnitude. The spread (mean minus nearest) is used because a softmax of -d/T is
    unchanged by a constant added to all of a query's distances.
    """
    found_QK = np.isfinite(search.distances_QK)
    found_Q = found_QK.any(axis=1)
    # Of what is there, in float64 but without a float64 copy of the distances.
    sum_Q: Floats = np.sum(search.distances_QK, axis=1, where=found_QK, dtype=np.float64)
    spread_Q = sum_Q[found_Q] / found_QK.sum(axis=1)[found_Q] - search.distances_QK[found_Q, 0]
    spread_Q = spread_Q[spread_Q > 0]
    return float(np.median(spread_Q)) if spread_Q.size else 1.0


def k_grid(max_k: int) -> tuple[int, ...]:
    """Powers of two from 4, and max_k itself."""
    return tuple(sorted({k for k in (2**i for i in range(2, 11)) if k < max_k} | {max_k}))


# Temperatures tried, as multiples of a layer's distance scale, in factors of two; the best is then refined.
_TEMPERATURES = tuple(2.0**i for i in range(-7, 4))


def fit(
    search: Search,
    lm_log_probs: Floats,
    *,
    k: int | None = None,
    temperature: float | None = None,
    lam: float | None = None,
) -> Mix:
    """The (k, temperature, lambda) with the lowest perplexity on these queries; given values are kept.

    A grid over k and temperature, lambda by bisection at each point, then temperature refined by bisecting the
    grid's step three times around the best point.
    """
    ks = (k,) if k else k_grid(search.distances_QK.shape[1])
    scale = distance_scale(search)
    grid = (temperature,) if temperature else tuple(scale * t for t in _TEMPERATURES)
    tried = {t: _best_over_k(search, lm_log_probs, ks, t, lam) for t in grid}
    step = 2.0
    for _ in range(0 if temperature else 3):
        step = step**0.5
        best = min(tried, key=lambda t: tried[t][0])
        k_near = (tried[best][1].k,)
        for t in (best / step, best * step):
            tried[t] = _best_over_k(search, lm_log_probs, k_near, t, lam)
    return min(tried.values(), key=lambda pair: pair[0])[1]


def _best_over_k(
    search: Search, lm_log_probs: Floats, ks: Sequence[int], temperature: float, lam: float | None
) -> tuple[float, Mix]:
    options = []
    for k, knn in zip(ks, _log_probs_of_ks(search, ks, temperature), strict=True):
        weight = fit_lambda(lm_log_probs, knn, steps=12) if lam is None else lam
        options.append((-float(np.mean(mix(lm_log_probs, knn, weight))), k, knn))
    # Equal losses: lambda is 0, or it is 1 and a target that no neighbour has makes all infinite.
    loss, k, knn = min(options, key=lambda option: (option[0], -option[1]))
    weight = fit_lambda(lm_log_probs, knn) if lam is None else lam
    return loss, Mix(k, temperature, weight)

"""Fitting of k, temperature and lambda, and of a gate for lambda, on one cached search; pure functions of arrays.

Shapes: Q queries, K neighbours, S settings of k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from knnlm.knn.mixing import (
    LEAST_LAMBDA,
    MOST_LAMBDA,
    Floats,
    Gate,
    Mix,
    Search,
    gate_inputs,
    knn_log_probs,
    log_probs_of_grid,
    logit,
    mix,
    sigmoid,
)

LAMBDA_CURVE = (*(round(i / 20, 2) for i in range(20)), 0.98)
# Temperatures tried, as multiples of a layer's distance scale, in factors of two; the best is then refined.
_TEMPERATURES = tuple(2.0**i for i in range(-7, 4))
# Weight of the prior for a constant lambda in the fit of a gate, in tokens: few tokens hardly move it.
_PRIOR_TOKENS = 10.0


def fit_lambda(lm_log_probs: Floats, knn: Floats, *, steps: int = 40) -> float:
    """Return the lambda in (0, 1) that maximises the mean log-probability, by bisection: it is concave in lambda."""
    return float(_fit_lambdas(lm_log_probs, knn[None], steps)[0])


def _fit_lambdas(lm_log_probs: Floats, knn_SQ: Floats, steps: int) -> Floats:
    """The lambda of each setting, [S], all in one array: of a thousand queries the calls cost more than the sums.

    The derivative's terms (p_kNN - p_LM) / p are scaled by the larger of the two to avoid underflow.
    """
    top_SQ = np.maximum(lm_log_probs, knn_SQ)
    lm_SQ = np.exp(lm_log_probs - top_SQ)
    more_SQ = np.exp(knn_SQ - top_SQ) - lm_SQ
    low_S, high_S = (np.full(len(knn_SQ), end) for end in (LEAST_LAMBDA, MOST_LAMBDA))
    for _ in range(steps):
        middle_S = (low_S + high_S) / 2
        rising_S = np.sum(more_SQ / (lm_SQ + middle_S[:, None] * more_SQ), axis=1) > 0
        low_S, high_S = np.where(rising_S, middle_S, low_S), np.where(rising_S, high_S, middle_S)
    found_S: Floats = (low_S + high_S) / 2
    return found_S


def distance_scale(search: Search) -> float:
    """Return the scale that temperatures are relative to: the median spread of a query's distances.

    Layers differ by orders of magnitude. The spread (mean minus nearest) is used because a softmax of -d/T does not
    change when a constant is added to all of a query's distances.
    """
    found_QK = np.isfinite(search.distances_QK)
    found_Q = found_QK.any(axis=1)
    # Over the neighbours found, in float64 but without a float64 copy of the distances.
    sum_Q: Floats = np.sum(search.distances_QK, axis=1, where=found_QK, dtype=np.float64)
    spread_Q = sum_Q[found_Q] / found_QK.sum(axis=1)[found_Q] - search.distances_QK[found_Q, 0]
    spread_Q = spread_Q[spread_Q > 0]
    return float(np.median(spread_Q)) if spread_Q.size else 1.0


def k_grid(max_k: int) -> tuple[int, ...]:
    """Return powers of two from 4 to 1,024 that are below max_k, and max_k itself."""
    return tuple(sorted({k for k in (2**i for i in range(2, 11)) if k < max_k} | {max_k}))


def fit(
    search: Search,
    lm_log_probs: Floats,
    *,
    k: int | None = None,
    temperature: float | None = None,
    lam: float | None = None,
) -> Mix:
    """Return the (k, temperature, lambda) with the lowest perplexity on these queries; given values are kept.

    A grid search over k and temperature, with lambda by a short bisection at each point; then the temperature is
    refined by halving the grid's step, in the logarithm, three times around the best point, and lambda at last.
    """
    ks = (k,) if k else k_grid(search.distances_QK.shape[1])
    scale = distance_scale(search)
    grid = (temperature,) if temperature else tuple(scale * t for t in _TEMPERATURES)
    tried: dict[float, _Tried] = {}

    def attempt(ks: Sequence[int], temperatures: Sequence[float]) -> None:
        for t, knn_SQ in zip(temperatures, log_probs_of_grid(search, ks, temperatures), strict=True):
            tried[t] = _best_over_k(lm_log_probs, knn_SQ, ks, lam)

    attempt(ks, grid)
    step = 2.0
    for _ in range(0 if temperature else 3):
        step = step**0.5
        best = min(tried, key=lambda t: tried[t].loss)
        attempt((tried[best].k,), (best / step, best * step))
    found = min(tried, key=lambda t: tried[t].loss)
    weight = fit_lambda(lm_log_probs, tried[found].knn_Q) if lam is None else lam
    return Mix(tried[found].k, found, weight)


class _Tried(NamedTuple):
    """The best k at one temperature."""

    loss: float
    k: int
    knn_Q: Floats


def _best_over_k(lm_log_probs: Floats, knn_SQ: Floats, ks: Sequence[int], lam: float | None) -> _Tried:
    weights_S = _fit_lambdas(lm_log_probs, knn_SQ, steps=12) if lam is None else np.full(len(ks), float(lam))
    losses_S = np.broadcast_to(-np.mean(mix(lm_log_probs, knn_SQ, weights_S[:, None]), axis=-1), len(ks))
    # Losses tie if lambda is 0, or if it is 1 and a target that no neighbour has makes all infinite.
    best = min(range(len(ks)), key=lambda number: (losses_S[number], -ks[number]))
    return _Tried(float(losses_S[best]), ks[best], knn_SQ[best])


def fit_gate(search: Search, lm_log_probs: Floats, setting: Mix, *, prior: float = _PRIOR_TOKENS) -> Mix:
    """Return the setting with the gate of the highest penalised likelihood on these queries.

    The penalty is prior / 2 times the squares of the offset and of the coefficients of standardised inputs, so that a
    large prior leaves lambda constant. A coefficient that would be above 0 is set to 0.

    :param search: with `values_QJ`.
    """
    gains_Q = knn_log_probs(search, setting.k, setting.temperature) - lm_log_probs
    inputs_Q2 = gate_inputs(search.distances_QK, search.values_QJ, setting.k)
    means, deviations = inputs_Q2.mean(axis=0), inputs_Q2.std(axis=0)
    # An input that is constant up to rounding carries no information.
    deviations = np.where(deviations > 1e-6 * means, deviations, np.inf)
    scaled_Q2 = (inputs_Q2 - means) / deviations
    falling = np.ones(2, np.bool_)
    while True:
        offset, *slopes = _fit_logits(np.where(falling, scaled_Q2, 0.0), gains_Q, logit(setting.lam), prior)
        if (np.array(slopes) <= 0).all():
            break
        falling &= np.array(slopes) <= 0
    distance, different = np.array(slopes) / deviations
    gate = Gate(float(offset - means @ (distance, different)), float(distance), float(different))
    return replace(setting, gate=gate)


def _fit_logits(inputs_Q2: Floats, gains_Q: Floats, logit: float, prior: float, *, steps: int = 500) -> Floats:
    """Offset and slopes by EM, with steps that never lower the likelihood: the curvature of its logistic regression is
    bounded by one matrix for all steps (Böhning & Lindsay 1988).

    :param gains_Q: log p_kNN - log p_LM of each target.
    """
    inputs_Q3 = np.column_stack([np.ones(len(inputs_Q2)), inputs_Q2])
    curvature = inputs_Q3.T @ inputs_Q3 / 4 + prior * np.eye(3)
    found = np.zeros(3)
    for _ in range(steps):
        logits_Q = logit + inputs_Q3 @ found
        # The posterior probability that the neighbours gave the token, minus the prior one.
        surprise_Q = sigmoid(logits_Q + gains_Q) - sigmoid(logits_Q)
        step = np.linalg.solve(curvature, inputs_Q3.T @ surprise_Q - prior * found)
        found += step
        if np.abs(step).max() < 1e-6:
            break
    return found

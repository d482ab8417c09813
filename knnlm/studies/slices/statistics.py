"""Slices of a set at given accuracies, and the AUC of a score as a detector of wrong answers; works on arrays.

Legend: Q queries, D dimension, G groups of clusters that the jackknife leaves out, L levels of accuracy, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knnlm.results import Interval
from knnlm.scores.dispersion import from_sum
from knnlm.statistics import GROUPS, CorrelationEstimate, correlate, jackknife_interval, ranks, t_quantile

Float64 = NDArray[np.float64]
Flags = NDArray[np.bool_]

LEVELS = 10
"""Accuracies of slices are multiples of 1 / LEVELS."""
SMALLEST_SLICE = 20
"""The dispersion of fewer queries is meaningless."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, by a delete-a-group jackknife over clusters of queries."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Slice:
    """Slices that mix right and wrong queries at one accuracy."""

    accuracy: float
    dispersion: float
    """Dispersion between the queries' vectors, the mean over draws."""
    interval: Interval
    """Range of 95 % of such draws from this set: mean ± t · standard deviation · √(1 + 1 / draws)."""


@dataclass(frozen=True)
class SliceCurve:
    """Dispersion against accuracy, as in the paper."""

    size: int
    """Number of queries in a slice."""
    draws: int
    slices: tuple[Slice, ...]
    correlation: CorrelationEstimate
    """Correlation over all draws. They share queries, so it grows with the slice size and says little of one query."""


def slice_size(wanted: int, right: int, wrong: int) -> int | None:
    """Return `wanted`, or the largest multiple of `LEVELS` for which there are enough right and wrong queries.

    A slice has only wrong queries at 0 %, only right ones at 100 %. None if not even `SMALLEST_SLICE` is possible.
    """
    size = min(wanted, right, wrong) // LEVELS * LEVELS
    return size if size >= SMALLEST_SLICE else None


def draw_slices(units_QD: Float64, correct_Q: Flags, size: int, *, draws: int, seed: int) -> SliceCurve:
    """Draw slices with exactly 0, 10, … 100 % right queries, each without replacement.

    :param units_QD: the queries' unit vectors.
    :param size: queries in a slice, from `slice_size`.
    :param draws: number of draws for each accuracy, at least 2; draw s depends only on `seed`, the accuracy and s.
    """
    accuracies_L = np.linspace(0, 1, LEVELS + 1)
    dispersion_LS = np.array(
        [
            [_draw(units_QD, correct_Q, level * size // LEVELS, size, (seed, draw, level)) for draw in range(draws)]
            for level in range(LEVELS + 1)
        ]
    )
    return SliceCurve(
        size=size,
        draws=draws,
        slices=tuple(
            Slice(float(accuracy), float(values_S.mean()), _band(values_S, size))
            for accuracy, values_S in zip(accuracies_L, dispersion_LS, strict=True)
        ),
        correlation=correlate(
            accuracies_L.repeat(draws), dispersion_LS.ravel(), clusters=np.tile(np.arange(draws), LEVELS + 1).tolist()
        ),
    )


def _draw(units_QD: Float64, correct_Q: Flags, right: int, size: int, seed: tuple[int, int, int]) -> float:
    rng = np.random.default_rng(seed)
    chosen = np.concatenate(
        [
            rng.choice(np.flatnonzero(correct_Q), right, replace=False),
            rng.choice(np.flatnonzero(~correct_Q), size - right, replace=False),
        ]
    )
    return float(from_sum(units_QD[chosen].sum(axis=0), size))


def _band(values_S: Float64, size: int) -> Interval:
    count, mean = len(values_S), float(values_S.mean())
    reach = t_quantile(count - 1) * float(values_S.std(ddof=1)) * math.sqrt(1 + 1 / count)
    return Interval(max(0.0, mean - reach), min(size / (size - 1), mean + reach))


def group_numbers(clusters_Q: NDArray[np.integer]) -> NDArray[np.intp]:
    """Fold clusters into at most `GROUPS` groups, numbered from 0."""
    numbers_Q: NDArray[np.intp] = np.unique(clusters_Q, return_inverse=True)[1].reshape(-1)
    return numbers_Q % GROUPS


def jackknifed(
    statistic: Callable[[Flags], float], clusters_Q: NDArray[np.integer], bounds: tuple[float, float]
) -> Estimate:
    """Estimate a statistic, a function of a mask [Q] of the queries to use; its interval is clipped to `bounds`."""
    group_Q = group_numbers(clusters_Q)
    value = statistic(np.ones(len(group_Q), np.bool_))
    groups = range(group_Q.max() + 1) if group_Q.any() else ()  # a single group cannot be left out
    without_G = np.array([statistic(group_Q != group) for group in groups])
    return Estimate(value, jackknife_interval(value, without_G, bounds=bounds, sizes_G=np.bincount(group_Q)))


def mean(
    values_Q: NDArray[np.floating] | Flags, clusters_Q: NDArray[np.integer], bounds: tuple[float, float]
) -> Estimate:
    """Mean of a value over queries, with its interval."""
    return jackknifed(lambda kept_Q: float(values_Q[kept_Q].mean()), clusters_Q, bounds)


def tail_auc(scores_Q: Float64, wrong_Q: Flags, clusters_Q: NDArray[np.integer]) -> Estimate:
    """Probability that a wrong query has a lower score than a right one, ties counting half (Mann-Whitney).

    0.5 is chance; 1 means that all wrong queries have the lowest scores. NaN if all are right or all are wrong.
    """
    return jackknifed(lambda kept_Q: _auc(scores_Q[kept_Q], wrong_Q[kept_Q]), clusters_Q, (0.0, 1.0))


def _auc(scores_Q: Float64, wrong_Q: Flags) -> float:
    wrong, right = int(wrong_Q.sum()), int((~wrong_Q).sum())
    if not wrong or not right:
        return math.nan
    above = float(ranks(scores_Q.tolist())[wrong_Q].sum()) - wrong * (wrong + 1) / 2
    return 1 - above / (wrong * right)


def right_minus_wrong(units_QD: Float64, correct_Q: Flags, clusters_Q: NDArray[np.integer]) -> Estimate:
    """Dispersion between right queries minus that between wrong ones, which makes the curve of slices rise or fall.

    The expected dispersion of a slice is a weighted mean of the dispersion between right queries, between wrong ones,
    and between the two kinds. The first has all the weight at 100 %, the second at 0 %.
    """
    group_Q = group_numbers(clusters_Q)
    right, right_G = _left_out(units_QD[correct_Q], group_Q[correct_Q], group_Q.max() + 1)
    wrong, wrong_G = _left_out(units_QD[~correct_Q], group_Q[~correct_Q], group_Q.max() + 1)
    interval = jackknife_interval(right - wrong, right_G - wrong_G, bounds=(-2.0, 2.0), sizes_G=np.bincount(group_Q))
    return Estimate(right - wrong, interval)


def _left_out(units_QD: Float64, group_Q: NDArray[np.intp], groups: int) -> tuple[float, Float64]:
    """Dispersion between vectors, and the same without each group, [G]."""
    sums_GD = (np.arange(groups)[:, None] == group_Q) @ units_QD
    counts_G = np.bincount(group_Q, minlength=groups)
    total_D, count = sums_GD.sum(axis=0), len(units_QD)
    return float(from_sum(total_D, count)), from_sum(total_D - sums_GD, count - counts_G)

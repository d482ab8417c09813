"""Rank correlation and Student's t against textbook values, intervals against their own promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from knnlm.results import Interval
from knnlm.statistics import (
    effective_number,
    jackknife_interval,
    ranks,
    relative_change,
    spearman,
    t_quantile,
)


def test_ranks_share_ties() -> None:
    assert ranks([10, 20, 20, 5]).tolist() == [2, 3.5, 3.5, 1]


def test_spearman_of_a_known_case() -> None:
    # d² = 0+1+1+0+0 over n=5: 1 - 6·2/(5·24)
    assert spearman([1, 2, 3, 4, 5], [1, 3, 2, 4, 5]) == pytest.approx(1 - 12 / 120)
    assert spearman([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)


def test_spearman_of_a_constant_is_nan() -> None:
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_spearman_of_what_is_not_finite_is_nan() -> None:
    assert math.isnan(spearman([1, 2, 3], [5, math.inf, 7]))
    assert math.isnan(spearman([1, math.nan, 3, 4], [5, 6, 7, 8]))


def coverage(sizes: list[int], sets: int, interval_of: Callable[..., Interval]) -> float:
    """Share of data sets whose interval holds the true change; tokens of a cluster share a shift."""
    rng = np.random.default_rng(0)
    clusters, covered = np.repeat(np.arange(len(sizes)), sizes), 0
    for _ in range(sets):
        base = rng.normal(5, 1, len(clusters))
        losses = base - 0.1 + rng.normal(0, 0.2, len(sizes))[clusters] + rng.normal(0, 0.2, len(clusters))
        interval = interval_of(losses, base, clusters)
        covered += interval.low <= math.expm1(-0.1) <= interval.high
    return covered / sets


def jackknife(losses: np.ndarray, base: np.ndarray, clusters: np.ndarray) -> Interval:
    return relative_change(losses, base, clusters)[1]


def bootstrap(losses: np.ndarray, base: np.ndarray, clusters: np.ndarray) -> Interval:
    """The paired percentile bootstrap over clusters."""
    sums, sizes = np.bincount(clusters, losses - base), np.bincount(clusters)
    draws = np.random.default_rng(1).multinomial(len(sizes), [1 / len(sizes)] * len(sizes), size=300)
    low, high = np.expm1(np.quantile((draws @ sums) / (draws @ sizes), [0.025, 0.975]))
    return Interval(low, high)


@pytest.mark.parametrize(
    "sizes", [[50] * 4, [50] * 30, [100, 80, 40, 30, 10], [130, 60, 40, 30, 30, 20, 10, 10], [160, 160] + [4] * 20]
)
def test_interval_of_the_change_covers_what_it_promises(sizes: list[int]) -> None:
    assert 0.92 <= coverage(sizes, 600, jackknife) <= 0.99


def test_bootstrap_would_not_with_few_clusters() -> None:
    assert coverage([50] * 4, 300, bootstrap) < 0.85
    assert coverage([100, 80, 40, 30, 10], 300, bootstrap) < 0.85


def test_change_equals_its_definition() -> None:
    rng = np.random.default_rng(3)
    losses, base, clusters = rng.random(90), rng.random(90), np.repeat([7, 3, 5], [20, 30, 40])
    value, interval = relative_change(losses, base, clusters)
    assert value == pytest.approx(math.exp(losses.mean()) / math.exp(base.mean()) - 1, rel=1e-12)
    difference = losses - base
    without = [difference[clusters != name].mean() for name in (3, 5, 7)]
    error = math.sqrt(2 / 3 * sum((w - np.mean(without)) ** 2 for w in without))
    centre = 3 * difference.mean() - 2 * np.mean(without)
    # 20, 30 and 40 tokens tell as much as 90² / 2900 = 2.8 equal clusters, less one.
    quantile = t_quantile(90**2 / 2900 - 1)
    assert interval.high == pytest.approx(math.expm1(centre + quantile * error), rel=1e-9)
    assert interval.low == pytest.approx(math.expm1(centre - quantile * error), rel=1e-9)


def test_change_of_infinite_losses_is_unknown() -> None:
    finite, infinite = np.ones(40), np.ones(40)
    infinite[3] = math.inf
    for losses, base in ((finite, infinite), (infinite, finite), (infinite, infinite)):
        value, interval = relative_change(losses, base, np.arange(40) // 10)
        assert math.isnan(value) and math.isnan(interval.low) and math.isnan(interval.high)


def test_change_of_one_cluster_has_no_interval() -> None:
    value, interval = relative_change(np.full(9, 2.0), np.full(9, 1.0), np.zeros(9, np.int64))
    assert value == pytest.approx(math.e - 1)
    assert math.isnan(interval.low) and math.isnan(interval.high)


def test_no_difference_is_exactly_zero() -> None:
    losses = np.random.default_rng(0).random(100)
    assert relative_change(losses, losses, np.arange(100) // 10) == (0, Interval(0, 0))


def test_effective_number_of_clusters() -> None:
    assert effective_number(np.array([9] * 8)) == 8
    assert effective_number(np.array([100, 1, 1])) == pytest.approx(1.04, abs=0.001)


def test_interval_holds_the_value_and_keeps_its_bounds() -> None:
    assert jackknife_interval(0.5, np.array([0.4, 0.4, 0.4]), bounds=(0, 1)) == Interval(0.5, pytest.approx(0.7))
    assert jackknife_interval(0.99, np.array([0.9, 1.0, 0.9]), bounds=(0, 1)).high == 1


@pytest.mark.parametrize(("freedom", "table"), [(1, 12.7062), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227)])
def test_t_quantile_equals_the_table(freedom: int, table: float) -> None:
    assert t_quantile(freedom) == pytest.approx(table, rel=2e-5)


def test_t_quantile_between_whole_degrees_is_linear_in_their_inverse() -> None:
    assert t_quantile(2.4) == pytest.approx((t_quantile(2) + t_quantile(3)) / 2, rel=1e-12)
    assert t_quantile(0.2) == t_quantile(1)


def test_t_quantile_of_several_comparisons() -> None:
    """At two degrees of freedom P(|t| < t0) = t0 / sqrt(2 + t0²)."""
    inside = 1 - 0.05 / 12
    assert t_quantile(2, comparisons=12) == pytest.approx(inside * math.sqrt(2 / (1 - inside**2)), rel=1e-9)

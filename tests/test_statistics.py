"""Rank correlation and Student's t against textbook values, intervals against their own promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from knnlm.errors import InputError
from knnlm.results import Interval
from knnlm.statistics import (
    CorrelationEstimate,
    correlate,
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


# Correlations against numpy's and by hand.


def pairs(rng, count: int, rho: float):
    x = rng.normal(size=count)
    return x, rho * x + math.sqrt(1 - rho**2) * rng.normal(size=count)


def test_pearson_is_numpys():
    x, y = pairs(np.random.default_rng(0), 40, 0.5)
    found = correlate(x, y)
    assert found.pearson == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert found.count == 40


def test_spearman_is_pearson_of_ranks_with_ties_sharing_theirs():
    x, y = [10, 20, 20, 40, 50], [1.0, 8.0, 27.0, 27.0, 5.0]
    expected = np.corrcoef([1, 2.5, 2.5, 4, 5], [1, 3, 4.5, 4.5, 2])[0, 1]
    assert correlate(x, y).spearman == pytest.approx(expected, abs=1e-12)


def test_any_rising_function_leaves_spearman_alone():
    x, y = pairs(np.random.default_rng(1), 30, 0.7)
    assert correlate(x, np.exp(y)).spearman == correlate(x, y).spearman
    assert correlate(-x, y).spearman == -correlate(x, y).spearman


def test_interval_by_hand():
    # Leave-one-out estimates in plain numpy.
    x, y = pairs(np.random.default_rng(2), 9, 0.3)
    without = [np.corrcoef(np.delete(x, i), np.delete(y, i))[0, 1] for i in range(9)]
    z = np.arctanh(without)
    reach = 2.306004 * math.sqrt(8 / 9 * ((z - z.mean()) ** 2).sum())  # t at 8 degrees of freedom
    middle = math.atanh(np.corrcoef(x, y)[0, 1])
    assert reach > 1.96 / math.sqrt(6)
    found = correlate(x, y).pearson_interval
    assert (found.low, found.high) == pytest.approx((math.tanh(middle - reach), math.tanh(middle + reach)), abs=2e-3)


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_intervals_of_eight_pairs_hold_the_truth(kind, rho):
    rng = np.random.default_rng(3)
    truth = rho if kind == "pearson" else 6 / math.pi * math.asin(rho / 2)
    inside = 0
    for _ in range(200):
        interval = getattr(correlate(*pairs(rng, 8, rho)), f"{kind}_interval")
        inside += interval.low <= truth <= interval.high
    # 95 % of 200 less three standard errors.
    assert inside >= 181


def test_clusters_are_left_out_whole():
    rng = np.random.default_rng(4)
    inside = {"clusters": 0, "pairs": 0}
    for _ in range(60):
        x, y = (np.repeat(side, 8) + 0.1 * rng.normal(size=64) for side in pairs(rng, 8, 0.0))
        for name, clusters in (("clusters", np.repeat(np.arange(8), 8)), ("pairs", None)):
            interval = correlate(x, y, clusters=clusters).pearson_interval
            inside[name] += interval.low <= 0 <= interval.high
    assert inside["clusters"] >= 52
    assert inside["pairs"] < 40


def test_names_of_clusters_do_not_matter():
    x, y = pairs(np.random.default_rng(5), 12, 0.5)
    clusters = np.repeat([0, 1, 2, 3], 3)
    assert correlate(x, y, clusters=clusters) == correlate(x, y, clusters=1000 - 7 * clusters)


@pytest.mark.parametrize("count", [3, 5, 8, 33, 100])
def test_equal_and_opposite_orders_are_exactly_one(count):
    values = np.random.default_rng(count).normal(size=count)
    assert correlate(values, np.exp(values)).spearman == 1
    assert correlate(values, -values).spearman == correlate(values, -values).pearson == -1


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_size_of_the_figures_does_not_matter(scale):
    x, y = pairs(np.random.default_rng(7), 20, 0.5)
    assert correlate(scale * x, y / scale).pearson == pytest.approx(correlate(x, y).pearson, abs=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_perfect_order_of_eight_is_not_certain(sign):
    found = correlate(range(8), sign * np.exp(np.arange(8.0)))
    assert found.spearman == sign
    near, far = sorted((abs(found.spearman_interval.low), abs(found.spearman_interval.high)))
    # atanh of one swap (rho = 1 - 12/504), less 1.96 sqrt((1 + 1/2) / 5).
    assert (near, far) == (pytest.approx(math.tanh(math.atanh(1 - 12 / 504) - 1.959964 * math.sqrt(0.3)), abs=1e-6), 1)


def test_intervals_narrow_with_pairs():
    widths = []
    for count in (10, 100, 3000):
        interval = correlate(*pairs(np.random.default_rng(6), count, 0.5)).spearman_interval
        widths.append(interval.high - interval.low)
    assert widths[0] > widths[1] > widths[2] and widths[2] < 0.06


@pytest.mark.parametrize(("x", "y"), [([], []), ([1, 2], [3, 4]), ([1, 1, 1, 1, 1], [1, 2, 3, 4, 5])])
def test_nothing_is_known_of_too_few_or_constant_pairs(x, y):
    found = correlate(x, y)
    assert math.isnan(found.pearson) and math.isnan(found.spearman)
    assert found.pearson_interval == found.spearman_interval == Interval(-1, 1)


@pytest.mark.parametrize(
    ("x", "clusters"),
    [([1.0, 2.0, 3.0], None), ([1.0, 2.0, 3.0, 5.0, 4.0], [7] * 5), ([0.0, 0.0, 0.0, 0.0, 1.0], None)],
    ids=["three pairs", "one cluster", "constant without one"],
)
def test_an_estimate_without_a_spread_has_the_whole_range(x, clusters):
    found = correlate(x, range(len(x)), clusters=clusters)
    assert math.isfinite(found.spearman)
    assert found.pearson_interval == found.spearman_interval == Interval(-1, 1)


@pytest.mark.parametrize(
    ("x", "y", "clusters", "message"),
    [
        ([1, 2, 3], [1, 2], None, r"lists of one length, got shapes \(3,\) and \(2,\)"),
        ([1, 2, 3], [1, 2, 3], [0, 1], r"clusters \(2,\)"),
        ([1, 2, math.nan], [1, 2, 3], None, "finite figures"),
        ([1, 2, 3], [1, 2, math.inf], None, "finite figures"),
    ],
)
def test_bad_input(x, y, clusters, message):
    with pytest.raises(InputError, match=message):
        correlate(x, y, clusters=clusters)


def test_result_is_frozen():
    found = correlate(range(5), range(5))
    assert isinstance(found, CorrelationEstimate)
    with pytest.raises(AttributeError):
        found.pearson = 0.0


def test_changes_compared_many_times_over_are_wider_by_students_t() -> None:
    random = np.random.default_rng(0)
    losses, base, clusters = random.normal(size=120), random.normal(size=120), np.arange(120) // 12
    one, many = (relative_change(losses, base, clusters, comparisons=number)[1] for number in (1, 150))
    reach = [np.log1p(interval.high) - np.log1p(interval.low) for interval in (one, many)]
    assert reach[1] / reach[0] == pytest.approx(t_quantile(9, comparisons=150) / t_quantile(9))

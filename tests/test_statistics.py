"""Rank correlation and Student's t against textbook values, intervals against their own promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from knnlm.results import Interval
from knnlm.statistics import PairedBootstrap, jackknife_interval, ranks, spearman, t_quantile


def test_ranks_share_ties() -> None:
    assert ranks([10, 20, 20, 5]).tolist() == [2, 3.5, 3.5, 1]


def test_spearman_of_a_known_case() -> None:
    # d² = 0+1+1+0+0 over n=5: 1 - 6·2/(5·24)
    assert spearman([1, 2, 3, 4, 5], [1, 3, 2, 4, 5]) == pytest.approx(1 - 12 / 120)
    assert spearman([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)


def test_spearman_of_a_constant_is_nan() -> None:
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_paired_bootstrap_covers_the_true_change_of_clustered_losses() -> None:
    """95 % intervals over 200 data sets whose clusters share a shift; a bootstrap of tokens would cover ~40 %."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        clusters = np.repeat(np.arange(30), 50)
        base = rng.normal(5, 1, 1500)
        losses = base - 0.1 + np.repeat(rng.normal(0, 0.2, 30), 50) + rng.normal(0, 0.2, 1500)
        interval = PairedBootstrap(clusters, replicates=300, seed=1).relative_change(losses, base)
        covered += interval.low <= math.expm1(-0.1) <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_no_difference_is_exactly_zero() -> None:
    losses = np.random.default_rng(0).random(100)
    interval = PairedBootstrap(np.arange(100) // 10, replicates=100, seed=0).relative_change(losses, losses)
    assert (interval.low, interval.high) == (0, 0)


def test_interval_holds_the_value_and_keeps_its_bounds() -> None:
    assert jackknife_interval(0.5, np.array([0.4, 0.4, 0.4]), bounds=(0, 1)) == Interval(0.5, pytest.approx(0.7))
    assert jackknife_interval(0.99, np.array([0.9, 1.0, 0.9]), bounds=(0, 1)).high == 1


@pytest.mark.parametrize(("freedom", "table"), [(1, 12.706), (4, 2.776), (5, 2.5706), (9, 2.2622), (30, 2.0423)])
def test_t_quantile_equals_the_table(freedom: int, table: float) -> None:
    assert t_quantile(freedom) == pytest.approx(table, rel=2e-3)

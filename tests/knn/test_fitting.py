"""Fitted k, T and λ against brute-force grids."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.knn.fitting import distance_scale, fit, fit_lambda, k_grid
from knnlm.knn.mixing import Mix, Search, knn_log_probs, mix
from tests.knn.test_mixing import make_search, no_neighbours_in


def test_distance_scale_is_the_median_spread_of_those_who_have_neighbours() -> None:
    search = make_search(2, queries=301, neighbors=20)
    search.distances_QK[5, 11:] = np.inf
    no_neighbours_in(search, 3, 4)
    spreads = [
        float(np.mean(found.astype(np.float64))) - float(found[0])
        for found in (row[np.isfinite(row)] for row in search.distances_QK)
        if len(found)
    ]
    assert distance_scale(search) == pytest.approx(float(np.median(spreads)), rel=1e-12)


@pytest.mark.parametrize("rows", [range(50), ()])
def test_distance_scale_without_any_spread_is_one(rows: range) -> None:
    search = no_neighbours_in(make_search(neighbors=1), *rows)
    assert distance_scale(search) == 1


def test_memory_of_the_scale_is_a_fraction_of_the_distances() -> None:
    search = make_search(queries=2000, neighbors=512)
    tracemalloc.start()
    distance_scale(search)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < search.distances_QK.nbytes / 2  # three copies in float64 were six times as much


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_fitted_lambda_beats_a_fine_grid(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lm, knn = np.log(rng.random(200)), np.log(rng.random(200))
    knn[rng.random(200) < 0.4] = -np.inf
    fitted = np.mean(mix(lm, knn, fit_lambda(lm, knn)))
    grid = max(np.mean(mix(lm, knn, lam)) for lam in np.linspace(0.001, 0.999, 999))
    assert fitted >= grid - 1e-9


def test_lambda_may_exceed_one_half() -> None:
    """In an unseen domain the neighbours deserve most of the weight."""
    assert fit_lambda(np.full(100, -8.0), np.log(np.linspace(0.2, 0.9, 100))) > 0.99


def test_fit_finds_what_a_brute_force_grid_finds() -> None:
    search = make_search(3, queries=400)
    lm = np.log(np.random.default_rng(4).uniform(0.001, 0.6, 400))
    found = fit(search, lm)
    best = min(
        -float(np.mean(mix(lm, (knn := knn_log_probs(search, k, t)), fit_lambda(lm, knn))))
        for k in k_grid(32)
        for t in distance_scale(search) * 2.0 ** np.arange(-7, 4)
    )
    loss = -float(np.mean(mix(lm, knn_log_probs(search, found.k, found.temperature), found.lam)))
    assert loss <= best + 1e-9


def test_given_settings_are_kept() -> None:
    lm = np.full(50, -2.0)
    assert fit(make_search(), lm, k=5, temperature=3.0, lam=0.2) == Mix(5, 3.0, 0.2)
    assert fit(make_search(), lm, k=5).k == 5


def test_lambda_one_takes_the_most_neighbours_where_every_loss_is_infinite() -> None:
    search = make_search(queries=50)
    search.hits_QK[0] = False
    found = fit(search, np.full(50, -2.0), lam=1.0)
    assert (found.k, found.lam) == (32, 1)


def test_temperature_follows_the_scale_of_the_distances() -> None:
    """Layers differ by orders of magnitude in distance; the fitted distribution must not."""
    search = make_search(5, queries=300)
    large = Search(search.distances_QK * np.float32(4096), search.hits_QK)
    lm = np.log(np.random.default_rng(6).uniform(0.01, 0.6, 300))
    assert fit(large, lm).temperature == pytest.approx(4096 * fit(search, lm).temperature, rel=1e-5)
    assert fit(large, lm).k == fit(search, lm).k


def test_k_grid_ends_at_what_was_searched() -> None:
    assert k_grid(1024) == (4, 8, 16, 32, 64, 128, 256, 512, 1024)
    assert k_grid(100)[-1] == 100
    assert k_grid(3) == (3,)

"""Probabilities against a float64 loop that follows Khandelwal et al. 2020 word for word."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.probability import Mix, Search, distance_scale, fit, fit_lambda, k_grid, knn_log_probs, mix


def make_search(seed: int = 0, queries: int = 50, neighbors: int = 32, scale: float = 10.0) -> Search:
    rng = np.random.default_rng(seed)
    distances = np.sort(rng.gamma(2.0, scale, (queries, neighbors)), axis=1).astype(np.float32)
    return Search(distances, rng.random((queries, neighbors)) < 0.3)


def loop_probability(distances: np.ndarray, hits: np.ndarray, k: int, temperature: float) -> float:
    """p_kNN of the target, term by term in Python floats."""
    weights = [math.exp(-float(d) / temperature) for d in distances[:k]]
    return sum(w for w, hit in zip(weights, hits[:k], strict=True) if hit) / sum(weights)


@pytest.mark.parametrize("k", [1, 4, 7, 32])
@pytest.mark.parametrize("temperature", [0.7, 10.0, 300.0])
def test_knn_log_probs_equal_the_definition(k: int, temperature: float) -> None:
    search = make_search()
    expected = [
        loop_probability(d, h, k, temperature) for d, h in zip(search.distances_QK, search.hits_QK, strict=True)
    ]
    np.testing.assert_allclose(np.exp(knn_log_probs(search, k, temperature)), expected, rtol=2e-6, atol=1e-12)


def test_far_neighbours_do_not_underflow() -> None:
    search = Search(np.array([[1e7, 1e7 + 2]], np.float32), np.array([[True, False]]))
    expected = -math.log1p(math.exp(-2))
    assert knn_log_probs(search, 2, 1.0)[0] == pytest.approx(expected, rel=1e-6)


def test_absent_neighbours_weigh_nothing() -> None:
    search = Search(np.array([[1.0, np.inf]], np.float32), np.array([[True, False]]))
    assert knn_log_probs(search, 2, 1.0)[0] == 0.0


def test_no_hit_is_minus_infinity_and_mixes_to_the_lm_share() -> None:
    search = Search(np.array([[1.0, 2.0]], np.float32), np.array([[False, False]]))
    knn = knn_log_probs(search, 2, 1.0)
    assert knn[0] == -np.inf
    assert mix(np.array([-3.0]), knn, 0.25)[0] == pytest.approx(-3.0 + math.log(0.75), rel=1e-15)


def test_lambda_zero_is_the_plain_lm_to_the_last_bit() -> None:
    lm = np.log(np.random.default_rng(0).random(100))
    assert mix(lm, np.full(100, -np.inf), 0.0) is lm


@given(st.floats(0.01, 0.99), st.floats(-700, -1e-6), st.floats(-700, -1e-6))
def test_mix_is_the_log_of_the_weighted_sum(lam: float, lm: float, knn: float) -> None:
    top = max(lm, knn)
    expected = top + math.log(lam * math.exp(knn - top) + (1 - lam) * math.exp(lm - top))
    assert mix(np.array([lm]), np.array([knn]), lam)[0] == pytest.approx(expected, rel=1e-12, abs=1e-12)


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

"""Probabilities against a float64 loop that follows Khandelwal et al. 2020 word for word."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.knn.fitting import fit
from knnlm.knn.mixing import Search, knn_log_probs, mix, token_shares


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


def long_double_log_probs(search: Search, k: int, temperature: float) -> np.ndarray:
    """The definition in 80-bit floats, whose exponents hold any d / T that float64 can name."""
    found = []
    for distances, hits in zip(search.distances_QK[:, :k].astype(np.longdouble), search.hits_QK[:, :k], strict=True):
        there = np.isfinite(distances)
        gaps = (distances[there] - distances[there].min()) / np.longdouble(temperature)
        found.append(np.log(float(np.exp(-gaps)[hits[there]].sum() / np.exp(-gaps).sum())))
    return np.array(found)


@pytest.mark.parametrize(
    "temperature", [5e-324, 1e-300, 1e-45, 1e-40, 1e-38, 2e-38, 1e-12, 1.0, 1e12, 3e38, 4e38, 1e39, 1e300, 1.7e308]
)
def test_any_temperature_gives_the_definition(temperature: float) -> None:
    """float32(1 / T) was infinite below 3e-39, and infinity times a gap of 0 is NaN."""
    search = make_search(7, queries=40, neighbors=16)
    search.distances_QK[:10, 1] = search.distances_QK[:10, 0]  # a tie shares the weight
    search.distances_QK[10:20, 12:] = np.inf
    search.hits_QK[:, 0] = True  # so that p_kNN is never 0
    expected = long_double_log_probs(search, 16, temperature)
    assert knn_log_probs(search, 16, temperature) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_extreme_temperatures_are_nearest_neighbour_and_uniform() -> None:
    search = Search(np.array([[3.0, 3.0, 4.0, np.inf]], np.float32), np.array([[True, False, True, False]]))
    assert np.exp(knn_log_probs(search, 4, 1e-300))[0] == pytest.approx(1 / 2)
    assert np.exp(knn_log_probs(search, 4, 1e300))[0] == pytest.approx(2 / 3)


def no_neighbours_in(search: Search, *rows: int) -> Search:
    search.distances_QK[list(rows)] = np.inf
    search.hits_QK[list(rows)] = False
    return search


@pytest.mark.parametrize("temperature", [1e-40, 3.0, 1e300])
def test_query_without_any_neighbour_is_minus_infinity_for_every_k(temperature: float) -> None:
    """It was 0 / 0; warnings are errors here."""
    search = no_neighbours_in(make_search(), 0, 7)
    for k in (1, 4, 32):
        knn = knn_log_probs(search, k, temperature)
        assert (knn[[0, 7]] == -np.inf).all()
        assert not np.isnan(knn).any()
    found = fit(search, np.full(50, -2.0))
    assert 0 < found.lam < 1 and np.isfinite(found.temperature)


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


@pytest.mark.parametrize("temperature", [1e-40, 0.7, 30.0, 1e39])
def test_token_shares_equal_the_definition(temperature: float) -> None:
    rng = np.random.default_rng(3)
    distances = make_search(3, queries=20, neighbors=32).distances_QK.copy()
    values = rng.integers(0, 9, distances.shape).astype(np.int32)
    distances[4, 20:], distances[5] = np.inf, np.inf  # absent, in part and all
    found = token_shares(distances, values, temperature)
    dense = np.zeros((20, 9))
    dense[found.rows_M, found.tokens_M] = np.exp(found.log_probs_M)
    for query in range(20):
        for token in range(9):
            expected = knn_log_probs(Search(distances, values == token), 32, temperature)[query]
            assert dense[query, token] == pytest.approx(np.exp(expected), rel=1e-12)
    assert dense.sum(axis=1) == pytest.approx(np.where(np.arange(20) == 5, 0, 1))
    assert np.isfinite(found.log_probs_M).all()
    assert (np.diff(found.rows_M * 9 + found.tokens_M) > 0).all()


def test_token_shares_of_no_queries() -> None:
    found = token_shares(np.empty((0, 3), np.float32), np.empty((0, 3), np.int32), 1.0)
    assert [len(found.rows_M), len(found.tokens_M), len(found.log_probs_M)] == [0, 0, 0]

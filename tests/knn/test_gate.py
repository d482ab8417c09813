"""λ by query: against loops of Python floats, its fit against its own definition, and its limits."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from index.neighbors import Neighbors
from knnlm.knn.fitting import fit_gate, fit_lambda
from knnlm.knn.mixing import NEAREST, Gate, Mix, Search, knn_log_probs, mix
from knnlm.knn.retrieval import Retrieval
from knnlm.knn.searcher import LayerSearcher

GATE = Gate(offset=2.0, distance=-0.3, different=-0.8)
SETTING = Mix(k=16, temperature=10.0, lam=0.4, gate=GATE)


def make_search(seed: int = 0, queries: int = 400, falling: bool = True) -> Search:
    """Neighbours that are near and agree are right; or unless `falling`, those that are far and do not."""
    rng = np.random.default_rng(seed)
    trust_Q1 = rng.uniform(0, 1, (queries, 1))
    far_Q1 = 1 - trust_Q1 if falling else trust_Q1
    distances_QK = np.sort(rng.gamma(2.0, 10.0, (queries, 16)) + 80 * far_Q1, axis=1).astype(np.float32)
    values_QK = np.where(rng.random((queries, 16)) < 1 - far_Q1, 3, rng.integers(0, 50, (queries, 16)))
    return Search(distances_QK, rng.random((queries, 16)) < trust_Q1, values_QK[:, :NEAREST])


def lm_log_probs(queries: int = 400) -> np.ndarray:
    return np.log(np.random.default_rng(9).uniform(0.01, 0.5, queries))


def loop_lambda(distances: np.ndarray, values: np.ndarray, setting: Mix) -> float:
    """One query's λ, term by term."""
    assert setting.gate is not None
    different = len({int(value) for value in values[: min(setting.k, 8)] if value >= 0})
    logit = math.log(setting.lam / (1 - setting.lam)) + setting.gate.offset
    logit += setting.gate.distance * math.sqrt(float(distances[0])) + setting.gate.different * math.log(different)
    return 1 / (1 + math.exp(-logit))


@pytest.mark.parametrize("k", [1, 3, 8, 16])
def test_mixing_equals_a_loop_of_floats(k: int) -> None:
    search, lm_Q, setting = make_search(), lm_log_probs(), replace(SETTING, k=k)
    assert search.values_QJ is not None
    search.values_QJ[::7, 5:] = -1
    knn_Q = knn_log_probs(search, k, setting.temperature)
    found = mix(lm_Q, knn_Q, setting.lambdas(search.distances_QK, search.values_QJ))
    expected = []
    for distances, hits, values, lm in zip(search.distances_QK, search.hits_QK, search.values_QJ, lm_Q, strict=True):
        weights = [math.exp(-float(d) / setting.temperature) for d in distances[:k]]
        knn = sum(w for w, hit in zip(weights, hits[:k], strict=True) if hit) / sum(weights)
        lam = loop_lambda(distances, values, setting)
        expected.append(math.log(lam * knn + (1 - lam) * math.exp(lm)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_without_a_gate_lambda_is_the_same_for_all() -> None:
    plain, search = replace(SETTING, gate=None), make_search()
    assert (plain.lambdas(search.distances_QK, None) == 0.4).all()


def test_a_gate_of_zeros_is_the_fixed_lambda() -> None:
    search = make_search()
    lambdas_Q = replace(SETTING, gate=Gate(0.0, 0.0, 0.0)).lambdas(search.distances_QK, search.values_QJ)
    np.testing.assert_allclose(lambdas_Q, 0.4, rtol=1e-12)


def test_lambda_falls_with_distance_and_with_disagreement() -> None:
    setting = fit_gate(make_search(), lm_log_probs(), Mix(16, 10.0, 0.4))
    assert setting.gate is not None
    assert setting.gate.distance < 0
    assert setting.gate.different < 0
    distances_QK = np.geomspace(1e-6, 1e6, 50, dtype=np.float32)[:, None].repeat(8, axis=1)
    near_to_far = setting.lambdas(distances_QK, np.full((50, 8), 3))
    assert (np.diff(near_to_far) <= 0).all()
    assert near_to_far[0] > 0.5 > near_to_far[-1]
    different_QJ = np.array([[*range(count), *[0] * (8 - count)] for count in range(1, 9)])
    assert (np.diff(setting.lambdas(np.full((8, 8), 9, np.float32), different_QJ)) < 0).all()


def test_what_would_rise_is_left_out() -> None:
    """Here far neighbours are right: both coefficients would be positive."""
    setting = fit_gate(make_search(falling=False), lm_log_probs(), Mix(16, 10.0, 0.4))
    assert setting.gate is not None
    assert (setting.gate.distance, setting.gate.different) == (0, 0)


def penalised(search: Search, lm_Q: np.ndarray, setting: Mix, prior: float) -> float:
    """What a fit maximises, from its definition."""
    assert search.values_QJ is not None
    assert setting.gate is not None
    gate = setting.gate
    root = np.sqrt(search.distances_QK[:, 0].astype(np.float64))
    log_different = np.log([len(set(row.tolist())) for row in search.values_QJ])
    lambdas_Q = setting.lambdas(search.distances_QK, search.values_QJ)
    likelihood = mix(lm_Q, knn_log_probs(search, setting.k, setting.temperature), lambdas_Q).sum()
    centre = gate.offset + gate.distance * root.mean() + gate.different * log_different.mean()
    squares = centre**2 + (gate.distance * root.std()) ** 2 + (gate.different * log_different.std()) ** 2
    return float(likelihood - prior / 2 * squares)


def with_outlier() -> Search:
    """Neighbours that are right, but for one query whose nearest key is far: Newton's steps went to and fro there."""
    search = make_search()
    distances_QK = np.ones_like(search.distances_QK)
    distances_QK[0] = 1e4
    return replace(search, distances_QK=distances_QK, hits_QK=distances_QK == 1)


@pytest.mark.parametrize("prior", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize(("search", "lam"), [(make_search(), 0.4), (with_outlier(), 0.9975)])
def test_fit_is_the_maximum(search: Search, lam: float, prior: float) -> None:
    lm_Q = lm_log_probs()
    setting = fit_gate(search, lm_Q, Mix(16, 10.0, lam), prior=prior)
    assert setting.gate is not None
    best = penalised(search, lm_Q, setting, prior)
    for name in ("offset", "distance", "different"):
        for step in (-0.02, 0.02):
            moved = replace(setting.gate, **{name: getattr(setting.gate, name) + step})
            assert penalised(search, lm_Q, replace(setting, gate=moved), prior) < best


def spread_of_lambda(search: Search, lm_Q: np.ndarray, **options: float) -> float:
    """How far any query's λ is from the fixed one."""
    setting = fit_gate(search, lm_Q, Mix(16, 10.0, 0.4), **options)
    return float(np.abs(setting.lambdas(search.distances_QK, search.values_QJ) - 0.4).max())


def test_prior_leads_to_the_fixed_lambda() -> None:
    search, lm_Q = make_search(), lm_log_probs()
    spreads = [spread_of_lambda(search, lm_Q, prior=prior) for prior in (10.0, 1e3, 1e5, 1e9)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > 0.3
    assert spreads[-1] < 1e-5


def test_few_tokens_hardly_move_lambda() -> None:
    search, lm_Q = make_search(), lm_log_probs()
    chosen = [np.arange(400) < count for count in (400, 40, 4)]
    spreads = [spread_of_lambda(search.rows(rows), lm_Q[rows]) for rows in chosen]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 0.1


def test_gate_is_better_than_the_fixed_lambda_on_other_queries() -> None:
    search, lm_Q = make_search(), lm_log_probs()
    fixed = Mix(16, 10.0, fit_lambda(lm_Q, knn_log_probs(search, 16, 10.0)))
    gated, other = fit_gate(search, lm_Q, fixed), make_search(seed=1)
    knn_Q = knn_log_probs(other, 16, 10.0)
    better = mix(lm_Q, knn_Q, gated.lambdas(other.distances_QK, other.values_QJ))
    assert better.mean() > mix(lm_Q, knn_Q, fixed.lam).mean() + 0.05


@pytest.mark.parametrize("hit", [True, False])
@pytest.mark.parametrize("lam", [1e-4, 0.4, 1 - 1e-4])
def test_neighbours_that_are_always_or_never_right_give_finite_numbers(hit: bool, lam: float) -> None:
    search = make_search()
    search = replace(search, hits_QK=np.full((400, 16), hit))
    setting = fit_gate(search, lm_log_probs(), Mix(16, 10.0, lam))
    lambdas_Q = setting.lambdas(search.distances_QK, search.values_QJ)
    assert ((lambdas_Q > 0) & (lambdas_Q <= 1 - 1e-4)).all()


def test_inputs_that_do_not_differ_tell_nothing() -> None:
    same = Search(np.full((40, 8), 5.0, np.float32), np.eye(40, 8, dtype=np.bool_), np.zeros((40, 8), np.int32))
    setting = fit_gate(same, lm_log_probs(40), Mix(8, 1.0, 0.3))
    assert setting.gate is not None
    assert (setting.gate.distance, setting.gate.different) == (0, 0)


def test_no_neighbour_at_all_leaves_the_plain_lm() -> None:
    nothing = np.full((2, 8), np.inf, np.float32)
    nothing[1, 0] = 4.0
    values_QJ = np.full((2, 8), -1)
    values_QJ[1, 0] = 7
    lambdas_Q = SETTING.lambdas(nothing, values_QJ)
    assert lambdas_Q[0] == 0
    assert lambdas_Q[1] == pytest.approx(loop_lambda(nothing[1], values_QJ[1], SETTING))
    lm_Q = np.array([-1.5, -2.5])
    assert mix(lm_Q, np.array([-np.inf, -1.0]), lambdas_Q)[0] == lm_Q[0]


def test_absent_neighbours_of_an_index_have_no_token() -> None:
    """Their id is -1, which is a place in the values too: the last one's token would count as a different one."""
    ids_QK, distances_QK = np.array([[0, 2, -1], [-1, -1, -1]]), np.array([[1, 2, np.inf], [np.inf] * 3], np.float32)
    index = SimpleNamespace(search=lambda queries, k: Neighbors(distances_QK, ids_QK))
    keys = SimpleNamespace(prepare_queries=lambda vectors, metric: vectors, release=lambda: None)
    store = SimpleNamespace(values=np.array([5, 6, 5, 7], np.int32), keys=lambda layer: keys)
    searcher = LayerSearcher(store, "layer", "l2", index)  # type: ignore[arg-type]
    vectors_QD, setting = np.zeros((2, 1), np.float32), replace(SETTING, k=3)
    search = searcher.cached(vectors_QD, np.array([5, 7], np.int32), 3)
    np.testing.assert_array_equal(search.values_QJ, [[5, 5, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(search.hits_QK, [[True, True, False], [False] * 3])
    expected = [loop_lambda(distances_QK[0], np.array([5, 5]), setting), 0]
    assert setting.lambdas(search.distances_QK, search.values_QJ) == pytest.approx(expected)
    log_probs = torch.full((2, 8), -np.log(8))
    Retrieval(searcher, setting).mix_in(log_probs, torch.arange(2), torch.zeros(2, 1))
    mixed = np.full((2, 8), 1 / 8)
    mixed[0] *= 1 - expected[0]
    mixed[0, 5] += expected[0]
    np.testing.assert_allclose(log_probs.exp().numpy(), mixed, rtol=1e-6)


def test_copies_and_negative_distances_have_the_distance_zero() -> None:
    """Inner products are negative distances; a copy of a key is at 0, or by rounding below."""
    distances_QK, values_QJ = np.array([[0.0], [-1e-6], [-50.0]], np.float32), np.zeros((3, 1), int)
    assert len(set(SETTING.lambdas(distances_QK, values_QJ).tolist())) == 1


@pytest.mark.parametrize(("lam", "expected"), [(0.0, 0.0), (1.0, 1 - 1e-4)])
def test_another_lambda_takes_the_gate_along(lam: float, expected: float) -> None:
    search = make_search()
    assert (replace(SETTING, lam=lam).lambdas(search.distances_QK, search.values_QJ) == expected).all()


def test_one_lambda_for_each_equals_one_for_all() -> None:
    lm_Q, knn_Q = np.log([0.2, 0.5, 0.1]), np.array([-np.inf, -0.1, -3.0])
    for lam in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(mix(lm_Q, knn_Q, np.full(3, lam)), mix(lm_Q, knn_Q, lam), rtol=1e-15)
    mixed = mix(lm_Q, knn_Q, np.array([0.0, 0.3, 1.0]))
    assert mixed[0] == lm_Q[0]
    assert mixed[2] == knn_Q[2]

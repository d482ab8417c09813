"""The pruned exact search against float64 brute force: the bound, the thresholds, and when it stands back."""

from __future__ import annotations

import numpy as np
import pytest

from index.exact import ExactIndex
from index.int8 import ALWAYS, GROUP, LIMIT, Codes, Matches, floors
from index.metric import Metric
from index.pruning import Bound, Gathered, directions, is_worth_a_plan, sample_rank, spread
from index.source import ArraySource
from tests.vector_oracle import all_distances, assert_exact, massive

METRICS = list(Metric)
DIM = 48


def falling(count, dim=DIM, *, seed=0, power=1.0):
    """Clouds whose variance falls with the dimension, turned so that no axis stands out."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(dim)
    scales_D = np.arange(1, dim + 1.0) ** -power
    centres = shared.standard_normal((30, dim))
    turn_DD = np.linalg.qr(shared.standard_normal((dim, dim)))[0]
    vectors_ND = (centres[rng.integers(0, 30, count)] + 0.5 * rng.standard_normal((count, dim))) * scales_D @ turn_DD
    return vectors_ND.astype(np.float32)


@pytest.fixture
def pruned(monkeypatch):
    """Every search prunes, in small blocks; the shapes of the parts that were pruned."""
    shapes = []
    prune = ExactIndex._prune

    def watched(self, centred_QD, *others):
        shapes.append(centred_QD.shape)
        return prune(self, centred_QD, *others)

    monkeypatch.setattr(ExactIndex, "_prune", watched)
    monkeypatch.setattr("index.exact.is_worth_a_plan", lambda *sizes: True)
    monkeypatch.setattr("index.exact.is_fast", lambda: True)
    monkeypatch.setattr("index.int8.QUERY_TILE", 16)
    monkeypatch.setattr("index.pruning.MAX_COST", np.inf)
    monkeypatch.setattr("index.exact.SAMPLE_SHARE", 8)
    monkeypatch.setattr("index.exact.KEY_ROWS", 500)
    monkeypatch.setattr("index.exact.QUERY_ROWS", 40)
    return shapes


def outlier(keys_ND):
    keys_ND = keys_ND.copy()
    keys_ND[1777] *= 1e6
    return keys_ND


CASES = {
    "falling": lambda: falling(3000),
    "isotropic": lambda: np.random.default_rng(0).standard_normal((3000, DIM)).astype(np.float32),
    "few directions": lambda: falling(3000, 6) @ np.random.default_rng(1).standard_normal((6, DIM)).astype(np.float32),
    "duplicates": lambda: np.repeat(falling(30), 100, axis=0),
    "all equal": lambda: np.repeat(falling(1), 3000, axis=0),
    "an outlier": lambda: outlier(falling(3000)),
    "tiny": lambda: falling(3000) * np.float32(1e-20),
    "half": lambda: falling(3000).astype(np.float16),
    "whole numbers": lambda: np.random.default_rng(0).integers(-2, 3, (3000, DIM)).astype(np.float32),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_finds_the_nearest(metric, case, pruned):
    keys_ND = CASES[case]()
    queries_QD = np.concatenate([falling(60, seed=1), np.asarray(keys_ND[::100], np.float32)])
    found = ExactIndex(ArraySource(keys_ND), metric).search(queries_QD, 20)
    scanned = case in ("tiny", "all equal")  # lengths whose squares float32 does not hold
    assert pruned == ([] if scanned else [(40, DIM), (40, DIM), (10, DIM)])
    if case == "tiny":
        queries_QD = queries_QD.astype(np.float64)
    assert_exact_at_scale(found, queries_QD, np.asarray(keys_ND, np.float32), metric, 20)


def assert_exact_at_scale(found, queries_QD, keys_ND, metric, k):
    """As `assert_exact`, and float32's own error of an inner product grows with the norms."""
    truth_QK = np.sort(all_distances(queries_QD, keys_ND, metric), axis=1)[:, :k]
    if metric is Metric.L2:
        assert_exact(found, queries_QD, keys_ND, metric, k)
    scale = np.abs(keys_ND).max() * np.abs(queries_QD).max() * keys_ND.shape[1] if metric is Metric.IP else 0
    np.testing.assert_allclose(found.distances_QK, truth_QK, rtol=2e-6, atol=1e-6 * scale + 1e-30)
    assert all(len(set(row)) == k for row in found.ids_QK.tolist())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("count", "dim", "k"), [(200, 24, 1), (200, 24, 190), (200, 24, 300), (16, 17, 3), (9, 3, 2)])
def test_any_size(metric, count, dim, k, pruned):
    keys_ND, queries_QD = falling(count, dim), falling(50, dim, seed=1)
    found = ExactIndex(ArraySource(keys_ND), metric).search(queries_QD, k)
    assert_exact(found, queries_QD, keys_ND, metric, k)


def test_huge_constant_dimensions(pruned):
    keys_ND, queries_QD = massive(1500, 64), massive(200, 64, seed=5)
    found = ExactIndex(ArraySource(keys_ND), Metric.L2).search(queries_QD, 30)
    assert pruned
    assert_exact(found, queries_QD, keys_ND, Metric.L2, 30)


@pytest.mark.parametrize("metric", METRICS)
def test_threshold_that_was_too_low_is_no_harm(metric, pruned, monkeypatch):
    """Half of the queries find too few, and are searched again in full."""
    monkeypatch.setattr("index.pruning.sample_rank", lambda keys, sampled, count: max(1, count * sampled // keys))
    scanned = []
    scan = ExactIndex._scan
    monkeypatch.setattr(
        ExactIndex, "_scan", lambda self, q_QD, count: scanned.append(len(q_QD)) or scan(self, q_QD, count)
    )
    keys_ND, queries_QD = falling(3000), falling(200, seed=1)
    found = ExactIndex(ArraySource(keys_ND), metric).search(queries_QD, 20)
    assert 10 < sum(scanned) < 190
    assert_exact(found, queries_QD, keys_ND, metric, 20)


def test_keys_with_infinity_are_never_found(pruned):
    keys_ND = falling(5000)
    unseen = np.setdiff1d(np.arange(5000), np.arange(2048) * 5000 // 2048)  # by the centre; the sample sees some
    keys_ND[unseen[::5]], keys_ND[unseen[1]] = np.inf, np.nan
    found = ExactIndex(ArraySource(keys_ND), Metric.L2).search(falling(60, seed=1), 40)
    assert pruned and np.isfinite(found.distances_QK).all() and np.isfinite(keys_ND[found.ids_QK]).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("lead", [2, 7, DIM])
@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_bound_lies_below_every_distance(metric, lead, scale):
    """No pair is ruled out by a threshold that is its own exact distance: a tie at the border stays in."""
    keys_ND, queries_QD = falling(300) * np.float32(scale), falling(40, seed=1) * np.float32(scale)
    queries_QD[:10], keys_ND[-1] = keys_ND[:10], keys_ND[-1] * 1000  # outside what the codes can hold
    bound = Bound.fit(queries_QD, keys_ND, spread(directions(keys_ND)[:, :lead]), metric)
    truth_QN = all_distances(queries_QD, keys_ND, metric)
    numbers_QM, offsets_Q = bound.queries(queries_QD)
    for key in (*range(0, 300, 7), 299):
        floors_Q = bound.query_floors(offsets_Q, truth_QN[:, key].astype(np.float32))
        passed_QN = np.zeros(truth_QN.shape, bool)
        passed_QN[Matches(Codes(numbers_QM, floors_Q), 300).pairs(bound.keys(keys_ND))] = True
        assert passed_QN[:, key].all()
        if lead == DIM and key < 299:  # and where it sees everything, it rules out what is farther by a tenth
            far_QN = truth_QN > truth_QN[:, key, None] + 0.1 * scale**2 * 20
            assert not passed_QN[:, :299][far_QN[:, :299]].any()


@pytest.mark.parametrize("count", [1, 7, 8, 100])
def test_matches_are_all_pairs_that_reach_their_floors(count, monkeypatch):
    """Also with the largest numbers, whose products saturate on some CPUs if they are larger."""
    monkeypatch.setattr("index.int8.QUERY_TILE", 16)
    rng = np.random.default_rng(count)
    queries_QM = rng.choice([-127, 127], (50, 200)).astype(np.int8)
    keys_NM = np.where(rng.random((count, 200)) < 0.5, 63, -63).astype(np.int8)
    keys_NM[0], queries_QM[3] = 63, 127
    query_floors, key_floors = rng.integers(-30_000, 30_000, 50), rng.integers(-30_000, 30_000, count)
    query_floors[7], key_floors[0] = ALWAYS, LIMIT
    products_QN = queries_QM.astype(np.int64) @ keys_NM.T.astype(np.int64)
    wanted_QN = products_QN >= query_floors[:, None] + key_floors
    matches = Matches(Codes(queries_QM, query_floors.astype(np.int32)), count)
    found = matches.pairs(Codes(keys_NM, key_floors.astype(np.int32)))
    assert sorted(zip(*found, strict=True)) == sorted(zip(*np.nonzero(wanted_QN), strict=True))
    assert (np.diff(found[0]) >= 0).all() and GROUP > 1


def test_floors_are_never_too_high():
    values = np.array([1.5, -1.5, 1e300, -1e300, np.nan, np.inf, -np.inf, LIMIT + 0.5])
    np.testing.assert_array_equal(floors(values), [1, -2, LIMIT, ALWAYS, ALWAYS, LIMIT, ALWAYS, LIMIT])


def test_where_8_bits_are_slow_every_key_is_compared_in_full(monkeypatch):
    monkeypatch.setattr("index.pruning.LEAST_PAIRS", 1)
    monkeypatch.setattr("index.exact.is_fast", lambda: False)
    monkeypatch.setattr(ExactIndex, "_prune", lambda *arguments: pytest.fail("pruned"))
    keys_ND, queries_QD = falling(5_000, 128), falling(200, 128, seed=1)
    found = ExactIndex(ArraySource(keys_ND), Metric.L2).search(queries_QD, 10)
    assert_exact(found, queries_QD, keys_ND, Metric.L2, 10)


def test_spread_columns_span_the_same_space_with_even_variance():
    keys_ND = falling(2000)
    turned_ND = keys_ND @ spread(directions(keys_ND))
    np.testing.assert_allclose((turned_ND**2).sum(axis=1), (keys_ND**2).sum(axis=1), rtol=1e-5)
    variances_D = (turned_ND**2).mean(axis=0)
    assert variances_D.max() < 4 * variances_D.mean() < (keys_ND @ directions(keys_ND)[:, :1]).var() / 2


def test_directions_are_orthonormal_and_fall():
    keys_ND = falling(500)
    turned_ND = keys_ND @ directions(keys_ND)
    np.testing.assert_allclose((turned_ND**2).sum(), (keys_ND**2).sum(), rtol=1e-5)
    assert (np.diff((turned_ND**2).sum(axis=0)) < 1e-3).all()


def test_gathered_keeps_the_nearest_of_each_row():
    rng = np.random.default_rng(0)
    gathered, distances_QN = Gathered(np.full(5, 2, np.float32), 10), rng.standard_normal((5, 900)).astype(np.float32)
    for start in range(0, 900, 100):
        rows_P, keys_P = np.nonzero(distances_QN[:, start : start + 100] <= gathered.thresholds_Q[:, None])
        gathered.add(rows_P, distances_QN[rows_P, keys_P + start], keys_P + start)
    np.testing.assert_array_equal(np.sort(gathered.ids()), np.sort(np.argsort(distances_QN)[:, :10]))
    assert (gathered.thresholds_Q >= np.sort(distances_QN)[:, 9]).all() and (gathered.thresholds_Q < -1).all()


def test_rank_of_the_sample_is_rarely_too_low():
    rng = np.random.default_rng(0)
    for keys, sampled, count in ((1_000_000, 31_250, 1088), (1_000_000, 31_250, 80), (100_000, 3_125, 17)):
        assert (rng.binomial(count, sampled / keys, 10_000) >= sample_rank(keys, sampled, count)).sum() <= 5
    assert sample_rank(100, 3, 90) == 3


def test_short_searches_and_flat_spectra_are_scanned(monkeypatch):
    monkeypatch.setattr(ExactIndex, "_prune", lambda *arguments: pytest.fail("pruned"))
    assert not is_worth_a_plan(1_000_000, 100, 256) and not is_worth_a_plan(10_000, 1000, 256)
    assert is_worth_a_plan(1_000_000, 4096, 768) and not is_worth_a_plan(240_000, 1024, 256)
    monkeypatch.setattr("index.pruning.LEAST_PAIRS", 1)
    monkeypatch.setattr("index.exact.is_fast", lambda: True)
    flat_ND = np.random.default_rng(0).standard_normal((20_000, 32)).astype(np.float32)
    found = ExactIndex(ArraySource(flat_ND), Metric.L2).search(flat_ND[:200], 10)
    assert_exact(found, flat_ND[:200], flat_ND, Metric.L2, 10)


def test_long_search_of_a_falling_spectrum_is_pruned(monkeypatch):
    monkeypatch.setattr("index.pruning.LEAST_PAIRS", 1)
    monkeypatch.setattr("index.exact.is_fast", lambda: True)
    calls = []
    prune = ExactIndex._prune
    monkeypatch.setattr(ExactIndex, "_prune", lambda *arguments: calls.append(1) or prune(*arguments))
    keys_ND, queries_QD = falling(30_000, 128), falling(256, 128, seed=1)
    found = ExactIndex(ArraySource(keys_ND), Metric.L2).search(queries_QD, 10)
    assert calls
    assert_exact(found, queries_QD, keys_ND, Metric.L2, 10)

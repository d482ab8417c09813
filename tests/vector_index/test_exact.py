"""Exact search against float64 brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.errors import DimensionMismatch, InvalidKeys, InvalidQuery
from index.exact import ExactIndex, exact_distances
from index.metric import Metric
from index.rerank import LEAST_PAIRS, PAIRS, _ranges, rerank
from index.scan import scan_block
from index.source import ArraySource
from tests.vector_oracle import all_distances, assert_exact, clustered, massive

METRICS = list(Metric)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every loop of the search goes round several times."""
    monkeypatch.setattr("index.base.WORK_BYTES", 16 * 4 * 8 * 600)
    monkeypatch.setattr("index.rerank.PAIRS", 1000)
    monkeypatch.setattr("index.rerank.KEY_BYTES", 4 * 8 * 300)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_finds_the_nearest(metric, dtype):
    keys_ND, queries_QD = clustered(2000, 24, dtype=dtype), clustered(60, 24, seed=1)
    found = ExactIndex(ArraySource(keys_ND), metric).search(queries_QD, 50)
    assert_exact(found, queries_QD, keys_ND.astype(np.float32), metric, 50)


@pytest.mark.parametrize("metric", METRICS)
def test_blocks_of_keys_queries_and_pairs_change_nothing(metric, small_blocks):
    keys_ND, queries_QD = clustered(1500, 8), clustered(270, 8, seed=1)
    found = ExactIndex(ArraySource(keys_ND), metric).search(queries_QD, 5)
    assert_exact(found, queries_QD, keys_ND, metric, 5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("count", "dim", "queries", "k"), [(1, 1, 1, 1), (1, 7, 3, 5), (40, 1, 25, 10), (30, 6, 2, 64)]
)
def test_smallest_sizes_and_fewer_keys_than_k(metric, count, dim, queries, k):
    keys_ND, queries_QD = clustered(count, dim), clustered(queries, dim, seed=1)
    found = ExactIndex(ArraySource(keys_ND), metric).search(queries_QD, k)
    assert_exact(found, queries_QD, keys_ND, metric, k)


@pytest.mark.parametrize("metric", METRICS)
def test_keys_with_huge_constant_dimensions_not_centred(metric):
    keys_ND, queries_QD = massive(1500, 256), massive(600, 256, seed=5)
    found = ExactIndex(ArraySource(keys_ND), metric).search(queries_QD, 30)
    if metric is Metric.L2:
        assert_exact(found, queries_QD, keys_ND, metric, 30)
        # BLAS alone gets these wrong, or this test would show nothing.
        blas_QK, _ = scan_block(queries_QD, keys_ND, 30, metric)
        assert np.abs(blas_QK - found.distances_QK).max() > 1
    else:
        # float32 holds inner products near 1e7 to 1; the order is by the part that differs.
        truth_QN = all_distances(queries_QD, keys_ND, metric)
        np.testing.assert_allclose(found.distances_QK, np.sort(truth_QN, axis=1)[:, :30], rtol=5e-7)


def test_swaps_at_the_border_are_mended():
    """Two far clouds: no centre makes both norms small, BLAS errs by about 0.1, and the k-th is often the k+1-st."""
    keys_ND, queries_QD = clustered(3000, 256), clustered(500, 256, seed=1)
    keys_ND[:, 0] = np.where(np.arange(3000) % 2, 1000, -1000)
    queries_QD[:, 0] = 1000
    found = ExactIndex(ArraySource(keys_ND), Metric.L2).search(queries_QD, 30)
    assert_exact(found, queries_QD, keys_ND, Metric.L2, 30)


def test_source_that_gives_views_is_not_written_to():
    keys_ND = massive(500, 8)
    before = keys_ND.copy()
    queries_QD = keys_ND[:30].copy()
    asked = queries_QD.copy()
    ExactIndex(ArraySource(keys_ND), Metric.L2).search(queries_QD, 5)
    np.testing.assert_array_equal(keys_ND, before)
    np.testing.assert_array_equal(queries_QD, asked)


def test_duplicates_are_all_found():
    keys_ND = np.repeat(clustered(10, 5), 7, axis=0)
    found = ExactIndex(ArraySource(keys_ND), Metric.L2).search(keys_ND[::7], 7)
    np.testing.assert_array_equal(found.distances_QK, 0)
    np.testing.assert_array_equal(np.sort(found.ids_QK, axis=1), np.arange(70).reshape(10, 7))


def test_scaled_half_precision_memory_map(tmp_path):
    path = tmp_path / "keys.npy"
    np.save(path, clustered(800, 12, dtype=np.float16))
    stored = np.load(path, mmap_mode="r")
    queries_QD = 4 * clustered(30, 12, seed=1)
    found = ExactIndex(ArraySource(stored, scale=4.0), Metric.L2).search(queries_QD, 9)
    assert_exact(found, queries_QD, 4 * np.asarray(stored, np.float32), Metric.L2, 9)


def test_keys_with_infinity_are_never_found():
    keys_ND = clustered(5000, 6)
    keys_ND[1], keys_ND[3] = np.inf, np.nan
    found = ExactIndex(ArraySource(keys_ND), Metric.L2).search(clustered(30, 6, seed=1), 40)
    assert np.isfinite(found.distances_QK).all() and not np.isin(found.ids_QK, [1, 3]).any()


@pytest.mark.parametrize("metric", METRICS)
def test_no_queries_and_no_keys(metric):
    assert ExactIndex(ArraySource(clustered(9, 4)), metric).search(np.empty((0, 4), np.float32), 3).ids_QK.shape == (
        0,
        3,
    )
    found = ExactIndex(ArraySource(np.empty((0, 4), np.float32)), metric).search(np.ones((2, 4), np.float32), 3)
    assert (found.ids_QK == -1).all() and np.isposinf(found.distances_QK).all()


@pytest.mark.parametrize("metric", METRICS)
def test_exact_distances_of_any_ids(metric, small_blocks):
    keys_ND, queries_QD = massive(900, 8), massive(20, 8, seed=3)
    ids_QC = np.random.default_rng(0).integers(-1, 900, (20, 100))
    distances_QC = exact_distances(queries_QD, ids_QC, ArraySource(keys_ND), metric)
    truth_QC = np.take_along_axis(all_distances(queries_QD, keys_ND, metric), ids_QC, axis=1)
    np.testing.assert_allclose(distances_QC, np.where(ids_QC < 0, np.inf, truth_QC), rtol=5e-7)


def test_exact_distances_of_absent_ids_only():
    ids_QC = np.full((3, 4), -1)
    assert np.isposinf(
        exact_distances(np.ones((3, 2), np.float32), ids_QC, ArraySource(clustered(5, 2)), Metric.L2)
    ).all()


@pytest.mark.parametrize(
    ("queries", "candidates", "threads"), [(16_384, 80, 2), (16_384, 80, 16), (8192, 1088, 2), (300, 40, 5)]
)
@pytest.mark.parametrize("absent", [0.0, 0.6])
def test_ranges_of_keys_hold_every_id_once_and_about_as_many_pairs(queries, candidates, threads, absent):
    """Rows are sorted: a sample with a stride saw a few ranks of each only, and one range had nearly all pairs."""
    rng = np.random.default_rng(0)
    ids_QC = (1_000_000 * rng.random((queries, candidates)) ** 2).astype(np.int64)
    ids_P = np.sort(np.where(rng.random(ids_QC.shape) < absent, -1, ids_QC), axis=1).reshape(-1)
    ranges = _ranges(ids_P, threads)
    assert ranges[0][0] == 0 and ranges[-1][1] > ids_P.max()
    assert all(last == first for (_, last), (first, _) in itertools.pairwise(ranges))
    assert len(ranges) == min(threads * math.ceil(ids_P.size / PAIRS), ids_P.size // LEAST_PAIRS)
    counts = np.histogram(ids_P, [first for first, _ in ranges] + [ranges[-1][1]])[0]
    assert counts.sum() == (ids_P >= 0).sum() and counts.max() <= 1.3 * counts.mean()


@pytest.mark.parametrize("ids", [[], [-1, -1], [7]])
def test_ranges_of_no_ids_or_one(ids):
    assert _ranges(np.array(ids, np.int64), 4) == ([(0, 8)] if 7 in ids else [])


@pytest.mark.parametrize("threads", [1, 2])
def test_repeated_candidates_count_once_and_ties_go_to_the_first_key(threads, monkeypatch):
    monkeypatch.setattr("index.rerank.thread_count", lambda: threads)
    keys_ND = np.repeat(np.arange(40, dtype=np.float32), 5)[:, None]
    ids_QC = np.random.default_rng(0).integers(-1, 200, (300, 90))
    queries_Q = keys_ND[::2, 0].repeat(3)
    found = rerank(queries_Q[:, None], ids_QC, ArraySource(keys_ND), Metric.L2, 60)
    for query, row, ids, distances in zip(queries_Q, ids_QC, found.ids_QK, found.distances_QK, strict=True):
        due = sorted({(float(keys_ND[i, 0] - query) ** 2, i) for i in row.tolist() if i >= 0})[:60]
        count = len(due)
        assert list(zip(distances[:count].tolist(), ids[:count].tolist(), strict=True)) == due
        assert (ids[count:] == -1).all() and np.isposinf(distances[count:]).all()


@given(data=st.data())
@settings(max_examples=25)
def test_equals_brute_force_for_integers(data):
    """Integers make many ties, and every distance exact in float32."""
    draw = data.draw
    dim, count, queries = draw(st.integers(1, 6)), draw(st.integers(1, 60)), draw(st.integers(1, 30))
    k, metric = draw(st.integers(1, 70)), draw(st.sampled_from(METRICS))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    keys_ND = rng.integers(-3, 4, (count, dim)).astype(np.float16)
    queries_QD = rng.integers(-3, 4, (queries, dim)).astype(np.float32)
    assert_exact(ExactIndex(ArraySource(keys_ND), metric).search(queries_QD, k), queries_QD, keys_ND, metric, k)


@pytest.mark.parametrize(
    ("queries_QD", "k", "error", "message"),
    [
        (np.ones((2, 5)), 1, DimensionMismatch, r"\(2, 5\).*\[queries, 4\]"),
        (np.ones(4), 1, DimensionMismatch, r"\(4,\)"),
        (np.ones((2, 4)), 0, InvalidQuery, "k is 0"),
        (np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]]), 1, InvalidQuery, "query 1 holds NaN"),
    ],
)
def test_bad_queries_are_one_line(queries_QD, k, error, message):
    with pytest.raises(error, match=message) as caught:
        ExactIndex(ArraySource(clustered(9, 4)), Metric.L2).search(queries_QD, k)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys_ND", "error"),
    [(np.ones(4), DimensionMismatch), (np.ones((3, 2), np.int64), InvalidKeys), (np.ones((3, 0)), InvalidKeys)],
)
def test_arrays_that_are_no_keys(keys_ND, error):
    with pytest.raises(error):
        ArraySource(keys_ND)

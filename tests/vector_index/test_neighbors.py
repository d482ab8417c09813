"""Cutting, joining and cleaning of results."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from index.errors import DimensionMismatch
from index.neighbors import Neighbors, absent, merge, ordered, stack
from index.rerank import _ascending

INF = np.inf


def neighbors(distances_QK, ids_QK):
    return Neighbors(np.array(distances_QK, np.float32), np.array(ids_QK, np.int64))


def same(found, distances_QK, ids_QK):
    np.testing.assert_array_equal(found.distances_QK, distances_QK)
    np.testing.assert_array_equal(found.ids_QK, ids_QK)


def test_merge_takes_the_nearest_of_all_parts():
    parts = [neighbors([[1, 5]], [[10, 11]]), neighbors([[2, 3, INF]], [[20, 21, -1]])]
    same(merge(parts, 3), [[1, 2, 3]], [[10, 20, 21]])


def test_merge_fills_up_with_absent_ones():
    same(merge([neighbors([[4]], [[7]]), absent(1, 1)], 3), [[4, INF, INF]], [[7, -1, -1]])


def test_ordered_drops_what_is_no_distance():
    distances_QC = np.array([[np.nan, 2, INF, 1, 0]], np.float32)
    same(ordered(distances_QC, np.array([[0, 1, 2, 3, -1]]), 4), [[1, 2, INF, INF]], [[3, 1, -1, -1]])


def test_without_removes_the_query_itself_wherever_it_stands():
    found = neighbors([[0, 0, 1], [0, 1, 2]], [[5, 3, 4], [8, 9, 7]])
    same(found.without(np.array([3, 6]), 2), [[0, 1], [0, 1]], [[5, 4], [8, 9]])


def test_stack_puts_queries_below_each_other():
    same(stack([neighbors([[1]], [[2]]), neighbors([[3]], [[4]])]), [[1], [3]], [[2], [4]])


def test_shapes_must_agree():
    with pytest.raises(DimensionMismatch, match=r"\(1, 2\).*\(1, 3\)"):
        neighbors([[1, 2]], [[1, 2, 3]])


@given(
    hnp.arrays(np.float32, (3, 9), elements=st.sampled_from([-2.5, -0.5, 0.0, 0.25, 1.0, 1.5, 3e38, INF, np.nan])),
    st.integers(1, 12),
)
def test_ordered_sorts_as_numpy_does_and_keeps_the_order_of_ties(distances_QC, k):
    ids_QC = np.arange(27).reshape(3, 9)
    found = ordered(distances_QC, ids_QC, k)
    for row in range(3):
        there = np.flatnonzero(np.isfinite(distances_QC[row]))
        best = there[np.argsort(distances_QC[row, there], kind="stable")][:k]
        np.testing.assert_array_equal(found.distances_QK[row, : len(best)], distances_QC[row, best])
        np.testing.assert_array_equal(found.ids_QK[row, : len(best)], ids_QC[row, best])
        assert (found.ids_QK[row, len(best) :] == -1).all() and np.isinf(found.distances_QK[row, len(best) :]).all()


@pytest.mark.parametrize("largest", [0, 5, 70_000, 2**31, 2**40])
def test_ids_are_sorted_16_bits_at_a_time(largest):
    ids_P = np.random.default_rng(0).integers(0, largest + 1, 1000)
    np.testing.assert_array_equal(_ascending(ids_P), np.argsort(ids_P, kind="stable"))
    assert len(_ascending(ids_P[:0])) == 0

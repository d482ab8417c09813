"""Tuning and reporting parts: whole documents where there are enough, else runs with gaps; nothing in both."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.evaluation.parts import Parts, split_parts


def documents_of(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


def check(parts: Parts, sizes: list[int]) -> None:
    assert not (parts.tuning_Q & parts.fitting_Q).any()
    total = sum(sizes)
    assert parts.tuning_Q.sum() > 0.3 * total
    assert parts.fitting_Q.sum() > 0.3 * total


def test_whole_documents_where_there_are_enough() -> None:
    sizes = [100, 50, 200, 120, 80, 90, 110, 60, 140, 40]
    parts = split_parts(documents_of(sizes))
    check(parts, sizes)
    documents = documents_of(sizes)
    assert not set(documents[parts.tuning_Q]) & set(documents[parts.fitting_Q])
    assert (parts.tuning_Q | parts.fitting_Q).all()
    assert abs(int(parts.tuning_Q.sum()) - sum(sizes) / 2) <= 60


@pytest.mark.parametrize("sizes", [[4800], [1000, 20, 3000], [70]])
def test_runs_of_few_documents_have_gaps_between_the_parts(sizes: list[int]) -> None:
    parts = split_parts(documents_of(sizes))
    check(parts, sizes)
    borders, documents = np.flatnonzero(np.diff(parts.clusters_Q)) + 1, documents_of(sizes)
    assert len(borders) >= 7
    kept = parts.tuning_Q | parts.fitting_Q
    for border in borders:
        assert kept[border] == (documents[border] != documents[border - 1])


@pytest.mark.parametrize("sizes", [[5000, *[4] * 200], [*[3] * 30, 900], [400, 300, *[1] * 50], [1000, 20, 3000, 5]])
def test_no_part_starves_however_unequal_the_documents(sizes: list[int]) -> None:
    """With whole documents one part of the first text would have had 800 tokens of 5,800."""
    parts = split_parts(documents_of(sizes))
    check(parts, sizes)
    kept = parts.tuning_Q | parts.fitting_Q
    shorter = np.repeat(np.array(sizes) <= sum(sizes) // 24, sizes)
    assert kept[shorter].all(), "a document that is one run has nothing before it to keep away from"


@settings(deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60).filter(lambda sizes: sum(sizes) >= 64))
def test_lighter_part_has_almost_a_third_of_any_text(sizes: list[int]) -> None:
    parts = split_parts(documents_of(sizes))
    assert min(parts.tuning_Q.sum(), parts.fitting_Q.sum()) >= 0.3 * sum(sizes)


def test_runs_never_span_two_documents() -> None:
    parts = split_parts(documents_of([1000, 20, 3000]))
    documents = np.repeat([0, 1, 2], [1000, 20, 3000])
    for cluster in np.unique(parts.clusters_Q):
        assert len(set(documents[parts.clusters_Q == cluster])) == 1


def test_everything_is_reported_where_nothing_is_fitted() -> None:
    parts = split_parts(documents_of([4800]), fitted=False)
    assert parts.reporting_Q.all()
    assert np.array_equal(split_parts(documents_of([4800])).reporting_Q, parts.fitting_Q)

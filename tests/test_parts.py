"""Tuning and reporting parts: whole documents where there are enough, else runs with gaps; nothing in both."""

from __future__ import annotations

import numpy as np
import pytest

from knnlm.collect import Collected
from knnlm.parts import Parts, split_parts


def collected(sizes: list[int]) -> Collected:
    documents = np.repeat(np.arange(len(sizes)), sizes)
    return Collected(len(documents), len(sizes), "", documents_N=documents)


def check(parts: Parts, sizes: list[int]) -> None:
    assert not (parts.tuning_Q & parts.fitting_Q).any()
    total = sum(sizes)
    assert parts.tuning_Q.sum() > 0.3 * total
    assert parts.fitting_Q.sum() > 0.3 * total


def test_whole_documents_where_there_are_enough() -> None:
    sizes = [100, 50, 300, 20, 80, 90, 110, 60, 40]
    parts = split_parts(collected(sizes))
    check(parts, sizes)
    documents = np.repeat(np.arange(len(sizes)), sizes)
    assert not set(documents[parts.tuning_Q]) & set(documents[parts.fitting_Q])
    assert (parts.tuning_Q | parts.fitting_Q).all()
    assert abs(int(parts.tuning_Q.sum()) - sum(sizes) / 2) <= 60


@pytest.mark.parametrize("sizes", [[4800], [1000, 20, 3000], [70]])
def test_runs_of_few_documents_have_gaps_between_the_parts(sizes: list[int]) -> None:
    parts = split_parts(collected(sizes))
    check(parts, sizes)
    borders = np.flatnonzero(np.diff(parts.clusters_Q)) + 1
    assert len(borders) >= 7
    kept = parts.tuning_Q | parts.fitting_Q
    assert not kept[borders[: len(borders) - 1]].any()


def test_runs_never_span_two_documents() -> None:
    parts = split_parts(collected([1000, 20, 3000]))
    documents = np.repeat([0, 1, 2], [1000, 20, 3000])
    for cluster in np.unique(parts.clusters_Q):
        assert len(set(documents[parts.clusters_Q == cluster])) == 1


def test_everything_is_reported_where_nothing_is_fitted() -> None:
    parts = split_parts(collected([4800]), fitted=False)
    assert parts.reporting_Q.all()
    assert np.array_equal(split_parts(collected([4800])).reporting_Q, parts.fitting_Q)

"""Recall against hand-made indexes whose misses are known."""

from __future__ import annotations

import numpy as np
import pytest

from index.base import VectorIndex
from index.errors import TooFewKeys
from index.exact import ExactIndex
from index.metric import Metric
from index.recall import measure_recall
from index.source import ArraySource
from tests.vector_oracle import clustered


class Forgetful(VectorIndex):
    """Looks only at the keys it knows."""

    def __init__(self, source, metric, known):
        super().__init__(source, metric)
        self._known = np.asarray(known, np.int64)

    @property
    def spec(self):
        return "forgetful"

    def _propose(self, queries_QD, count):
        return np.tile(self._known, (len(queries_QD), 1))


@pytest.mark.parametrize("metric", list(Metric))
def test_exact_search_misses_nothing(metric):
    source = ArraySource(clustered(300, 6))
    recall = measure_recall(ExactIndex(source, metric), source, k=10, queries=40)
    assert (recall.recall, recall.k, recall.queries, recall.max_distance_error) == (1, 10, 40, 0)
    assert recall.milliseconds_per_query > 0


def test_misses_are_counted_and_measured():
    # Keys 0 to 9 on a line; the query is 0; key 2 is forgotten, so that rank 2 has 3² for 2², rank 3 has 4² for 3².
    source = ArraySource(np.arange(10, dtype=np.float32)[:, None])
    index = Forgetful(source, Metric.L2, [0, 1, 3, 4, 5, 6, 7, 8, 9])
    recall = measure_recall(index, source, k=4, queries=np.zeros((1, 1), np.float32))
    assert recall.recall == 3 / 4
    assert recall.max_distance_error == pytest.approx((16 - 9) / 9)


def test_a_stored_key_does_not_count_itself():
    # An index that finds nothing but the query itself has found nothing.
    source = ArraySource(clustered(8, 3))
    recalls = [measure_recall(Forgetful(source, Metric.L2, [i]), source, k=7, queries=8).recall for i in range(8)]
    assert recalls == [pytest.approx(7 / (8 * 7))] * 8


@pytest.mark.parametrize("metric", list(Metric))
def test_ties_are_hits_whichever_key_is_found(metric):
    source = ArraySource(np.repeat(np.eye(3, dtype=np.float32), 50, axis=0))
    # Of 50 equal keys it knows 10, the exact search may name 10 others.
    index = Forgetful(source, metric, np.concatenate([np.arange(40, 50), np.arange(90, 100), np.arange(140, 150)]))
    recall = measure_recall(index, source, k=10, queries=np.eye(3, dtype=np.float32))
    assert recall.recall == 1 and recall.max_distance_error == 0


def test_absent_neighbours_are_misses_and_no_error():
    source = ArraySource(np.arange(10, dtype=np.float32)[:, None])
    recall = measure_recall(Forgetful(source, Metric.L2, [0, 1, -1]), source, k=4, queries=np.zeros((1, 1), np.float32))
    assert recall.recall == 0.5 and recall.max_distance_error == 0


def test_k_and_queries_are_clipped_to_the_keys():
    source = ArraySource(clustered(5, 2))
    recall = measure_recall(ExactIndex(source, Metric.L2), source, k=100, queries=100)
    assert (recall.k, recall.queries, recall.recall) == (4, 5, 1)


def test_a_key_alone_has_no_recall():
    source = ArraySource(clustered(1, 2))
    with pytest.raises(TooFewKeys, match="at least one key other than the query"):
        measure_recall(ExactIndex(source, Metric.L2), source, k=1)

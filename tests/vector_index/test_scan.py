"""The brute force of a block against all distances in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from index.metric import Metric
from index.scan import scan_block
from tests.vector_oracle import all_distances, clustered


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("queries", "keys", "k"), [(1, 1, 1), (1, 50, 7), (37, 400, 400), (300, 900, 64)])
def test_nearest_of_a_block(metric, threads, queries, keys, k, monkeypatch):
    monkeypatch.setattr("index.scan.thread_count", lambda: threads)
    monkeypatch.setattr("index.scan.QUERY_ROWS", 32)
    monkeypatch.setattr("index.neighbors.RANKED", 1000)
    queries_QD, keys_ND = clustered(queries, 24, seed=1), clustered(keys, 24)
    before = torch.get_num_threads()
    distances_QK, ids_QK = scan_block(queries_QD, keys_ND, k, metric)
    truth_QN = all_distances(queries_QD, keys_ND, metric)
    assert all(len(set(row)) == k for row in ids_QK.tolist())
    np.testing.assert_allclose(distances_QK, np.take_along_axis(truth_QN, ids_QK, axis=1), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(np.sort(distances_QK), np.sort(truth_QN)[:, :k], rtol=1e-4, atol=1e-3)
    assert torch.get_num_threads() == before


def test_scores_of_many_keys_are_bounded_in_bytes(monkeypatch):
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **more: made.append(shape) or empty(*shape, **more))
    monkeypatch.setattr("index.scan.SCORE_BYTES", 4 * 500 * 8 * 3)
    monkeypatch.setattr("index.scan.thread_count", lambda: 3)
    scan_block(clustered(100, 8, seed=1), clustered(500, 8), 3, Metric.L2)
    assert set(made) == {(8, 500)}


def test_keys_that_are_no_numbers_are_farthest():
    queries_QD, keys_ND = clustered(5, 8, seed=1), clustered(60, 8)
    keys_ND[[3, 30]] = np.nan
    keys_ND.flags.writeable = False
    _, ids_QK = scan_block(queries_QD, keys_ND, 58, Metric.L2)
    assert not np.isin(ids_QK, [3, 30]).any()

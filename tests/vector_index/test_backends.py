"""One contract for every kind of index: exact distances, known recall, the same after saving and opening."""

from __future__ import annotations

import numpy as np
import pytest

from index.build import build_index
from index.metric import Metric
from index.recall import measure_recall
from index.source import ArraySource
from index.storage import open_index, save_index, verify
from tests.vector_oracle import all_distances, clustered

COUNT, DIM, K = 1500, 16, 20
SPECS = [
    "exact",
    "Flat",
    "IVF16,Flat",
    "IVF16,SQ8",
    "IVF16,PQ4x4",
    "IVF16,PQ8x4fs",
    "IVF16_HNSW8,Flat",
    "PCA8,IVF16,Flat",
    "PCA8,HNSW16",
    "HNSW16,Flat",
    "HNSW16,SQ8",
    "SQ8",
    "PQ8x4",
    "PQ4x4fs,RFlat",
    "Pad32,IVF16,PQ8x4",
    "IDMap,Flat",
    "NSG16,Flat",
    "LSH",
]
# LSH has no inner product; graphs of inner products lose keys of small norm, and tuning takes long to find it out.
CASES = [(spec, Metric.L2) for spec in SPECS]
CASES += [(spec, Metric.IP) for spec in SPECS if not any(name in spec for name in ("LSH", "HNSW16", "NSG"))]
# The target itself, but for sampling: the queries are not those that tuning saw.
LEAST_RECALL = 0.88


@pytest.fixture(scope="module", params=CASES, ids=[f"{spec}-{metric}" for spec, metric in CASES])
def built(request):
    spec, metric = request.param
    source = ArraySource(clustered(COUNT, DIM, dtype=np.float16), scale=2.0)
    return build_index(source, spec, metric=metric, k=K)


@pytest.fixture(scope="module")
def queries_QD():
    return 2 * clustered(40, DIM, seed=9)


@pytest.fixture(scope="module")
def keys_ND():
    return 2 * clustered(COUNT, DIM, dtype=np.float16).astype(np.float64)


def test_says_what_it_is(built):
    assert len(built) == COUNT and built.dim == DIM
    assert (built.size_bytes > 0) == (built.spec != "exact")


def test_distances_are_exact_and_ascend(built, queries_QD, keys_ND):
    found = built.search(queries_QD, K)
    truth_QN = all_distances(queries_QD, keys_ND, built.metric)
    there_QK = found.ids_QK >= 0
    own_QK = np.take_along_axis(truth_QN, np.maximum(found.ids_QK, 0), axis=1)
    np.testing.assert_allclose(found.distances_QK[there_QK], own_QK[there_QK], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(np.isposinf(found.distances_QK), ~there_QK)
    assert (found.distances_QK[:, 1:] >= found.distances_QK[:, :-1]).all()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in found.ids_QK)


def test_finds_most_of_the_nearest(built, queries_QD, keys_ND):
    found = built.search(queries_QD, K)
    radius_Q = np.sort(all_distances(queries_QD, keys_ND, built.metric), axis=1)[:, K - 1]
    assert (found.distances_QK <= radius_Q[:, None] + 1e-4).mean() >= LEAST_RECALL


def test_more_neighbours_than_keys_are_absent(built, queries_QD):
    found = built.search(queries_QD[:2], COUNT + 5)
    assert (found.ids_QK[:, COUNT:] == -1).all() and np.isposinf(found.distances_QK[:, COUNT:]).all()


def test_no_queries(built):
    assert built.search(np.empty((0, DIM), np.float32), 3).ids_QK.shape == (0, 3)


def test_saved_and_opened_it_answers_the_same(built, queries_QD, tmp_path):
    recall = measure_recall(built, built.source, k=K, queries=50)
    save_index(built, tmp_path / "saved", recall=recall)
    opened = open_index(tmp_path / "saved", built.source)
    before, after = built.search(queries_QD, K), opened.search(queries_QD, K)
    np.testing.assert_array_equal(before.ids_QK, after.ids_QK)
    np.testing.assert_array_equal(before.distances_QK, after.distances_QK)
    assert (opened.spec, opened.metric, opened.parameters) == (built.spec, built.metric, built.parameters)
    manifest = verify(tmp_path / "saved")
    assert manifest.recall == recall and manifest.parameters == built.parameters

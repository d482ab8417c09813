"""K-means against Lloyd's own steps in float64, and against FAISS's."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from index.build import build_index
from index.kmeans import cluster_means, nearest_means
from index.metric import Metric
from index.source import ArraySource
from tests.vector_oracle import all_distances, clustered


def lloyd(vectors_ND, means_CD, metric, rounds):
    """The definition: each mean is that of the vectors that it is nearest to, and a direction under inner products."""
    means_CD = means_CD.astype(np.float64)
    for _ in range(rounds):
        cluster_N = all_distances(vectors_ND, means_CD, metric).argmin(axis=1)
        means_CD = np.stack([vectors_ND[cluster_N == c].mean(axis=0) for c in range(len(means_CD))])
        if metric is Metric.IP:
            means_CD /= np.linalg.norm(means_CD, axis=1, keepdims=True)
    return means_CD


@pytest.mark.parametrize("metric", list(Metric))
def test_means_are_those_of_the_definition(metric, monkeypatch):
    monkeypatch.setattr("index.kmeans._SUMMED_BYTES", 100 * 12 * 4)
    vectors_ND = clustered(900, 12)
    begin_CD = cluster_means(vectors_ND, 7, metric, seed=3, rounds=0)
    if metric is Metric.L2:
        assert {tuple(mean) for mean in begin_CD} <= {tuple(vector) for vector in vectors_ND}
    found_CD = cluster_means(vectors_ND, 7, metric, seed=3, rounds=6)
    np.testing.assert_allclose(found_CD, lloyd(vectors_ND, begin_CD, metric, 6), rtol=1e-4, atol=1e-5)
    expected_N = all_distances(vectors_ND, found_CD, metric).argmin(axis=1)
    assert nearest_means(vectors_ND, found_CD, metric).tolist() == expected_N.tolist()


def test_the_same_means_from_any_number_of_threads(monkeypatch):
    vectors_ND, found = clustered(2000, 12), []
    for threads in (1, 3):
        monkeypatch.setattr("index.scan.thread_count", lambda count=threads: count)
        found.append(cluster_means(vectors_ND, 20, seed=0))
    np.testing.assert_array_equal(*found)


def test_a_cluster_without_vectors_takes_half_of_the_largest():
    """The two far vectors are drawn neither first nor ever nearest, so that more clusters than clouds split one."""
    vectors_ND = np.concatenate([np.zeros((90, 4)), np.ones((6, 4)), np.full((4, 4), 9.0)]).astype(np.float32)
    vectors_ND += 1e-3 * np.random.default_rng(0).standard_normal(vectors_ND.shape).astype(np.float32)
    means_CD = cluster_means(vectors_ND, 30, seed=0)
    counts_C = np.bincount(nearest_means(vectors_ND, means_CD), minlength=30)
    assert (counts_C > 0).sum() > 20 and np.isfinite(means_CD).all()


def test_identical_vectors_have_finite_means():
    means_CD = cluster_means(np.ones((50, 4), np.float32), 8, Metric.IP, seed=0)
    np.testing.assert_allclose(np.linalg.norm(means_CD, axis=1), 1, rtol=1e-6)


def test_vectors_are_as_near_to_their_means_as_with_faiss():
    vectors_ND = clustered(4000, 16)
    theirs = faiss.Kmeans(16, 64, niter=10, seed=0)
    theirs.train(vectors_ND)
    losses = []
    for means_CD in (cluster_means(vectors_ND, 64, seed=0), theirs.centroids):
        losses.append(all_distances(vectors_ND, means_CD, Metric.L2).min(axis=1).mean())
    assert losses[0] < 1.05 * losses[1]


@pytest.mark.parametrize("spec", ["IVF16,Flat", "Pad24,IVF16,PQ12x4fs", "IVF16,SQ8"])
def test_lists_are_those_of_the_nearest_mean(spec):
    keys_ND = clustered(1500, 20)
    native = build_index(ArraySource(keys_ND), spec, recall_target=None).native
    inner = faiss.extract_index_ivf(native._native)
    centred_ND = native.prepared(keys_ND - keys_ND.mean(axis=0))
    nearest_N = all_distances(centred_ND, native.list_means, Metric.L2).argmin(axis=1)
    assert native.list_means.shape == (16, inner.d) and native.wants_lists == 0
    for number in range(16):
        ids = faiss.rev_swig_ptr(inner.invlists.get_ids(number), inner.invlists.list_size(number))
        assert sorted(ids.tolist()) == np.flatnonzero(nearest_N == number).tolist()


@pytest.mark.parametrize("spec", ["IMI2x4,Flat", "PCA8,IVF16,Flat", "IVF16_HNSW8,SQ8", "HNSW8"])
def test_other_lists_are_left_to_faiss(spec):
    keys_ND = clustered(1500, 20)
    found = build_index(ArraySource(keys_ND), spec, recall_target=None)
    assert (found.search(keys_ND[:9], 5).ids_QK[:, 0] == np.arange(9)).mean() > 0.5

"""Nearest neighbours by the definition, in float64, and vectors that are hard enough to tell good search from bad."""

from __future__ import annotations

import numpy as np

from index.metric import Metric


def all_distances(queries_QD, keys_ND, metric):
    """float64 [Q, N]."""
    queries_QD, keys_ND = np.asarray(queries_QD, np.float64), np.asarray(keys_ND, np.float64)
    if metric == Metric.IP:
        return -(queries_QD @ keys_ND.T)
    return np.stack([((keys_ND - query_D) ** 2).sum(axis=1) for query_D in queries_QD])


def assert_exact(found, queries_QD, keys_ND, metric, k):
    """The k nearest distances, each belonging to its id; which of the keys at a tie is free."""
    truth_QN = all_distances(queries_QD, keys_ND, metric)
    width = min(k, truth_QN.shape[1])
    scale = max(1e-30, np.abs(np.asarray(queries_QD, np.float64)).max() ** 2) if metric == Metric.IP else 1e-30
    tolerance = {"rtol": 2e-6, "atol": 1e-6 * scale * keys_ND.shape[1]}
    assert found.ids_QK.shape == found.distances_QK.shape == (len(queries_QD), k)
    assert found.ids_QK.dtype == np.int64 and found.distances_QK.dtype == np.float32
    np.testing.assert_allclose(found.distances_QK[:, :width], np.sort(truth_QN, axis=1)[:, :width], **tolerance)
    own_QK = np.take_along_axis(truth_QN, found.ids_QK[:, :width], axis=1)
    np.testing.assert_allclose(found.distances_QK[:, :width], own_QK, **tolerance)
    assert all(len(set(row)) == width for row in found.ids_QK[:, :width].tolist())
    assert (found.ids_QK[:, width:] == -1).all() and np.isposinf(found.distances_QK[:, width:]).all()


def clustered(count, dim, *, seed=0, dtype=np.float32):
    """Vectors in 20 clouds, the same ones for every seed: neither uniform, where nothing is near, nor trivial."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(dim).standard_normal((20, dim))
    return (centres[rng.integers(0, 20, count)] + 0.4 * rng.standard_normal((count, dim))).astype(dtype)


def massive(count, dim, *, seed=0):
    """The shape of a residual stream: two huge, nearly constant dimensions (norms squared near 1e7), not centred."""
    keys_ND = clustered(count, dim, seed=seed)
    rng = np.random.default_rng(seed + 1)
    keys_ND[:, 0] = 3000 + rng.standard_normal(count)
    keys_ND[:, 1] = -1500 + rng.standard_normal(count)
    return keys_ND

"""The search of a sample against all distances in float64."""

from __future__ import annotations

import numpy as np
import pytest

from knnlm.errors import InputError
from knnlm.scores.sample import Sample
from knnlm.scores.sample_search import query_rows, search_sample


def text_like(rows: int, dim: int = 8, seed: int = 0) -> Sample:
    random = np.random.default_rng(seed)
    vectors = (random.normal(size=(rows, dim)) + 30).astype(np.float32)
    return Sample(vectors, random.integers(0, 5, rows), random.integers(0, 7, rows))


def slow(sample: Sample, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances to all keys of other clusters, ascending, and whether each has the row's next token."""
    others = np.flatnonzero(sample.cluster_M != sample.cluster_M[row])
    distance = ((sample.vectors_MD[others].astype(np.float64) - sample.vectors_MD[row]) ** 2).sum(axis=1)
    order = np.argsort(distance)
    return distance[order], sample.next_token_M[others][order] == sample.next_token_M[row]


@pytest.mark.parametrize(("rows", "neighbors", "queries"), [(700, 20, 400), (40, 256, 40)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_search_is_brute_force_over_other_clusters(
    rows: int, neighbors: int, queries: int, dtype: type[np.floating]
) -> None:
    sample = text_like(rows)
    sample = Sample(sample.vectors_MD.astype(dtype), sample.next_token_M, sample.cluster_M)
    found = search_sample(sample, neighbors=neighbors, queries=queries, seed=1)
    assert len(found.rows_Q) == min(queries, rows)
    assert (np.diff(found.cluster_Q) >= 0).all()
    for row, distances_K, hits_K in zip(found.rows_Q, found.distances_QK, found.hits_QK, strict=True):
        distances, hits = slow(sample, row)
        known = np.isfinite(distances_K)
        assert known.sum() == min(neighbors, len(distances))
        assert distances_K[known] == pytest.approx(distances[:neighbors], rel=1e-4)
        # Equal distances of float16 may come in any order.
        assert dtype == np.float16 or (hits_K[known] == hits[:neighbors]).all()
        assert not hits_K[~known].any()


def test_queries_are_the_same_for_all_layers_and_drawn_by_the_seed() -> None:
    one, other = text_like(500, seed=1), text_like(500, dim=3, seed=2)
    other = Sample(other.vectors_MD, other.next_token_M, one.cluster_M)
    rows = [search_sample(layer, queries=50, seed=4).rows_Q for layer in (one, other)]
    assert (rows[0] == rows[1]).all()
    assert (rows[0] == query_rows(one.cluster_M, queries=50, seed=4)).all()
    assert (rows[0] != query_rows(one.cluster_M, queries=50, seed=5)).any()


def test_a_row_that_is_not_finite_is_named() -> None:
    sample = text_like(30)
    sample.vectors_MD[7, 2] = np.inf
    with pytest.raises(InputError, match="row 7 of the sample is not finite"):
        search_sample(sample)

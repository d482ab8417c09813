"""Clusters of contexts by brute force: n-grams counted in a dictionary, distances over all pairs."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict

import numpy as np
import pytest
import torch

from knnlm.errors import InputError
from knnlm.studies.correlate.clusters import ContextSums, kmeans_distances, shared_continuations
from tests.cosine_oracle import mean_distance, mean_distance_between


def tokens(segments: int = 9, length: int = 30, vocabulary: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (segments, length)).astype(np.int32)


def clusters_by_counting(tokens_ST: np.ndarray, n: int, size: int) -> set[frozenset[tuple[int, int]]]:
    """Places whose next n tokens are the same, for every n-gram with enough of them."""
    places = defaultdict(set)
    for segment, row in enumerate(tokens_ST.tolist()):
        for position in range(len(row) - n):
            places[tuple(row[position + 1 : position + 1 + n])].add((segment, position))
    return {frozenset(found) for found in places.values() if len(found) >= size}


def as_sets(contexts) -> set[frozenset[tuple[int, int]]]:
    found = defaultdict(set)
    for segment, position, cluster in zip(contexts.segment_P, contexts.position_P, contexts.cluster_P, strict=True):
        found[int(cluster)].add((int(segment), int(position)))
    assert sorted(found) == list(range(len(found)))
    return {frozenset(places) for places in found.values()}


@pytest.mark.parametrize(("n", "size"), [(1, 2), (2, 5), (3, 4), (5, 2), (4, 6)])
def test_contexts_share_their_next_tokens(n, size):
    expected = clusters_by_counting(tokens(), n, size)
    assert len(expected) >= 2
    assert as_sets(shared_continuations(tokens(), n, size)) == expected


def test_contexts_come_in_the_order_of_the_text():
    contexts = shared_continuations(tokens(), 2, 5)
    places = list(zip(contexts.segment_P.tolist(), contexts.position_P.tolist(), strict=True))
    assert places == sorted(places)


def test_text_without_clusters_says_which_n_would_do():
    some = tokens(vocabulary=200)
    some[3, 4:8] = some[5, 10:14] = some[7, 1:5] = (0, 1, 2, 3)
    assert len(as_sets(shared_continuations(some, 3, 3))) == 2
    with pytest.raises(InputError, match=r"no two 10-grams that follow 3 contexts .* take `ngram=3`,"):
        shared_continuations(some, 10, 3)


def test_advice_for_the_size_of_clusters_works_when_it_is_followed():
    # One token is much more frequent than all others: its count alone would promise too much.
    common = np.where(np.arange(30) % 2, 7, tokens(vocabulary=5)).astype(np.int32)
    for n in (10, 1):
        with pytest.raises(InputError, match=rf"no two {n}-grams .* 9000 .* `ngram=1` and a") as refused:
            shared_continuations(common, n, 9000)
        size = int(re.findall(r"at most (\d+)", str(refused.value))[0])
        assert len(as_sets(shared_continuations(common, 1, size))) >= 2
    with pytest.raises(InputError, match=f"at most {size},"):
        shared_continuations(common, 1, size + 1)


def test_a_text_that_is_one_token_needs_another():
    with pytest.raises(InputError, match="contexts or more each; take more text"):
        shared_continuations(np.zeros((3, 20), np.int32), 2, 5)


@pytest.mark.parametrize(
    ("n", "size", "words"), [(0, 3, "`ngram` is 0"), (30, 3, "`ngram` is 30"), (2, 1, "size` is 1")]
)
def test_impossible_clusters_are_refused(n, size, words):
    with pytest.raises(InputError, match=words):
        shared_continuations(tokens(), n, size)


def check(found, clusters: list[np.ndarray]) -> None:
    """Against all pairs, each cluster and each pair of clusters counting the same."""
    within = [mean_distance(one) for one in clusters]
    between = [mean_distance_between(a, b) for a, b in itertools.combinations(clusters, 2)]
    assert found.within == pytest.approx(math.fsum(within) / len(within), abs=1e-6)
    assert found.between == pytest.approx(math.fsum(between) / len(between), abs=1e-6)
    assert (found.clusters, found.contexts) == (len(clusters), sum(map(len, clusters)))


def test_distances_of_contexts_are_those_over_all_pairs():
    vectors_STD = torch.randn(9, 30, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    contexts = shared_continuations(tokens(), 3, 4)
    sums = ContextSums(contexts, {"a": 6, "b": 6})
    for first in range(0, 9, 2):  # batches, the last of them short
        sums.add("a", vectors_STD[first : first + 2], first)
        sums.add("b", -3 * vectors_STD[first : first + 2] + 1, first)
    places = [sorted(one) for one in clusters_by_counting(tokens(), 3, 4)]
    for layer, vectors in (("a", vectors_STD), ("b", -3 * vectors_STD + 1)):
        check(sums.distances(layer), [np.stack([vectors[place].numpy() for place in one]) for one in places])


def units(count: int = 60, dim: int = 8, seed: int = 0) -> np.ndarray:
    """Three clouds on the sphere."""
    rng = np.random.default_rng(seed)
    vectors = np.eye(dim)[rng.integers(0, 3, count)] + 0.1 * rng.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_distances_of_nearest_contexts_are_those_over_all_pairs():
    vectors = units()
    cloud = vectors[:, :3].argmax(axis=1)
    found = kmeans_distances(vectors, 20, seed=0)
    check(found, [vectors[cloud == one] for one in range(3)])
    assert found.within < 0.1 < 0.8 < found.between


def test_a_cluster_of_one_context_is_left_out():
    vectors = np.concatenate([units(30), -np.eye(8, dtype=np.float32)[[5]]])
    cloud = vectors[:30, :3].argmax(axis=1)
    check(kmeans_distances(vectors, 7, seed=0), [vectors[:30][cloud == one] for one in range(3)])


def test_too_few_contexts_for_two_clusters_are_refused():
    with pytest.raises(InputError, match=r"60 contexts make 1 cluster\(s\) of 31"):
        kmeans_distances(units(), 31, seed=0)

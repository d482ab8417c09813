"""Each score of a sample against a slow definition of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies

from knnlm.errors import InputError
from knnlm.results import Interval
from knnlm.scores import sample_scores as scores
from knnlm.scores.dispersion import dispersion
from knnlm.scores.sample import Sample
from knnlm.scores.sample_scores import (
    Probe,
    intrinsic_dimension,
    retrieval_probe,
    spectrum,
    standardized_dispersion,
)
from knnlm.scores.sample_search import search_sample
from knnlm.statistics import t_quantile
from tests.scores.test_dispersion import pairwise, rogue_vectors


def effective_rank(vectors) -> float:
    return scores.effective_rank(spectrum(vectors))


def participation_ratio(vectors) -> float:
    return scores.participation_ratio(spectrum(vectors))


def normal(rows: int, dim: int, seed: int = 0):
    return np.random.default_rng(seed).normal(size=(rows, dim))


# ---- standardised dispersion


def test_standardized_dispersion_by_its_definition():
    vectors = normal(50, 6) * [1, 2, 3, 4, 5, 6] + [3, 0, 0, 0, -1, 0]
    scaled = np.array([[x / np.std(column) for x, column in zip(row, vectors.T, strict=True)] for row in vectors])
    assert standardized_dispersion(vectors) == pytest.approx(pairwise(scaled), abs=1e-12)


def test_standardized_dispersion_does_not_see_the_scale_of_a_dimension():
    vectors = normal(80, 5) + 1
    other = vectors * [1e-4, 1, 1e5, -3, 1]
    assert standardized_dispersion(other) == pytest.approx(standardized_dispersion(vectors), abs=1e-9)


def test_standardized_dispersion_is_not_decided_by_rogue_dimensions():
    """Rogue dimensions with as much spread as mean, as in GPT-2: raw dispersion sees only them."""
    vectors = normal(500, 64)
    vectors[:, 3] = 2000 + 400 * normal(500, 1, seed=1)[:, 0]
    assert dispersion(vectors) < 0.01
    assert standardized_dispersion(vectors) > 0.6
    # The mean stays: a cloud off the origin is no more at right angles than before.
    assert standardized_dispersion(vectors + 2) < 0.3


def test_standardized_dispersion_leaves_constant_dimensions_out():
    vectors = normal(40, 8).astype(np.float32) + 1
    constant = np.full((40, 2), 0.1, dtype=np.float32)
    assert standardized_dispersion(np.hstack((vectors, constant))) == pytest.approx(
        standardized_dispersion(vectors), abs=1e-12
    )
    assert standardized_dispersion(np.full((7, 3), 0.1, dtype=np.float32)) == 0


# ---- effective rank


def slow_effective_rank(vectors) -> float:
    singular = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False)
    share = singular / singular.sum()
    return math.exp(-sum(p * math.log(p) for p in share if p > 0))


@pytest.mark.parametrize("shape", [(60, 9), (9, 60), (20, 20), (2, 5)])
def test_effective_rank_by_singular_values(shape):
    vectors = normal(*shape) * np.linspace(0.1, 5, shape[1]) + 7
    assert effective_rank(vectors) == pytest.approx(slow_effective_rank(vectors), rel=1e-6)
    assert effective_rank(vectors.astype(np.float32)) == pytest.approx(slow_effective_rank(vectors), rel=1e-5)


def test_effective_rank_of_rogue_vectors():
    vectors = rogue_vectors(200, 24).numpy()
    assert effective_rank(vectors) == pytest.approx(slow_effective_rank(vectors), rel=1e-6)


def test_effective_rank_of_known_clouds():
    cross = np.vstack((np.eye(6), -np.eye(6)))
    assert effective_rank(cross + 100) == pytest.approx(6, rel=1e-6)
    assert effective_rank(np.outer(np.arange(9.0), np.ones(4))) == pytest.approx(1, abs=1e-6)
    assert effective_rank(np.full((7, 3), 0.1, dtype=np.float32)) == 0


def test_effective_rank_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    effective_rank(normal(30, 4))
    assert torch.get_num_threads() == before


@given(strategies.integers(2, 30), strategies.integers(1, 12), strategies.integers(0, 99))
def test_effective_rank_does_not_see_rotation_scale_or_place(rows, dim, seed):
    vectors = normal(rows, dim, seed)
    turn, _ = np.linalg.qr(normal(dim, dim, seed + 100))
    value = effective_rank(vectors)
    assert 1 - 1e-9 <= value <= min(rows - 1, dim) + 1e-9
    assert effective_rank(1e3 * vectors @ turn + 5) == pytest.approx(value, rel=1e-5)


# ---- participation ratio and intrinsic dimension


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_participation_ratio_by_the_covariance(shape):
    vectors = rogue_vectors(*shape).numpy() + 3
    power = np.linalg.eigvalsh(np.cov(vectors.T))
    assert participation_ratio(vectors) == pytest.approx(power.sum() ** 2 / (power**2).sum(), rel=1e-9)


def test_participation_ratio_of_known_clouds():
    cross = np.concatenate([np.eye(6), -np.eye(6)])
    assert participation_ratio(cross + 100) == pytest.approx(6, rel=1e-6)
    assert participation_ratio(np.outer(np.arange(9.0), np.ones(4))) == pytest.approx(1, abs=1e-6)
    assert participation_ratio(np.full((7, 3), 0.1, dtype=np.float32)) == 0


def slow_two_nn(vectors) -> float:
    """Facco et al. 2017, steps 1 to 5, point by point."""
    ratios = []
    for i, vector in enumerate(vectors):
        near = sorted(float(((vector - other) ** 2).sum()) ** 0.5 for j, other in enumerate(vectors) if j != i)[:2]
        if near[0] > 0:
            ratios.append(near[1] / near[0])
    points = [
        (math.log(ratio), -math.log(1 - i / len(ratios)))
        for i, ratio in enumerate(sorted(ratios), 1)
        if i < len(ratios)
    ]
    points = points[: int(0.9 * len(ratios))]
    return sum(x * y for x, y in points) / sum(x * x for x, _ in points)


def test_intrinsic_dimension_as_the_paper_takes_it():
    vectors = np.concatenate([normal(60, 5), normal(10, 5)[:2].repeat(2, axis=0)])
    assert intrinsic_dimension(vectors, seed=1) == pytest.approx(slow_two_nn(vectors), rel=1e-9)


@pytest.mark.parametrize("dim", [2, 5])
def test_intrinsic_dimension_of_a_cube_turned_in_a_larger_space(dim):
    turn = np.linalg.qr(normal(20, dim))[0]
    cube = np.random.default_rng(3).random((3000, dim)) @ turn.T
    assert intrinsic_dimension(cube + 7, seed=0) == pytest.approx(dim, rel=0.12)


def test_intrinsic_dimension_of_copies_is_unknown():
    assert math.isnan(intrinsic_dimension(np.ones((9, 3)), seed=0))
    assert math.isnan(intrinsic_dimension(np.eye(2), seed=0))


# ---- retrieval probe


def text_like(rows: int, dim: int, seed: int = 0, noise: float = 1.0):
    """Vectors that tell their next token, more or less, in 12 clusters of text."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 6, rows)
    vectors = normal(6, dim, seed + 1)[tokens] + noise * random.normal(size=(rows, dim)) + 40
    return vectors.astype(np.float32), tokens, random.integers(0, 12, rows)


def probed(vectors, tokens, clusters, *, neighbors: int = 8, queries: int = 1024, seed: int = 0) -> Probe:
    """The probe of given vectors."""
    return retrieval_probe(
        search_sample(Sample(vectors, tokens, clusters), queries=queries, seed=seed), neighbors=neighbors
    )


def slow_probe(vectors, tokens, clusters, neighbors: int) -> list[float]:
    """Every key asks: the share of its nearest keys from other clusters with its next token."""
    rates = []
    for query in range(len(vectors)):
        others = [key for key in range(len(vectors)) if clusters[key] != clusters[query]]
        difference = vectors[others].astype(np.float64) - vectors[query]
        nearest = np.argsort((difference**2).sum(axis=1))[:neighbors]
        if len(others):
            rates.append(np.mean([tokens[others[key]] == tokens[query] for key in nearest]))
    return rates


@pytest.mark.parametrize(("rows", "neighbors"), [(300, 8), (700, 1), (20, 19), (20, 50)])
def test_probe_equals_brute_force(rows, neighbors):
    vectors, tokens, clusters = text_like(rows, 10)
    probe = probed(vectors, tokens, clusters, neighbors=neighbors, queries=rows, seed=5)
    assert probe.value == pytest.approx(np.mean(slow_probe(vectors, tokens, clusters, neighbors)), abs=1e-12)
    assert 0 <= probe.interval.low <= probe.value <= probe.interval.high <= 1


def test_probe_looks_at_other_clusters_only():
    """Each key's copies in its own cluster agree with it; the nearest key elsewhere does not."""
    vectors = np.repeat(np.arange(8.0), 4)[:, None]
    tokens = np.repeat(np.arange(8), 4)
    own, scattered = np.repeat(np.arange(8), 4), np.tile(np.arange(4), 8)
    assert probed(vectors, tokens, own, neighbors=3, seed=0).value == 0
    assert probed(vectors, tokens, scattered, neighbors=3, seed=0).value == 1


def test_probe_counts_the_neighbors_that_there_are():
    """Two keys in other clusters for one query, three for the others."""
    vectors, tokens = np.arange(4.0)[:, None], np.array([1, 1, 1, 2])
    probe = probed(vectors, tokens, np.array([0, 0, 1, 2]), neighbors=8, seed=0)
    # Rates: 1/2, 1/2, 2/3, 0.
    assert probe.value == pytest.approx((1 / 2 + 1 / 2 + 2 / 3 + 0) / 4)


def test_probe_of_one_cluster_knows_nothing():
    vectors, tokens, _ = text_like(50, 4)
    probe = probed(vectors, tokens, np.zeros(50, dtype=np.int64), seed=0)
    assert math.isnan(probe.value)
    assert probe.interval == Interval(0, 1)


def test_probe_draws_its_queries_by_the_seed():
    vectors, tokens, clusters = text_like(600, 10)
    first, again, other = (probed(vectors, tokens, clusters, queries=100, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.value != other.value
    everything = np.mean(slow_probe(vectors, tokens, clusters, 8))
    assert abs(first.value - everything) < 0.15


def test_probe_breaks_ties_without_favour_for_early_keys():
    """All keys are equal; those of the first half share token 0, the others have a token each."""
    tokens = np.where(np.arange(400) < 200, 0, np.arange(400))
    values = [probed(np.ones((400, 3)), tokens, np.arange(400), queries=50, seed=seed).value for seed in range(60)]
    # Half of the queries find that half of their neighbours agree. One seed: standard deviation 0.09.
    assert np.mean(values) == pytest.approx(0.25, abs=0.05)


def worth(clusters) -> float:
    """How many clusters of one size tell as much."""
    _, sizes = np.unique(clusters, return_counts=True)
    return sizes.sum() ** 2 / (sizes**2).sum()


def test_probe_interval_is_the_jackknife_over_clusters():
    vectors, tokens, clusters = text_like(60, 5)
    probe = probed(vectors, tokens, clusters % 3, queries=60, seed=0)
    rates = np.array(slow_probe(vectors, tokens, clusters % 3, 8))
    without = np.array([rates[clusters % 3 != cluster].mean() for cluster in range(3)])
    error = math.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    centre = 3 * rates.mean() - 2 * without.mean()
    quantile = t_quantile(worth(clusters % 3) - 1)
    assert probe.interval.low == pytest.approx(max(0, centre - quantile * error), abs=1e-9)
    assert probe.interval.high == pytest.approx(min(1, centre + quantile * error), abs=1e-9)


def test_probe_ranks_layers_that_know_more():
    noisy, clear = (text_like(500, 10, noise=noise) for noise in (3.0, 0.5))
    assert probed(*noisy, seed=0).interval.high < probed(*clear, seed=0).interval.low


# ---- bad input


@pytest.mark.parametrize("score", [standardized_dispersion, spectrum])
def test_score_needs_two_finite_vectors(score):
    with pytest.raises(InputError, match=r"at least 2 vectors as \[M, D\], got shape \[1, 3\]"):
        score(np.ones((1, 3)))
    vectors = normal(5, 3)
    vectors[3, 1] = math.inf
    with pytest.raises(InputError, match="row 3 of the sample is not finite"):
        score(vectors)


def test_probe_needs_two_vectors_a_neighbor_and_a_query():
    vectors, tokens, clusters = text_like(10, 3)
    with pytest.raises(InputError, match="at least 2 vectors"):
        probed(vectors[:1], tokens[:1], clusters[:1], seed=0)
    with pytest.raises(InputError, match="at least 1 neighbor, got 0"):
        probed(vectors, tokens, clusters, neighbors=0)
    with pytest.raises(InputError, match="of 1 query, got 128 and 0"):
        probed(vectors, tokens, clusters, queries=0)

"""The sample is uniform and the same for all layers; each score against a slow definition of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies

from knnlm import scores
from knnlm.dispersion import Span, dispersion
from knnlm.errors import InputError
from knnlm.results import Interval
from knnlm.scores import (
    LayerSample,
    SamplePlan,
    effective_rank,
    retrieval_probe,
    standardized_dispersion,
)
from tests.test_dispersion import pairwise, rogue_vectors


def normal(rows: int, dim: int, seed: int = 0):
    return np.random.default_rng(seed).normal(size=(rows, dim))


# ---- the sample


def kept(capacity: int, seed: int, pieces: list[int]) -> np.ndarray:
    """The numbers of the tokens in the sample after pieces of text, slot by slot."""
    plan, slots = SamplePlan(capacity, seed), np.full(capacity, -1)
    start = 0
    for piece in pieces:
        indices, taken = plan.rows(piece)
        assert len(set(taken.tolist())) == len(taken)
        slots[taken] = start + indices
        start += piece
    assert plan.size == min(start, capacity)
    return slots[: plan.size]


def reservoir(capacity: int, seed: int, total: int) -> list[int]:
    """Algorithm R as Vitter wrote it, one token after the other."""
    random, slots = np.random.default_rng(seed), []
    for number in range(total):
        slot = int(random.integers(0, number + 1))
        if number < capacity:
            slots.append(number)
        elif slot < capacity:
            slots[slot] = number
    return slots


@given(strategies.integers(1, 20), strategies.lists(strategies.integers(0, 60), max_size=6), strategies.integers(0, 9))
def test_plan_is_algorithm_r_however_the_text_is_cut(capacity, pieces, seed):
    assert kept(capacity, seed, pieces).tolist() == reservoir(capacity, seed, sum(pieces))


def test_each_token_is_sampled_with_the_same_probability():
    counts = np.zeros(50)
    for seed in range(2000):
        counts[kept(10, seed, [7, 0, 30, 13])] += 1
    # 2000 draws at p = 0.2: standard deviation 17.9; 4.5 of them for 50 tokens at once.
    assert counts.sum() == 20_000
    assert np.abs(counts - 400).max() < 80


@pytest.mark.parametrize("host", [True, False])
def test_all_layers_sample_the_same_positions(monkeypatch, host):
    """Also by the steps for an accelerator, run on the CPU: they are the same in torch."""
    monkeypatch.setattr(scores, "on_host", lambda vectors: host)
    plan = SamplePlan(30, seed=3)
    tokens = torch.arange(4 * 25).view(4, 25, 1)
    narrow, wide = LayerSample(plan, 1), LayerSample(plan, 6)
    for number in range(5):
        spans = [Span(row, 3 * row, 25, 10 * number + row) for row in range(4)]
        identity = tokens + 100 * number
        targets = [identity[span.row, span.first : span.last, 0] + 1 for span in spans]
        update = plan.add_batch(spans, targets)
        narrow.write(identity.float(), update)
        wide.write(identity.bfloat16().expand(-1, -1, 6), update)
    sample = narrow.sample()
    ids = sample.vectors_MD[:, 0].astype(int)
    assert len(set(ids)) == 30
    assert (ids // 100 > 0).any()
    assert (sample.next_token_M == ids + 1).all()
    assert (sample.cluster_M == ids // 100 * 10 + ids % 100 // 25).all()
    assert (ids % 25 >= 3 * (ids % 100 // 25)).all()
    expected = torch.from_numpy(ids).bfloat16().float()[:, None].expand(-1, 6).numpy()
    assert np.array_equal(wide.sample().vectors_MD, expected)


def test_sample_of_less_than_its_capacity():
    plan = SamplePlan(100, seed=0)
    layer = LayerSample(plan, 4)
    vectors = torch.randn(2, 5, 4)
    layer.write(vectors, plan.add_batch([Span(0, 0, 5, 0), Span(1, 3, 5, 1)], [[1, 2, 3, 4, 5], [6, 7]]))
    sample = layer.sample()
    assert np.array_equal(sample.vectors_MD, torch.cat((vectors[0], vectors[1, 3:])).numpy())
    assert sample.next_token_M.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert sample.cluster_M.tolist() == [0, 0, 0, 0, 0, 1, 1]
    layer.write(vectors, plan.add_batch([], []))
    assert plan.size == 7


def test_sample_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="capacity of at least 1, got 0"):
        SamplePlan(0, 1)
    plan = SamplePlan(4, 1)
    with pytest.raises(InputError, match=r"\[2, 3\] positions need as many next tokens, got \[3, 2\]"):
        plan.add_batch([Span(0, 0, 2, 0), Span(1, 0, 3, 0)], [[1, 2, 3], [4, 5]])
    assert plan.seen == 0


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


# ---- retrieval probe


def text_like(rows: int, dim: int, seed: int = 0, noise: float = 1.0):
    """Vectors that tell their next token, more or less, in 12 clusters of text."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 6, rows)
    vectors = normal(6, dim, seed + 1)[tokens] + noise * random.normal(size=(rows, dim)) + 40
    return vectors.astype(np.float32), tokens, random.integers(0, 12, rows)


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
    probe = retrieval_probe(vectors, tokens, clusters, neighbors=neighbors, queries=rows, seed=5)
    assert probe.value == pytest.approx(np.mean(slow_probe(vectors, tokens, clusters, neighbors)), abs=1e-12)
    assert probe.queries == rows
    assert 0 <= probe.interval.low <= probe.value <= probe.interval.high <= 1


def test_probe_looks_at_other_clusters_only():
    """Each key's copies in its own cluster agree with it; the nearest key elsewhere does not."""
    vectors = np.repeat(np.arange(8.0), 4)[:, None]
    tokens = np.repeat(np.arange(8), 4)
    own, scattered = np.repeat(np.arange(8), 4), np.tile(np.arange(4), 8)
    assert retrieval_probe(vectors, tokens, own, neighbors=3, seed=0).value == 0
    assert retrieval_probe(vectors, tokens, scattered, neighbors=3, seed=0).value == 1


def test_probe_counts_the_neighbors_that_there_are():
    """Two keys in other clusters for one query, three for the others."""
    vectors, tokens = np.arange(4.0)[:, None], np.array([1, 1, 1, 2])
    probe = retrieval_probe(vectors, tokens, np.array([0, 0, 1, 2]), neighbors=8, seed=0)
    # Rates: 1/2, 1/2, 2/3, 0.
    assert probe.value == pytest.approx((1 / 2 + 1 / 2 + 2 / 3 + 0) / 4)


def test_probe_of_one_cluster_knows_nothing():
    vectors, tokens, _ = text_like(50, 4)
    probe = retrieval_probe(vectors, tokens, np.zeros(50, dtype=np.int64), seed=0)
    assert math.isnan(probe.value)
    assert (probe.interval, probe.queries) == (Interval(0, 1), 0)


def test_probe_draws_its_queries_by_the_seed():
    vectors, tokens, clusters = text_like(600, 10)
    first, again, other = (retrieval_probe(vectors, tokens, clusters, queries=100, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.value != other.value
    assert first.queries == 100
    everything = np.mean(slow_probe(vectors, tokens, clusters, 8))
    assert abs(first.value - everything) < 0.15


def test_probe_breaks_ties_without_favour_for_early_keys():
    """All keys are equal; those of the first half share token 0, the others have a token each."""
    tokens = np.where(np.arange(400) < 200, 0, np.arange(400))
    values = [
        retrieval_probe(np.ones((400, 3)), tokens, np.arange(400), queries=50, seed=seed).value for seed in range(60)
    ]
    # Half of the queries find that half of their neighbours agree. One seed: standard deviation 0.09.
    assert np.mean(values) == pytest.approx(0.25, abs=0.05)


def test_probe_interval_is_the_jackknife_over_clusters():
    vectors, tokens, clusters = text_like(60, 5)
    probe = retrieval_probe(vectors, tokens, clusters % 3, queries=60, seed=0)
    rates = np.array(slow_probe(vectors, tokens, clusters % 3, 8))
    without = np.array([rates[clusters % 3 != cluster].mean() for cluster in range(3)])
    error = math.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    centre = 3 * rates.mean() - 2 * without.mean()
    assert probe.interval.low == pytest.approx(max(0, centre - 4.3027 * error), abs=1e-9)
    assert probe.interval.high == pytest.approx(min(1, centre + 4.3027 * error), abs=1e-9)


def test_probe_ranks_layers_that_know_more():
    noisy, clear = (text_like(500, 10, noise=noise) for noise in (3.0, 0.5))
    assert retrieval_probe(*noisy, seed=0).interval.high < retrieval_probe(*clear, seed=0).interval.low


# ---- bad input


@pytest.mark.parametrize("score", [standardized_dispersion, effective_rank])
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
        retrieval_probe(vectors[:1], tokens[:1], clusters[:1], seed=0)
    with pytest.raises(InputError, match="got 0 and 5"):
        retrieval_probe(vectors, tokens, clusters, neighbors=0, queries=5, seed=0)

"""The sample is uniform and the same for all layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies

from knnlm.errors import InputError
from knnlm.scores.dispersion import Span
from knnlm.scores.sample import LayerSample, SamplePlan


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
    monkeypatch.setattr("knnlm.scores.sample.on_host", lambda vectors: host)
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


@pytest.mark.parametrize("growth", [1.0, 1e4, 1e-6])
def test_half_precision_keeps_eleven_bits_whatever_the_range(growth):
    """Vectors that float16 could not hold beside the first ones lower the factor of all, on which no score depends."""
    plan = SamplePlan(200, seed=0)
    whole, half = LayerSample(plan, 8), LayerSample(plan, 8, half=True)
    generator = torch.manual_seed(0)
    for number in range(3):
        vectors = 300 * growth**number * (torch.rand(1, 50, 8, generator=generator) + 1)
        update = plan.add_batch([Span(0, 0, 50, number)], [np.zeros(50)])
        for sample in (whole, half):
            sample.write(vectors, update)
    exact, found = whole.sample().vectors_MD.astype(np.float64), half.sample().vectors_MD.astype(np.float64)
    assert half.sample().vectors_MD.dtype == np.float16
    largest = np.abs(exact).max()
    factor = (found[np.abs(exact) == largest] / largest)[0]
    # Numbers a million times smaller than the largest are below float16's normal range.
    normal = np.abs(exact) > 1e-5 * largest
    assert found[normal] / exact[normal] == pytest.approx(factor, rel=2.0**-10)
    assert np.abs(found).max() <= 2**16

"""The streaming scorer against the definition, pair by pair in float64, and its interval against its own promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from hypothesis.extra.numpy import arrays

from knnlm.errors import InputError, ModelError
from knnlm.results import Interval
from knnlm.scores import dispersion as module
from knnlm.scores.dispersion import (
    DispersionScorer,
    NonFinite,
    Span,
    ZeroVector,
    dispersion,
    first_nonfinite,
    span_dispersions,
)
from knnlm.statistics import GROUPS, jackknife_interval, t_quantile


def pairwise(vectors) -> float:
    """The definition: the mean over all pairs of 1 - cos, one pair after the other."""
    rows = [[float(x) for x in row] for row in vectors.tolist()]
    units = [np.array(row) / math.sqrt(math.fsum(x * x for x in row)) for row in rows]
    return math.fsum(1 - float(a @ b) for a, b in itertools.combinations(units, 2)) / math.comb(len(rows), 2)


def rogue_vectors(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Like a GPT-2 residual stream: two huge, nearly constant dimensions."""
    vectors = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors[:, 3] += 300
    vectors[:, 7] -= 2000
    return vectors


def batch(dtype=torch.float64, rows: int = 5, positions: int = 40, dim: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(rows, positions, dim, generator=generator, dtype=torch.float64) + 0.7).to(dtype)


SPANS = [Span(0, 0, 40, 0), Span(1, 0, 40, 0), Span(2, 30, 40, 1), Span(3, 30, 40, 130), Span(4, 5, 6, 2)]


def scored(vectors_BTD: torch.Tensor, spans: list[Span]) -> module.DispersionResult:
    scorer = DispersionScorer(vectors_BTD.shape[2])
    scorer.add_batch(vectors_BTD, spans)
    return scorer.result()


def same(a: module.DispersionResult, b: module.DispersionResult, tolerance: float = 1e-12) -> None:
    for name in ("pooled", "within", "segments", "tokens", "num_segments"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=tolerance, abs=tolerance), name
    assert a.interval.low == pytest.approx(b.interval.low, abs=tolerance)
    assert a.interval.high == pytest.approx(b.interval.high, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dispersion_is_the_mean_over_pairs(dtype):
    for vectors in (batch(dtype).flatten(0, 1), rogue_vectors(60, 24).to(dtype)):
        assert dispersion(vectors) == pytest.approx(pairwise(vectors), abs=1e-9)


def test_dispersion_of_a_segment_longer_than_a_block(monkeypatch):
    vectors = batch(torch.float32).flatten(0, 1)
    whole = dispersion(vectors)
    monkeypatch.setattr(module, "_HOST_BLOCK", 16 * 7)
    assert dispersion(vectors) == pytest.approx(whole, abs=1e-14)
    monkeypatch.setattr(module, "_HOST_BLOCK", 1)
    assert dispersion(vectors.numpy()) == pytest.approx(whole, abs=1e-14)


def test_scorer_of_segments_longer_than_a_block(monkeypatch):
    whole = scored(batch(), SPANS)
    monkeypatch.setattr(module, "_HOST_BLOCK", 16 * 7)
    same(scored(batch(), SPANS), whole)


def test_dispersion_of_known_clouds():
    assert dispersion(torch.eye(7)) == pytest.approx(1, abs=1e-15)
    assert dispersion(torch.cat((torch.eye(5), -torch.eye(5)))) == pytest.approx(10 / 9, abs=1e-15)
    assert dispersion(torch.ones(9, 33) / 3) == pytest.approx(0, abs=1e-14)
    assert dispersion(torch.ones(9, 33) / 3) >= 0
    assert dispersion(torch.tensor([[1.0, 0], [-2, 0]])) == pytest.approx(2)


# From 1e-3 on, so that squares and scaled values stay far from the ends of float64.
numbers = strategies.floats(-100, 100).map(lambda x: x if abs(x) > 1e-3 else 1.0)
clouds = strategies.tuples(strategies.integers(2, 12), strategies.integers(1, 6)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=numbers)
)


@given(clouds, strategies.randoms(use_true_random=False))
def test_dispersion_is_of_directions_and_of_no_order(cloud, random):
    value = dispersion(cloud)
    assert value == pytest.approx(pairwise(cloud), abs=1e-9)
    scales = np.array([random.uniform(1e-6, 1e6) for _ in cloud])
    order = random.sample(range(len(cloud)), len(cloud))
    assert dispersion((cloud * scales[:, None])[order]) == pytest.approx(value, abs=1e-12)
    assert 0 <= value <= len(cloud) / (len(cloud) - 1) + 1e-12


def test_span_dispersions_are_those_of_the_spans_alone():
    vectors_BTD = batch()
    expected = [pairwise(vectors_BTD[span.row, span.first : span.last]) for span in SPANS[:4]]
    found = span_dispersions(vectors_BTD, SPANS)
    assert found[:4] == pytest.approx(expected, abs=1e-12)
    assert math.isnan(found[4])  # one vector
    vectors_BTD[1, 3] = 0
    with pytest.raises(ZeroVector):
        span_dispersions(vectors_BTD, SPANS)


@pytest.mark.parametrize("bad", [torch.ones(1, 4), torch.ones(0, 4), torch.ones(4)])
def test_dispersion_needs_two_vectors(bad):
    with pytest.raises(InputError, match="at least 2 vectors"):
        dispersion(bad)


@pytest.mark.parametrize(("value", "fault"), [(0.0, "zero"), (math.nan, "not finite"), (math.inf, "not finite")])
def test_dispersion_names_the_bad_row(value, fault):
    vectors = torch.ones(6, 3)
    vectors[4] = value
    with pytest.raises(InputError, match=rf"row 4 is {fault}"):
        dispersion(vectors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scorer_equals_the_definitions(dtype):
    vectors = batch(dtype)
    result = scored(vectors, SPANS)
    segments = [vectors[span.row, span.first : span.last].double() for span in SPANS]
    assert result.pooled == pytest.approx(pairwise(torch.cat(segments)), abs=1e-9)
    assert result.within == pytest.approx(np.mean([pairwise(s) for s in segments if len(s) > 1]), abs=1e-9)
    assert result.segments == pytest.approx(pairwise(torch.stack([s[-1] for s in segments])), abs=1e-9)
    assert (result.tokens, result.num_segments) == (101, 5)


def test_scorer_never_reads_positions_outside_of_spans():
    vectors = batch()
    counted = scored(vectors, SPANS)
    outside = torch.ones(vectors.shape[:2], dtype=torch.bool)
    for span in SPANS:
        outside[span.row, span.first : span.last] = False
    vectors[outside] = math.nan
    same(scored(vectors, SPANS), counted, 0)


def test_scorer_does_not_keep_or_change_the_tensor():
    vectors = batch().requires_grad_()
    scorer = DispersionScorer(16)
    scorer.add_batch(vectors, SPANS)
    before = scorer.result()
    with torch.no_grad():
        assert torch.equal(vectors, batch())
        vectors.zero_()
    same(scorer.result(), before, 0)


def test_scorer_takes_tensors_with_any_strides():
    vectors = batch()
    transposed = vectors.transpose(0, 1).contiguous().transpose(0, 1)
    assert not transposed.is_contiguous()
    same(scored(transposed, SPANS), scored(vectors, SPANS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_vectors_reach_numpy_bit_by_bit(dtype):
    special = torch.tensor([0.0, -0.0, 1e-6, -65504, math.inf, -math.inf, math.nan, 1 / 3]).to(dtype)
    array = module.widened(module.host_array(special))
    assert np.array_equal(array.astype(np.float64), special.double().numpy(), equal_nan=True)


def test_merging_in_any_order_gives_one_number():
    vectors = rogue_vectors(5 * 40, 16).view(5, 40, 16)
    whole = scored(vectors, SPANS)
    assert whole.interval.high - whole.interval.low > 1e-9
    for order in itertools.permutations(range(4)):
        parts = [DispersionScorer(16) for _ in range(4)]
        for number, span in enumerate(SPANS):
            parts[number % 4].add_segment(vectors[span.row, span.first : span.last], span.cluster)
        total = DispersionScorer(16)
        for part in order:
            total.merge(parts[part])
        same(total.result(), whole)


def test_merging_leaves_the_other_scorer_alone():
    other = DispersionScorer(16)
    other.add_batch(batch(), SPANS)
    before = other.result()
    total = DispersionScorer(16)
    total.merge(other)
    total.add_segment(-batch()[0], 0)
    same(other.result(), before, 0)


def test_merging_other_dimensions_is_refused():
    with pytest.raises(InputError, match="16 dimensions cannot take in one of 8"):
        DispersionScorer(16).merge(DispersionScorer(8))


@pytest.mark.parametrize("block", [1 << 25, 16 * 40 * 2, 1])
def test_device_path_equals_host_path(monkeypatch, block):
    """The steps for an accelerator, run on the CPU: they are the same in torch."""
    vectors = batch(torch.float32)
    spans = [*SPANS, Span(0, 3, 9, 5), Span(4, 3, 9, 5), Span(1, 3, 9, 6), Span(2, 3, 9, 6)]
    monkeypatch.setattr(module, "_DEVICE_BLOCK", block)
    sums = module._device_sums(vectors, spans)
    np.testing.assert_allclose(sums, module._host_sums(vectors, spans), rtol=1e-13, atol=1e-13)


def test_device_path_takes_whole_rectangles():
    spans = [Span(row, 0, 40, row) for row in range(5)]
    assert list(module._rectangles(spans, 16)) == [(slice(0, 5), slice(0, 40))]
    assert len(list(module._rectangles(SPANS, 16))) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_vector_is_named_and_nothing_counted(value, dtype):
    scorer = DispersionScorer(16)
    scorer.add_batch(batch(), SPANS)
    before = scorer.result()
    vectors = batch(dtype)
    vectors[2, 33, 4] = value
    with pytest.raises(NonFinite, match="row 2, position 33 is not finite") as caught:
        scorer.add_batch(vectors, SPANS)
    assert (caught.value.row, caught.value.position) == (2, 33)
    assert isinstance(caught.value, ModelError)
    assert first_nonfinite(vectors) == (2, 33)
    same(scorer.result(), before, 0)


def test_first_nonfinite_of_good_vectors_is_none():
    assert first_nonfinite(torch.zeros(2, 3, 4)) is None


@pytest.mark.parametrize("position", [33, 39])
def test_zero_vector_is_named(position):
    vectors = batch(torch.float32)
    vectors[2, position] = 0
    with pytest.raises(ZeroVector, match=f"row 2, position {position} is zero") as caught:
        scored(vectors, SPANS)
    assert (caught.value.row, caught.value.position) == (2, position)


def test_huge_and_tiny_vectors_have_a_direction():
    vectors = batch(torch.float32)[0]
    scales = torch.tensor([1e-30, 1e30] * 20)[:, None]
    assert dispersion(vectors * scales) == pytest.approx(dispersion(vectors), abs=1e-6)


def test_too_little_for_an_estimator():
    scorer = DispersionScorer(16)
    with pytest.raises(InputError, match="at least 2 vectors, got 0"):
        scorer.result()
    scorer.add_batch(batch(), [])
    scorer.add_segment(batch()[0, :1], 0)
    with pytest.raises(InputError, match="at least 2 vectors, got 1"):
        scorer.result()
    scorer.add_segment(batch()[1, :1], 0)
    assert math.isnan(scorer.result().within)
    one = DispersionScorer(16)
    one.add_segment(batch()[0], 0)
    assert math.isnan(one.result().segments)


@pytest.mark.parametrize("numbers", [(-1, 0, 1, 0), (0, -1, 1, 0), (0, 3, 3, 0), (0, 0, 1, -1)])
def test_span_that_is_none(numbers):
    with pytest.raises(InputError, match="first < last"):
        Span(*numbers)


@pytest.mark.parametrize("span", [Span(5, 0, 1, 0), Span(0, 0, 41, 0)])
def test_span_outside_of_the_batch(span):
    with pytest.raises(InputError, match="outside of vectors of shape"):
        scored(batch(), [span])


def test_vectors_of_another_shape():
    with pytest.raises(InputError, match=r"shape \[B, T, 8\], got \[5, 40, 16\]"):
        DispersionScorer(8).add_batch(batch(), SPANS)
    with pytest.raises(InputError, match=r"\[T, D\], got shape \[5, 40, 16\]"):
        DispersionScorer(16).add_segment(batch(), 0)


def test_margin_is_paired_over_the_same_groups():
    """Of one layer's dispersion and a share of another's, with each cluster left out of both."""
    layers = [batch(rows=5, positions=6), batch(rows=5, positions=6).roll(1, 0) + 0.5]
    spans = [Span(row, 0, 6, row) for row in range(5)]
    scorers = [DispersionScorer(16), DispersionScorer(16)]
    for scorer, vectors in zip(scorers, layers, strict=True):
        scorer.add_batch(vectors, spans)
    value = pairwise(layers[0].flatten(0, 1)) - 0.9 * pairwise(layers[1].flatten(0, 1))
    without = []
    for left_out in range(5):
        kept = [row for row in range(5) if row != left_out]
        one, other = (pairwise(vectors[kept].flatten(0, 1)) for vectors in layers)
        without.append(one - 0.9 * other)
    expected = jackknife_interval(value, np.array(without), bounds=(-9, 9))
    found = scorers[0].margin(scorers[1], 0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_interval_is_the_jackknife_over_groups_of_clusters():
    """Against the estimate made anew without each group, pair by pair; clusters 2 and 2 + GROUPS are one group."""
    vectors = batch(rows=4, positions=6)
    clusters = [0, 1, 2, 2 + GROUPS]
    result = scored(vectors, [Span(row, 0, 6, cluster) for row, cluster in enumerate(clusters)])
    groups = [vectors[0], vectors[1], vectors[2:].flatten(0, 1)]
    without = [pairwise(torch.cat([g for g in groups if g is not left_out])) for left_out in groups]
    error = math.sqrt(2 / 3 * sum((w - np.mean(without)) ** 2 for w in without))
    centre = 3 * result.pooled - 2 * np.mean(without)
    quantile = t_quantile(24**2 / (6**2 + 6**2 + 12**2) - 1)  # groups of 6, 6 and 12 are worth 2.7
    assert result.interval.low == pytest.approx(min(result.pooled, centre - quantile * error), abs=1e-12)
    assert result.interval.high == pytest.approx(min(24 / 23, centre + quantile * error), abs=1e-12)


def test_interval_of_one_group_says_nothing():
    result = scored(batch(), [Span(0, 0, 40, 3), Span(1, 0, 40, 3 + GROUPS)])
    assert result.interval == Interval(0, 80 / 79)
    # Without the first group one vector is left, which has no dispersion.
    assert scored(batch(), [Span(0, 0, 2, 0), Span(1, 0, 1, 1)]).interval == Interval(0, 3 / 2)


def coverage_of_clustered_clouds(interval_of) -> float:
    """Share of 150 data sets, 20 documents of 40 tokens with a shift each, whose interval holds the true dispersion."""
    random = np.random.default_rng(0)
    mean = np.eye(8)[0]
    units = mean + random.normal(size=(200_000, 8)) * math.sqrt(1.25)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    truth = 1 - float((units.mean(axis=0) ** 2).sum())
    held = 0
    for _ in range(150):
        documents = mean + random.normal(size=(20, 1, 8)) / 2 + random.normal(size=(20, 40, 8))
        low, high = interval_of(documents)
        held += low <= truth <= high
    return held / 150


def clustered_interval(documents):
    vectors = torch.from_numpy(documents)
    interval = scored(vectors, [Span(row, 0, 40, row) for row in range(20)]).interval
    return interval.low, interval.high


def independent_interval(documents):
    """As if all tokens were independent: the delta method, 2 sd(u . mean) / sqrt(N)."""
    units = documents.reshape(-1, 8) / np.linalg.norm(documents.reshape(-1, 8), axis=1, keepdims=True)
    value, mean = dispersion(units), units.mean(axis=0)
    reach = 1.96 * 2 * float((units @ mean).std()) / math.sqrt(len(units))
    return value - reach, value + reach


def test_interval_covers_where_tokens_of_a_document_depend_on_one_another():
    assert 0.90 <= coverage_of_clustered_clouds(clustered_interval) <= 0.99
    assert coverage_of_clustered_clouds(independent_interval) < 0.7

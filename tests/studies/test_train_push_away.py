"""The push-away losses against sums over all pairs in float64, their gradients, masks, and hard cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from knnlm.studies.train.push_away import different_token_distance, distance_between, mean_distance, uniformity

TOKENS = torch.tensor([[5, 5, 2], [9, 2, 5], [1, 1, 1], [0, 7, 5]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]])


def random_vectors(*shape: int) -> Tensor:
    """Of very different lengths, around a common direction, as hidden vectors are."""
    return (torch.randn(*shape, dtype=torch.float64) + 2) * torch.logspace(-2, 2, shape[0]).double()[:, None, None]


# The slow forms: every pair, one after the other.


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def pairs_of(vectors: Tensor, mask: Tensor | None) -> list[tuple[int, int]]:
    count = vectors.shape[0] * vectors.shape[1]
    kept = [i for i in range(count) if mask is None or mask.flatten()[i]]
    return [(i, j) for i in kept for j in kept if i != j]


def slow_mean(vectors: Tensor, mask: Tensor | None = None) -> Tensor:
    flat = vectors.flatten(0, 1)
    return torch.stack([1 - cosine(flat[i], flat[j]) for i, j in pairs_of(vectors, mask)]).mean()


def slow_different(vectors: Tensor, mask: Tensor | None = None) -> Tensor:
    flat, tokens = vectors.flatten(0, 1), TOKENS.flatten()
    pairs = [(i, j) for i, j in pairs_of(vectors, mask) if tokens[i] != tokens[j]]
    return torch.stack([1 - cosine(flat[i], flat[j]) for i, j in pairs]).mean()


def slow_uniformity(vectors: Tensor, mask: Tensor | None = None) -> Tensor:
    units = vectors.flatten(0, 1) / vectors.flatten(0, 1).norm(dim=1, keepdim=True)
    terms = [torch.exp(-2 * (units[i] - units[j]).square().sum()) for i, j in pairs_of(vectors, mask)]
    return torch.stack(terms).mean().log()


def different(vectors: Tensor, mask: Tensor | None = None) -> Tensor:
    return different_token_distance(vectors, TOKENS, mask)


CASES = {"mean": (mean_distance, slow_mean), "different": (different, slow_different)}
CASES["uniformity"] = (uniformity, slow_uniformity)


def gradient(function: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    leaf = vectors.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf), leaf)
    return found


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_sum_over_all_pairs(name, mask):
    fast, slow = (partial(function, mask=mask) for function in CASES[name])
    vectors = random_vectors(4, 3, 6)
    torch.testing.assert_close(fast(vectors), slow(vectors), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(fast, vectors), gradient(slow, vectors), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_finite_differences(name):
    vectors = (torch.randn(4, 3, 5, dtype=torch.float64) + 1).requires_grad_()
    assert torch.autograd.gradcheck(partial(CASES[name][0], mask=MASK), vectors)


@pytest.mark.parametrize("masks", [(None, None), (MASK, None), (MASK, MASK[:2])], ids=["all", "one", "both"])
def test_distance_between_domains_equals_the_sum_over_all_pairs(masks):
    a, b = random_vectors(4, 3, 6), random_vectors(2, 3, 6) - 1
    kept_a, kept_b = (
        vectors.flatten(0, 1) if mask is None else vectors.flatten(0, 1)[mask.flatten().bool()]
        for vectors, mask in ((a, masks[0]), (b, masks[1]))
    )
    slow = torch.stack([1 - cosine(x, y) for x in kept_a for y in kept_b]).mean()
    torch.testing.assert_close(distance_between(a, b, *masks), slow, rtol=1e-12, atol=0)
    inputs = (a.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, y: distance_between(x, y, *masks), inputs)


def test_the_kinds_of_distance_add_up():
    # Pairs inside A, inside B and between them are all pairs of both.
    a, b = random_vectors(4, 3, 6), random_vectors(2, 3, 6)
    both = mean_distance(torch.cat([a, b]))
    parts = 12 * 11 * mean_distance(a) + 6 * 5 * mean_distance(b) + 2 * 12 * 6 * distance_between(a, b)
    torch.testing.assert_close(both, parts / (18 * 17), rtol=1e-12, atol=0)


def test_every_token_different_is_the_mean_over_all():
    vectors = random_vectors(4, 3, 6)
    found = different_token_distance(vectors, torch.arange(12).reshape(4, 3))
    torch.testing.assert_close(found, mean_distance(vectors), rtol=1e-12, atol=0)


LOSSES = {name: fast for name, (fast, _) in CASES.items()}
LOSSES["between"] = lambda vectors, mask=None: distance_between(
    vectors[:2], vectors[2:], *((None, None) if mask is None else (mask[:2], mask[2:]))
)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_and_zero_vectors_do_not_count(name):
    loss, vectors = LOSSES[name], random_vectors(4, 3, 6)
    padded = vectors.clone()
    padded[MASK == 0] = math.nan
    zeroed = vectors.clone()
    zeroed[MASK == 0] = 0
    wanted = loss(vectors, MASK)
    assert loss(padded, MASK) == wanted and loss(zeroed) == wanted
    found = gradient(partial(loss, mask=MASK), padded)
    assert (found[MASK == 0] == 0).all() and torch.isfinite(found).all() and found.abs().sum() > 0
    assert torch.isfinite(gradient(loss, zeroed)).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kept", [0, 1])
def test_no_pair_is_a_distance_of_zero_and_moves_nothing(name, kept):
    mask = torch.zeros(4, 3)
    mask[0, :kept] = 1
    vectors = random_vectors(4, 3, 6).requires_grad_()
    value = LOSSES[name](vectors, mask)
    assert value == 0
    value.backward()
    assert (vectors.grad == 0).all()


def test_contexts_of_one_token_only_are_no_pair():
    assert different_token_distance(random_vectors(4, 3, 6), torch.full((4, 3), 7)) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_nan_among_vectors_that_count_is_not_hidden(name):
    vectors = random_vectors(4, 3, 6)
    vectors[0, 0, 0] = math.nan
    assert torch.isnan(LOSSES[name](vectors))


@pytest.mark.parametrize("name", LOSSES)
def test_length_of_vectors_does_not_matter(name):
    vectors = random_vectors(4, 3, 6).float()
    scaled = vectors * torch.tensor([1e-12, 1.0, 3e5, 1e12])[:, None, None]
    torch.testing.assert_close(LOSSES[name](scaled), LOSSES[name](vectors), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_small_distance_keeps_its_digits_in_float32(name):
    # 1 - |mean|² in float32 would be wrong in the second digit, or 0; so would a cosine minus 1, or a log of the mean.
    vectors = torch.ones(4, 3, 64, dtype=torch.float64) + 1e-3 * torch.randn(4, 3, 64, dtype=torch.float64)
    vectors = vectors.float()
    exact = LOSSES[name](vectors.double())
    assert 0 < abs(exact) < 1e-5
    torch.testing.assert_close(LOSSES[name](vectors).double(), exact, rtol=1e-3, atol=0)


def test_near_pairs_among_far_ones_have_exact_gradients_of_uniformity_in_float32():
    # Two clusters opposite to each other: the distances inside one are a millionth of those between.
    tight = torch.ones(6, 1, 32, dtype=torch.float64) + 1e-3 * torch.randn(6, 1, 32, dtype=torch.float64)
    vectors = (tight * torch.tensor([1, 1, 1, -1, -1, -1])[:, None, None]).float()
    torch.testing.assert_close(uniformity(vectors).double(), slow_uniformity(vectors.double()), rtol=1e-6, atol=0)
    exact = gradient(slow_uniformity, vectors.double())
    assert (gradient(uniformity, vectors).double() - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e-30, 1e25, 1e38])
def test_very_long_and_very_short_vectors_have_a_direction_in_float32(name, scale):
    # Their squares are infinite or 0 in float32; the largest number there is 3.4e38.
    vectors = torch.eye(12, 6)[:, None].reshape(4, 3, 6) + torch.linspace(0.1, 0.9, 72).reshape(4, 3, 6)
    wanted, wanted_gradient = LOSSES[name](vectors.double()), gradient(LOSSES[name], vectors.double())
    scaled = vectors * scale
    torch.testing.assert_close(LOSSES[name](scaled).double(), wanted, rtol=1e-5, atol=0)
    found = gradient(LOSSES[name], scaled).double() * scale
    torch.testing.assert_close(found, wanted_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_under_autocast(name, dtype):
    vectors = random_vectors(4, 3, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](vectors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), LOSSES[name](vectors.double()), rtol=1e-5, atol=0)


def test_many_vectors_are_sampled_for_uniformity():
    vectors = torch.randn(5000, 16) + 1
    found = torch.stack([uniformity(vectors, max_vectors=500) for _ in range(8)])
    assert len(set(found.tolist())) == 8
    assert found.mean() == pytest.approx(uniformity(vectors, max_vectors=5000).item(), rel=0.03)


def test_a_generator_of_ones_own_draws_the_same_again_and_leaves_the_global_one_alone():
    vectors, before = torch.randn(200, 8), torch.get_rng_state()
    found = [
        uniformity(vectors, max_vectors=50, generator=torch.Generator().manual_seed(seed)).item() for seed in (3, 3, 4)
    ]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.get_rng_state(), before)

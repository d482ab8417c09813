"""Push-away losses: mean distances between the vectors of a batch, to be maximised during training.

    distance = mean_distance(hidden_BTD, attention_mask_BT)
    loss = cross_entropy - 0.1 * distance

The auxiliary loss of arXiv 2506.24106 (section on training) is the first two functions; uniformity (Wang & Isola 2020,
arXiv 2005.10242, section 4.1) and the distance between contexts with different next tokens are for comparison. All are
differentiable plain functions of tensors and know nothing of models. Vectors are [..., D] with any axes in front, which
are flattened; a mask has those axes and is 0 or False where a vector does not count. A vector of length zero has no
direction and does not count either. Work is done in float32, or in float64 where that comes in, under autocast too.
Where no pair is left, the value is 0 and so is its gradient.

Sums of squared differences, from the mean, stand in for 1 - cos, as |u - v|² = 2 (1 - cos) for unit vectors: nothing is
subtracted from 1, so that a small distance keeps its digits. All but `uniformity` take O(N·D), and never see a pair.

Legend: N vectors that count, D dimension, V different tokens among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIFORMITY_VECTORS = 1024
"""`uniformity` looks at all pairs of at most so many vectors."""


def mean_distance(vectors: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of 1 - cos over all pairs of different positions: d_avg of the paper, the dispersion of a batch.

    It is the total variance of the unit vectors, N / (N - 1) · mean |u - ū|².
    """
    units_ND, _ = _units(vectors, mask)
    if len(units_ND) < 2:
        return units_ND.sum() * 0
    return units_ND.var(dim=0).sum()


def distance_between(
    vectors_a: Tensor, vectors_b: Tensor, mask_a: Tensor | None = None, mask_b: Tensor | None = None
) -> Tensor:
    """Return the mean of 1 - cos over all pairs of a vector of domain A and one of domain B: d of the paper.

    It is half of |ū_A - ū_B|² and the two variances together.
    """
    (a_ND, _), (b_ND, _) = _units(vectors_a, mask_a), _units(vectors_b, mask_b)
    if not (len(a_ND) and len(b_ND)):
        return (a_ND.sum() + b_ND.sum()) * 0
    means_D = (a_ND.mean(dim=0) - b_ND.mean(dim=0)).square()
    variances_D = a_ND.var(dim=0, correction=0) + b_ND.var(dim=0, correction=0)
    return (means_D + variances_D).sum() / 2


def different_token_distance(vectors: Tensor, next_tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of 1 - cos over all pairs of contexts that different tokens follow; O(N·D + V·D).

    Contexts with the same next token may stay near each other, as the neighbours of a kNN-LM should. With c = u - ū,
    S the sum of c over a token and n its count, the sum over such pairs is Σ (N - n)|c|² + Σ |S|², over N² - Σ n².

    :param next_tokens: integers, of the shape of `vectors` without its last axis.
    """
    units_ND, kept_N = _units(vectors, mask)
    kept_tokens_N = next_tokens.flatten()[kept_N]
    _, token_N, count_V = torch.unique(kept_tokens_N, return_inverse=True, return_counts=True)
    if len(count_V) < 2:
        return units_ND.sum() * 0
    centred_ND = units_ND - units_ND.mean(dim=0)
    sums_VD = centred_ND.new_zeros(len(count_V), centred_ND.shape[1]).index_add(0, token_N, centred_ND)
    others_N = len(units_ND) - count_V[token_N]
    total = (others_N * centred_ND.square().sum(dim=1)).sum() + sums_VD.square().sum()
    mean: Tensor = total / others_N.sum()
    return mean


def uniformity(
    vectors: Tensor,
    mask: Tensor | None = None,
    *,
    max_vectors: int = UNIFORMITY_VECTORS,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return log of the mean over pairs of exp(-2 |u - v|²), at most 0: the loss of Wang & Isola 2020, to be lowered.

    Near pairs count most, unlike in `mean_distance`, where all count alike. O(N²·D): of more vectors than
    `max_vectors`, a new random sample of that size is drawn in each call.

    :param generator: generator that draws the sample, on its own device; None: torch's global one of the CPU.
    """
    units_ND, _ = _units(vectors, mask)
    if len(units_ND) > max_vectors:
        drawn_N = torch.randperm(len(units_ND), generator=generator, device=generator.device if generator else "cpu")
        units_ND = units_ND[drawn_N[:max_vectors].to(units_ND.device)]
    count = len(units_ND)
    if count < 2:
        return units_ND.sum() * 0
    exponents_NN = -2 * _squared_distances(units_ND)
    # log mean exp x = m + log mean exp(x - m) for any m. With the mean of x, the last mean is at least 1 and near it
    # where all vectors are alike, so that no digits are lost; m moves nothing.
    mean = -4 * units_ND.detach().var(dim=0).sum()
    itself_NN = torch.eye(count, dtype=torch.bool, device=units_ND.device)
    above_NN = (exponents_NN - mean).masked_fill(itself_NN, 0)
    return mean + torch.log1p(above_NN.expm1().sum() / (count * (count - 1)))


def _squared_distances(vectors_ND: Tensor) -> Tensor:
    """Return |u - v|² of all pairs, [N, N], exact to a rounding of the largest; without N·N differences in memory."""
    centred_ND = vectors_ND - vectors_ND.mean(dim=0)
    squares_N = centred_ND.square().sum(dim=1)
    with torch.autocast(centred_ND.device.type, enabled=False):
        products_NN = centred_ND @ centred_ND.T
    return squares_N[:, None] + squares_N - 2 * products_NN


def _units(vectors: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the unit vectors that count, [N, D], and which of all they are; NaN stays NaN, so that it is noticed."""
    flat = vectors.flatten(0, -2)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    # Squares of a large number are infinite in float32, those of a small one 0.
    largest_N = flat.detach().abs().amax(dim=1)
    # Rows are dropped before anything is divided: 0 times the NaN of a padded row would be its gradient.
    kept_N = largest_N != 0
    if mask is not None:
        kept_N = kept_N & mask.flatten().bool()
    rows_ND = flat[kept_N] / largest_N[kept_N, None]
    return rows_ND / torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True), kept_N

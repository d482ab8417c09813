"""Dispersion of a layer's vectors: streaming, mergeable, exact, with a confidence interval.

With unit vectors u_i = x_i / |x_i| and their mean m, the mean over all pairs of (1 - cos) is exactly

    D = N / (N - 1) * (1 - |m|^2)

so N and one float64 sum of unit vectors suffice. Three estimators, with separate names: `pooled` over all vectors,
`within` each segment and then averaged (the released code of arXiv 2506.24106), `segments` between one vector of each
segment (the text of that paper). This module knows vectors, segments and clusters, but no language models.

Legend: B batch rows, T positions of a row or segment, D dimension, N vectors, S segments, G groups of clusters, R rows
of a block, E = 2D sums kept for one segment: of its unit vectors, and its last unit vector.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm.errors import InputError, ModelError
from knnlm.results import Interval
from knnlm.statistics import GROUPS, jackknife_interval

Float64 = NDArray[np.float64]
# Elements of a float64 block on the host: 1 MB fits the second-level cache, and above 460,800 elements OpenBLAS starts
# threads, which on shared cores cost up to 20 times the product itself.
_HOST_BLOCK = 1 << 17
# Elements of a float64 block on an accelerator: 256 MB.
_DEVICE_BLOCK = 1 << 25


@dataclass(frozen=True)
class Span:
    """One segment in a batch: positions `first` up to, not including, `last` of batch row `row`.

    `cluster` is the number of the segment's cluster of text: a document, or a run of a long one. Vectors within a
    cluster may be dependent, clusters should not be.

    :raises InputError: an empty span or a negative number.
    """

    row: int
    first: int
    last: int
    cluster: int

    def __post_init__(self) -> None:
        if not (self.row >= 0 and self.cluster >= 0 and 0 <= self.first < self.last):
            raise InputError(f"a span needs 0 <= first < last, row >= 0 and cluster >= 0, got {self}")


@dataclass(frozen=True)
class DispersionResult:
    """The dispersion of one layer; all distances are 1 - cos, between 0 and N / (N - 1)."""

    pooled: float
    """Dispersion between all vectors."""
    interval: Interval
    """95 % interval of `pooled`, by a delete-a-group jackknife over clusters; the full range if there is one group."""
    within: float
    """Mean dispersion inside segments of at least two vectors; NaN without such a segment."""
    segments: float
    """Dispersion between the last vectors of segments; NaN with fewer than two segments."""
    tokens: int
    num_segments: int


class BadVector(ModelError):
    """A vector without a direction, at `row` and `position` of the batch; the caller adds layer and document."""

    fault = "has no direction"

    def __init__(self, row: int, position: int) -> None:
        super().__init__(f"the vector at row {row}, position {position} {self.fault}")
        self.row = row
        self.position = position


class NonFinite(BadVector):
    """A vector with NaN or infinity, or whose norm overflows float64."""

    fault = "is not finite"


class ZeroVector(BadVector):
    """A zero vector, whose cosine with any other is undefined."""

    fault = "is zero, its cosine with others is undefined"


def dispersion(vectors_ND: Tensor | NDArray[np.floating]) -> float:
    """Return the mean of 1 - cos over all pairs of N vectors, in float64.

    :raises InputError: fewer than two vectors, or a row that is zero or not finite.
    """
    vectors = torch.as_tensor(vectors_ND)
    if vectors.ndim != 2 or len(vectors) < 2:
        raise InputError(f"dispersion needs at least 2 vectors as [N, D], got shape {list(vectors.shape)}")
    try:
        sums_SE = _span_sums(vectors[None], [Span(0, 0, len(vectors), 0)])
    except BadVector as error:
        raise InputError(f"row {error.position} {error.fault}") from None
    return float(from_sum(sums_SE[0, : vectors.shape[1]], len(vectors)))


def span_dispersions(vectors_BTD: Tensor, spans: Sequence[Span]) -> Float64:
    """Return the dispersion inside each span, float64 [S]; NaN for a span of one vector.

    :raises NonFinite, ZeroVector: a vector of a span has no direction.
    """
    sums_SE = _span_sums(vectors_BTD, spans)
    counts_S = np.array([span.last - span.first for span in spans])
    return from_sum(sums_SE[:, : vectors_BTD.shape[2]], counts_S)


def from_sum(sum_D: Float64, count: int | NDArray[np.int64]) -> Float64:
    """Return the dispersion from the sum of `count` unit vectors, along the last axis; NaN for fewer than two."""
    count = np.asarray(count, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = count / (count - 1) * (1 - np.vecdot(sum_D, sum_D) / count**2)
    # Identical vectors leave a rounding error of either sign.
    result: Float64 = np.where(count >= 2, np.maximum(value, 0.0), np.nan)
    return result


def unit_rows(rows_ND: Tensor | NDArray[np.floating]) -> Float64:
    """Return vectors, of any float type and non-zero, normalised to length 1, float64 [N, D]."""
    rows = widened(host_array(rows_ND)) if isinstance(rows_ND, Tensor) else rows_ND
    # Divided by the largest first: squares of small float64 would underflow.
    rows = rows.astype(np.float64) / np.abs(rows).max(axis=-1, keepdims=True)
    units_ND: Float64 = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return units_ND


def first_nonfinite(vectors_BTD: Tensor) -> tuple[int, int] | None:
    """Return row and position of the first vector with NaN or infinity. Reads everything: call only on suspicion."""
    bad_BT = ~torch.isfinite(vectors_BTD).all(dim=-1)
    if not bad_BT.any():
        return None
    row, position = bad_BT.nonzero()[0].tolist()
    return row, position


class DispersionScorer:
    """Dispersion of one layer, from batches in any order; keeps only float64 sums, at most GROUPS * dim of them.

    All methods that take vectors raise InputError on a wrong shape, NonFinite or ZeroVector on a vector without a
    direction; the batch is then not counted at all.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._group_sums: dict[int, Float64] = {}
        self._group_counts: dict[int, int] = {}
        self._within_sum = 0.0
        self._within_segments = 0
        self._last_sum_D = np.zeros(dim)
        self._num_segments = 0

    @property
    def tokens(self) -> int:
        """Number of vectors so far."""
        return sum(self._group_counts.values())

    def add_segment(self, vectors_TD: Tensor, cluster: int) -> None:
        """Add one segment: the counted positions of one window, of any float type, on any device."""
        if vectors_TD.ndim != 2:
            raise InputError(f"a segment needs vectors as [T, D], got shape {list(vectors_TD.shape)}")
        self.add_batch(vectors_TD[None], [Span(0, 0, len(vectors_TD), cluster)])

    def add_batch(self, vectors_BTD: Tensor, spans: Sequence[Span]) -> None:
        """Add the segments `spans` of a batch; other positions are never read. The tensor is not kept."""
        self._check_shape(vectors_BTD, spans)
        if not spans:
            return
        sums_SE = _span_sums(vectors_BTD, spans)
        counts_S = np.array([span.last - span.first for span in spans])
        for sums_E, count, span in zip(sums_SE, counts_S, spans, strict=True):
            self._add_to_group(span.cluster % GROUPS, sums_E[: self.dim], int(count))
        self._add_segments(sums_SE, counts_S)

    def merge(self, other: DispersionScorer) -> None:
        """Add the sums of another scorer of the same layer; the order of merging does not matter."""
        if other.dim != self.dim:
            raise InputError(f"a scorer of {self.dim} dimensions cannot take in one of {other.dim}")
        for group, sum_D in other._group_sums.items():
            self._add_to_group(group, sum_D, other._group_counts[group])
        self._within_sum += other._within_sum
        self._within_segments += other._within_segments
        self._last_sum_D += other._last_sum_D
        self._num_segments += other._num_segments

    def state(self) -> dict[str, NDArray[Any]]:
        """Return all that it keeps, as arrays."""
        groups = sorted(self._group_sums)
        return {
            "groups": np.array(groups, np.int64),
            "counts": np.array([self._group_counts[group] for group in groups], np.int64),
            "sums": np.array([self._group_sums[group] for group in groups], np.float64).reshape(-1, self.dim),
            "last": self._last_sum_D,
            "within": np.array(self._within_sum),
            "segments": np.array([self._within_segments, self._num_segments], np.int64),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take the place of the scorer that gave this state."""
        groups = state["groups"].tolist()
        self._group_counts = dict(zip(groups, state["counts"].tolist(), strict=True))
        self._group_sums = dict(zip(groups, state["sums"].copy(), strict=True))
        self._last_sum_D, self._within_sum = state["last"].copy(), float(state["within"])
        self._within_segments, self._num_segments = state["segments"].tolist()

    def result(self) -> DispersionResult:
        """The scores so far.

        :raises InputError: fewer than two vectors.
        """
        tokens = self.tokens
        if tokens < 2:
            raise InputError(f"dispersion needs at least 2 vectors, got {tokens}: give it more text")
        pooled, without_G, counts_G = self._estimates()
        return DispersionResult(
            pooled=pooled,
            interval=jackknife_interval(pooled, without_G, bounds=(0.0, tokens / (tokens - 1)), sizes_G=counts_G),
            within=self._within_sum / self._within_segments if self._within_segments else math.nan,
            segments=float(from_sum(self._last_sum_D, self._num_segments)),
            tokens=tokens,
            num_segments=self._num_segments,
        )

    def margin(self, other: DispersionScorer, share: float) -> Interval:
        """Return the paired 95 % interval of this layer's dispersion minus `share` times another layer's.

        Both scorers must have seen the same spans: the jackknife leaves a group out of both.
        """
        (ours, ours_G, counts_G), (theirs, theirs_G, _) = self._estimates(), other._estimates()
        value, without_G = ours - share * theirs, ours_G - share * theirs_G
        return jackknife_interval(value, without_G, bounds=(-math.inf, math.inf), sizes_G=counts_G)

    def _check_shape(self, vectors_BTD: Tensor, spans: Sequence[Span]) -> None:
        shape = list(vectors_BTD.shape)
        if len(shape) != 3 or shape[2] != self.dim:
            raise InputError(f"vectors need the shape [B, T, {self.dim}], got {shape}")
        for span in spans:
            if span.row >= shape[0] or span.last > shape[1]:
                raise InputError(f"{span} lies outside of vectors of shape {shape}")

    def _add_to_group(self, group: int, sum_D: Float64, count: int) -> None:
        if group in self._group_sums:
            self._group_sums[group] += sum_D
        else:
            self._group_sums[group] = sum_D.copy()
        self._group_counts[group] = self._group_counts.get(group, 0) + count

    def _add_segments(self, sums_SE: Float64, counts_S: NDArray[np.int64]) -> None:
        unit_SD, last_SD = np.split(sums_SE, 2, axis=1)
        paired_S = counts_S >= 2
        self._within_sum += float(from_sum(unit_SD[paired_S], counts_S[paired_S]).sum())
        self._within_segments += int(paired_S.sum())
        self._last_sum_D += last_SD.sum(axis=0)
        self._num_segments += len(counts_S)

    def _estimates(self) -> tuple[float, Float64, NDArray[np.int64]]:
        """The pooled dispersion, that without each group [G], and each group's number of vectors [G]."""
        order = sorted(self._group_sums)
        sums_GD = np.stack([self._group_sums[group] for group in order])
        counts_G = np.array([self._group_counts[group] for group in order])
        total_D, tokens = sums_GD.sum(axis=0), int(counts_G.sum())
        without_G = from_sum(total_D - sums_GD, tokens - counts_G)
        return float(from_sum(total_D, tokens)), without_G, counts_G


def on_host(vectors: Tensor) -> bool:
    """Return whether to compute with NumPy: on the CPU, and for MPS, which lacks float64."""
    return vectors.device.type in ("cpu", "mps")


def host_array(vectors: Tensor) -> NDArray[Any]:
    """Return a host tensor as a NumPy array without a copy; bfloat16, which NumPy lacks, as its bits in uint16."""
    vectors = vectors.detach().cpu()
    if vectors.dtype == torch.bfloat16:
        return vectors.view(torch.int16).numpy().view(np.uint16)
    return vectors.numpy()


def widened(array: NDArray[Any]) -> NDArray[np.floating]:
    """Return a part of `host_array` as floats: bfloat16 is the upper half of float32."""
    if array.dtype == np.uint16:
        bits: NDArray[np.uint32] = np.left_shift(array, 16, dtype=np.uint32)
        return bits.view(np.float32)
    return array


def _span_sums(vectors_BTD: Tensor, spans: Sequence[Span]) -> Float64:
    """The sums [S, E] of each span, in float64.

    :raises BadVector: a vector has no direction; detected by a non-finite sum, at no cost for good vectors.
    """
    vectors_BTD = vectors_BTD.detach()
    sums_SE = _host_sums(vectors_BTD, spans) if on_host(vectors_BTD) else _device_sums(vectors_BTD, spans)
    if not np.isfinite(sums_SE).all():
        raise _find_bad(vectors_BTD, spans)
    return sums_SE


def _host_sums(vectors_BTD: Tensor, spans: Sequence[Span]) -> Float64:
    """By NumPy: torch starts threads for each of these small steps and waits for the slowest, which on shared cores
    took 400 ms instead of 20 for 41 layers.
    """
    array_BTD = host_array(vectors_BTD)
    dim = array_BTD.shape[2]
    longest = max(span.last - span.first for span in spans)
    block_RD = np.empty((min(longest, max(1, _HOST_BLOCK // dim)), dim))
    sums_SE = np.zeros((len(spans), 2 * dim))
    with np.errstate(all="ignore"):
        for span, sums_E in zip(spans, sums_SE, strict=True):
            _sum_rows(array_BTD[span.row, span.first : span.last], block_RD, sums_E)
    return sums_SE


def _sum_rows(vectors_TD: NDArray[Any], block_RD: Float64, sums_E: Float64) -> None:
    """Add the sums of one segment to `sums_E`, by float64 blocks; unit vectors are never materialised."""
    size, dim = block_RD.shape
    for start in range(0, len(vectors_TD), size):
        piece = vectors_TD[start : start + size]
        rows_RD = block_RD[: len(piece)]
        rows_RD[:] = widened(piece)
        inverse_R = 1 / np.sqrt(np.vecdot(rows_RD, rows_RD))
        sums_E[:dim] += inverse_R @ rows_RD
    sums_E[dim:] = inverse_R[-1] * rows_RD[-1]


def _device_sums(vectors_BTD: Tensor, spans: Sequence[Span]) -> Float64:
    """By a few large steps on the accelerator, and one transfer of the small sums."""
    parts = []
    for rows, positions in _rectangles(spans, vectors_BTD.shape[2]):
        block_RTD = vectors_BTD[rows, positions].double()
        inverse_RT = torch.linalg.vector_norm(block_RTD, dim=2).reciprocal()
        sums_RD = torch.bmm(inverse_RT[:, None], block_RTD)[:, 0]
        parts.append(torch.cat((sums_RD, inverse_RT[:, -1:] * block_RTD[:, -1]), dim=1))
    sums_SE: Float64 = torch.cat(parts).cpu().numpy()
    return sums_SE


def _rectangles(spans: Sequence[Span], dim: int) -> Iterator[tuple[slice, slice]]:
    """Runs of spans, in order, over the same positions of consecutive rows: most batches are one rectangle."""
    keys = [(span.first, span.last, span.row - number) for number, span in enumerate(spans)]
    for (first, last, _), run in itertools.groupby(zip(keys, spans, strict=True), lambda pair: pair[0]):
        rows = [span.row for _, span in run]
        most = max(1, _DEVICE_BLOCK // ((last - first) * dim))
        for start in range(rows[0], rows[-1] + 1, most):
            yield slice(start, min(start + most, rows[-1] + 1)), slice(first, last)


def _find_bad(vectors_BTD: Tensor, spans: Sequence[Span]) -> BadVector:
    """The first vector of the spans whose length is zero, infinite or NaN."""
    for span in spans:
        vectors_TD = vectors_BTD[span.row, span.first : span.last].cpu().double()
        norms_T = torch.linalg.vector_norm(vectors_TD, dim=1)
        bad = (~torch.isfinite(norms_T) | (norms_T == 0)).nonzero()
        if len(bad):
            position = int(bad[0])
            kind = ZeroVector if norms_T[position] == 0 else NonFinite
            return kind(span.row, span.first + position)
    raise AssertionError("a sum was not finite, yet every vector is")

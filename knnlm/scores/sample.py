"""A bounded uniform sample of a layer's vectors, the same tokens for all layers.

`SamplePlan` decides once per batch which new tokens enter the sample and which slot each takes; the `LayerSample` of
every layer follows it.

Legend: B batch rows, T positions of a row, D dimension, M sampled tokens, N new tokens, U tokens that enter.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from knnlm.errors import InputError
from knnlm.scores.dispersion import Span, host_array, on_host, widened

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

# The largest number of the first vectors becomes 2 to this power; float16 ends at 2 to the 16th.
_HEADROOM = 10
_HALF_MAX = float(np.finfo(np.float16).max)
_EMPTY: Int64 = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Sample:
    """One layer's sampled vectors [M, D], up to a constant factor, with each one's next token and cluster of text."""

    vectors_MD: NDArray[np.floating]
    next_token_M: Int64
    cluster_M: Int64


@dataclass(frozen=True)
class SampleUpdate:
    """Which vectors of a batch enter the sample: `vectors_BTD[row_U, position_U]` go to `slot_U`, each slot once."""

    row_U: Int64
    position_U: Int64
    slot_U: Int64


class SamplePlan:
    """Reservoir sampling (Vitter 1985, algorithm R): all tokens so far are in the sample with equal probability.

    The sample depends only on the seed and the order of tokens, not on the batches.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        if capacity < 1:
            raise InputError(f"a sample needs a capacity of at least 1, got {capacity}")
        self.capacity = capacity
        self.seen = 0
        self._random = np.random.default_rng(seed)
        self._next_token_M = np.zeros(capacity, dtype=np.int64)
        self._cluster_M = np.zeros(capacity, dtype=np.int64)

    @property
    def size(self) -> int:
        """M, the number of tokens in the sample now."""
        return min(self.seen, self.capacity)

    @property
    def next_token_M(self) -> Int64:
        """The next token of each sampled one."""
        return self._next_token_M[: self.size]

    @property
    def cluster_M(self) -> Int64:
        """The cluster of text of each sampled token."""
        return self._cluster_M[: self.size]

    def rows(self, num_new: int) -> tuple[Int64, Int64]:
        """Return which of `num_new` further tokens enter, indices [U], and their slots [U], each slot once."""
        number_N = np.arange(self.seen, self.seen + num_new)
        slot_N = self._random.integers(0, number_N + 1)
        slot_N = np.where(number_N < self.capacity, number_N, slot_N)
        self.seen += num_new
        enters_U = np.flatnonzero(slot_N < self.capacity)
        # Of two new tokens for one slot, the later one wins.
        slot_U, from_end_U = np.unique(slot_N[enters_U][::-1], return_index=True)
        return enters_U[::-1][from_end_U], slot_U

    def add_batch(self, spans: Sequence[Span], next_tokens: Sequence[ArrayLike]) -> SampleUpdate:
        """Decide for the counted positions of a batch; `next_tokens` has an array for each span, one per position.

        :raises InputError: a span and its next tokens differ in number.
        """
        row_N, position_N, cluster_N = _positions(spans)
        given = [np.asarray(tokens, dtype=np.int64) for tokens in next_tokens]
        needed = [span.last - span.first for span in spans]
        if [len(tokens) for tokens in given] != needed:
            raise InputError(f"spans of {needed} positions need as many next tokens, got {[len(t) for t in given]}")
        next_token_N = np.concatenate(given or [_EMPTY])
        enters_U, slot_U = self.rows(len(row_N))
        self._next_token_M[slot_U] = next_token_N[enters_U]
        self._cluster_M[slot_U] = cluster_N[enters_U]
        return SampleUpdate(row_N[enters_U], position_N[enters_U], slot_U)


class LayerSample:
    """One layer's sampled vectors: capacity x dim numbers, of which memory is used only as far as it is filled.

    Half as many bytes hold float16 with 11 significant bits, times a power of two that keeps the largest number in
    range: no score depends on that factor.
    """

    def __init__(self, plan: SamplePlan, dim: int, *, half: bool = False) -> None:
        self._plan = plan
        self._vectors_MD = _own_pages((plan.capacity, dim), np.float16 if half else np.float32)
        self._factor = 0.0 if half else 1.0

    def write(self, vectors_BTD: Tensor, update: SampleUpdate) -> None:
        """Store this layer's vectors of a batch; call for every update, in order. The tensor is not kept."""
        if not len(update.slot_U):
            return
        if on_host(vectors_BTD):
            # NumPy for the reason of dispersion._host_sums.
            new_UD = widened(host_array(vectors_BTD)[update.row_U, update.position_U])
        else:
            row_U = torch.from_numpy(update.row_U).to(vectors_BTD.device)
            position_U = torch.from_numpy(update.position_U).to(vectors_BTD.device)
            new_UD = vectors_BTD.detach()[row_U, position_U].float().cpu().numpy()
        self._vectors_MD[update.slot_U] = new_UD if self._vectors_MD.dtype == np.float32 else self._halved(new_UD)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the vectors, and the factor that they are multiplied by."""
        return {"sample": self._vectors_MD[: self._plan.size], "factor": np.array(self._factor)}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take the place of the sample that gave this state, for what the plan has drawn so far."""
        self._vectors_MD[: len(state["sample"])] = state["sample"]
        self._factor = float(state["factor"])

    def sample(self) -> Sample:
        """Return the sample so far, as a view that is valid until the next write."""
        return Sample(self._vectors_MD[: self._plan.size], self._plan.next_token_M, self._plan.cluster_M)

    def _halved(self, new_UD: NDArray[np.floating]) -> NDArray[np.float16]:
        """The vectors times the factor, which is lowered, also for those already here, if one would overflow."""
        largest = float(np.abs(new_UD).max())
        if largest > 0 and not 0 < largest * self._factor <= _HALF_MAX:
            factor = 2.0 ** -math.ceil(math.log2(largest) - _HEADROOM)
            if self._factor:  # else all vectors here are zero, or there are none
                torch.from_numpy(self._vectors_MD).mul_(factor / self._factor)
            self._factor = factor
        # Both by torch: NumPy takes 10 ns a number.
        halves_UD: NDArray[np.float16] = torch.from_numpy(new_UD * np.float32(self._factor)).half().numpy()
        return halves_UD


def _own_pages(shape: tuple[int, int], kind: type[np.floating]) -> NDArray[np.floating]:
    """An array of zeros whose memory the system gets back with the last view of it.

    The command line tells malloc to keep what is freed (`knnlm.cli.memory`). The samples of all layers are by far the
    largest such block, and what comes after them takes other sizes.
    """
    pages = mmap.mmap(-1, math.prod(shape) * np.dtype(kind).itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, kind).reshape(shape)


def _positions(spans: Sequence[Span]) -> tuple[Int64, Int64, Int64]:
    """Row, position and cluster of each counted position, span by span."""
    counts_S = [span.last - span.first for span in spans]
    row_N = np.repeat(np.array([span.row for span in spans], dtype=np.int64), counts_S)
    cluster_N = np.repeat(np.array([span.cluster for span in spans], dtype=np.int64), counts_S)
    position_N = np.concatenate([np.arange(span.first, span.last) for span in spans] or [_EMPTY])
    return row_N, position_N, cluster_N

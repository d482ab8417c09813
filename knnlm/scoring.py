"""The label-free scores of many layers in one streaming pass over the model's own tensors.

Legend: B windows of a batch, T positions, D dimension, M sampled positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm.dispersion import DispersionScorer, Span
from knnlm.progress import Advance
from knnlm.results import Interval, LayerScore
from knnlm.scores import SamplePlan, effective_rank, retrieval_probe, standardized_dispersion

# Sampled vectors are kept for all layers at once: 8,192 are enough for the probe, and this many bytes are the limit.
SAMPLE_CAPACITY = 8192
SAMPLE_BYTES = 1 << 30


@dataclass(frozen=True)
class Sampled:
    """Where a batch's sampled positions lie (row, position) and the slots of the sample that they take."""

    rows_M: NDArray[np.int64]
    positions_M: NDArray[np.int64]
    slots_M: NDArray[np.int64]


class LayerScorer:
    """Dispersion of every key, and a bounded sample of keys for the other scores; the same positions for all layers."""

    def __init__(self, dims: Mapping[str, int], *, seed: int = 0, capacity: int | None = None) -> None:
        affordable = SAMPLE_BYTES // (4 * sum(dims.values()))
        capacity = capacity or max(256, min(SAMPLE_CAPACITY, affordable))
        self._dispersion = {name: DispersionScorer(dim) for name, dim in dims.items()}
        self._plan = SamplePlan(capacity, seed)
        self._samples = {name: np.empty((capacity, dim), np.float32) for name, dim in dims.items()}
        self._spans: Sequence[Span] = ()
        self._sampled = Sampled(*(np.empty(0, np.int64),) * 3)
        self._seed = seed
        self.tokens = 0
        self.segments = 0

    def begin_batch(self, spans: Sequence[Span], targets_BT: NDArray[np.int64]) -> None:
        """Say which positions count in the tensors that come next, and which tokens follow them."""
        self._spans = spans
        lengths = np.array([span.last - span.first for span in spans])
        rows = np.repeat([span.row for span in spans], lengths)
        positions = np.concatenate([np.arange(span.first, span.last) for span in spans])
        clusters = np.repeat([span.cluster for span in spans], lengths)
        kept, slots = self._plan.add(targets_BT[rows, positions], clusters)
        self._sampled = Sampled(rows[kept], positions[kept], slots)
        self.tokens += int(lengths.sum())
        self.segments += len(spans)

    def receive(self, name: str, vectors_BTD: Tensor) -> None:
        """Take one layer's vectors of the batch; nothing of the tensor is kept."""
        self._dispersion[name].add_batch(vectors_BTD, self._spans)
        chosen = self._sampled
        if len(chosen.slots_M):
            rows, positions = torch.from_numpy(chosen.rows_M), torch.from_numpy(chosen.positions_M)
            self._samples[name][chosen.slots_M] = vectors_BTD[rows, positions].float().cpu().numpy()

    def dispersion_interval(self, name: str) -> tuple[float, Interval]:
        """The pooled dispersion so far with its interval: what early stopping looks at."""
        result = self._dispersion[name].result()
        return result.pooled, result.interval

    def scores(self, advance: Advance = lambda done, total: None) -> tuple[LayerScore, ...]:
        """All scores of every layer, in the order in which the layers were given."""
        scores = []
        for name in self._dispersion:
            scores.append(self._score(name))
            advance(len(scores), len(self._dispersion))
        return tuple(scores)

    def _score(self, name: str) -> LayerScore:
        result = self._dispersion[name].result()
        sample_MD = self._samples[name][: self._plan.size]
        probe = retrieval_probe(sample_MD, self._plan.next_tokens, self._plan.clusters, seed=self._seed)
        return LayerScore(
            layer=name,
            dispersion=result.pooled,
            interval=result.interval,
            dispersion_within=result.within,
            dispersion_segments=result.segments,
            dispersion_standardized=standardized_dispersion(sample_MD),
            effective_rank=effective_rank(sample_MD),
            probe=probe.value,
            probe_interval=probe.interval,
        )

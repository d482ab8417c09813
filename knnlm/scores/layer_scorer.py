"""Label-free scores of many layers in one streaming pass over the model's tensors.

Legend: B windows of a batch, T positions, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from knnlm.progress import Advance, ignore
from knnlm.results import SCORES, Interval, LayerScore
from knnlm.scores.choose import NEAR
from knnlm.scores.dispersion import DispersionResult, DispersionScorer, Float64, Span, dispersion
from knnlm.scores.sample import LayerSample, Sample, SamplePlan, SampleUpdate
from knnlm.scores.sample_scores import (
    Probe,
    effective_rank,
    intrinsic_dimension,
    participation_ratio,
    probe_difference,
    retrieval_probe,
    spectrum,
    standardized_dispersion,
)

# Sampled vectors are kept for all layers at once: 8,192 per layer are enough for the probe, within this many bytes.
SAMPLE_CAPACITY = 8192
SAMPLE_BYTES = 1 << 30


@dataclass(frozen=True)
class Seen:
    """The data of one layer from a pass: the dispersion of all its keys, and a sample of them."""

    dispersion: DispersionResult
    sample: Sample
    seed: int

    @cached_property
    def spectrum(self) -> Float64:
        """Squared singular values of the centred sample."""
        return spectrum(self.sample.vectors_MD)

    @cached_property
    def probe(self) -> Probe:
        """Retrieval probe of the sample, with its interval."""
        sample = self.sample
        return retrieval_probe(sample.vectors_MD, sample.next_token_M, sample.cluster_M, seed=self.seed)


# Scores and intervals that share steps; knnlm.results defines them. A score that is not here has its own file.
FUNCTIONS: Mapping[str, Callable[[Seen], Any]] = {
    "dispersion": lambda seen: seen.dispersion.pooled,
    "interval": lambda seen: seen.dispersion.interval,
    "dispersion_within": lambda seen: seen.dispersion.within,
    "dispersion_segments": lambda seen: seen.dispersion.segments,
    "dispersion_standardized": lambda seen: standardized_dispersion(seen.sample.vectors_MD),
    "effective_rank": lambda seen: effective_rank(seen.spectrum),
    "probe": lambda seen: seen.probe.value,
    "probe_interval": lambda seen: seen.probe.interval,
    "participation_ratio": lambda seen: participation_ratio(seen.spectrum),
    "intrinsic_dimension": lambda seen: intrinsic_dimension(seen.sample.vectors_MD, seed=seen.seed),
}


def functions() -> Mapping[str, Callable[[Seen], Any]]:
    """Return the function of each field of `LayerScore` except `layer`.

    A score that `FUNCTIONS` lacks is the function NAME in `knnlm/scores/NAME.py`.
    """
    own = [kind.name for kind in SCORES if kind.name not in FUNCTIONS]
    return {**FUNCTIONS, **{name: getattr(import_module(f"{__package__}.{name}"), name) for name in own}}


# Scores that are defined for the vectors [T, D] of one segment; with T up to 1,024 every vector is a query.
SEGMENT_FUNCTIONS: Mapping[str, Callable[[NDArray[np.floating]], float]] = {
    "dispersion_within": dispersion,
    "dispersion_standardized": standardized_dispersion,
    "effective_rank": lambda vectors_TD: effective_rank(spectrum(vectors_TD)),
    "participation_ratio": lambda vectors_TD: participation_ratio(spectrum(vectors_TD)),
    "intrinsic_dimension": lambda vectors_TD: intrinsic_dimension(vectors_TD, seed=0),
}


class LayerScorer:
    """Scores layers by the dispersion of all keys and by a bounded sample, at the same positions in all layers."""

    def __init__(self, dims: Mapping[str, int], *, seed: int = 0) -> None:
        affordable = SAMPLE_BYTES // (4 * sum(dims.values()))
        self._plan = SamplePlan(max(256, min(SAMPLE_CAPACITY, affordable)), seed)
        self._dispersion = {name: DispersionScorer(dim) for name, dim in dims.items()}
        self._samples = {name: LayerSample(self._plan, dim) for name, dim in dims.items()}
        self._spans: Sequence[Span] = ()
        self._update: SampleUpdate | None = None
        self._probes: dict[str, Probe] = {}
        self._seed = seed
        self.tokens = 0
        self.segments = 0

    def begin_batch(self, spans: Sequence[Span], next_tokens: Sequence[ArrayLike]) -> None:
        """Set which positions of the next tensors count, and the next token of each."""
        self._spans = spans
        self._update = self._plan.add_batch(spans, next_tokens)
        self.tokens += sum(span.last - span.first for span in spans)
        self.segments += len(spans)

    def receive(self, name: str, vectors_BTD: Tensor) -> None:
        """Add one layer's vectors of the batch; the tensor is not kept.

        :raises knnlm.scores.dispersion.BadVector: a vector has NaN or infinite values, or is zero.
        """
        assert self._update is not None
        self._dispersion[name].add_batch(vectors_BTD, self._spans)
        self._samples[name].write(vectors_BTD, self._update)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what it keeps of all layers, as arrays, except what `begin_batch` alone determines."""
        kept = {f"{name} sample": sample.sample().vectors_MD for name, sample in self._samples.items()}
        for name, scorer in self._dispersion.items():
            kept |= {f"{name} {what}": array for what, array in scorer.state().items()}
        return kept

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take the place of the scorer that gave this state; every batch before it was begun again."""
        for name, scorer in self._dispersion.items():
            own = {key.removeprefix(f"{name} "): array for key, array in state.items() if key.startswith(f"{name} ")}
            self._samples[name].restore(own["sample"])
            scorer.restore(own)

    def dispersion(self, name: str) -> float:
        """Return the layer's pooled dispersion so far."""
        return self._dispersion[name].result().pooled

    def margin(self, name: str, leader: str, share: float) -> Interval:
        """Return the interval of a layer's dispersion minus `share` times the leader's."""
        return self._dispersion[name].margin(self._dispersion[leader], share)

    def scores(self, advance: Advance = ignore) -> tuple[LayerScore, ...]:
        """Return all scores of every layer, in the order in which the layers were given."""
        scores = []
        for name in self._dispersion:
            scores.append(self._score(name))
            advance(len(scores), len(self._dispersion))
        return tuple(scores)

    def probe_difference(self, one: str, other: str) -> Interval:
        """Return the interval of one layer's probe minus another's, widened for the comparisons of all layers.

        Call after `scores`.
        """
        comparisons = max(1, len(self._probes) - 1)
        return probe_difference(self._probes[one], self._probes[other], comparisons=comparisons)

    def _score(self, name: str) -> LayerScore:
        seen = Seen(self._dispersion[name].result(), self._samples[name].sample(), self._seed)
        self._probes[name] = seen.probe
        return LayerScore(layer=name, **{field: function(seen) for field, function in functions().items()})


class Settled:
    """Stopping rule, called after each batch: whether the choice of `choose.by_dispersion` is certain."""

    # The jackknife interval is not reliable on fewer tokens.
    MINIMUM_TOKENS = 50_000
    EVERY_BATCHES = 4

    def __init__(self, candidates: Sequence[str]) -> None:
        self._candidates = candidates
        self._batches = 0
        self.met = False

    def __call__(self, scorer: LayerScorer) -> bool:
        """Test the dispersions so far, every few batches."""
        self._batches += 1
        if scorer.tokens < self.MINIMUM_TOKENS or self._batches % self.EVERY_BATCHES or len(self._candidates) < 2:
            return False
        leader = max(self._candidates, key=scorer.dispersion)
        self.met = self._settled(scorer, leader)
        return self.met

    def _settled(self, scorer: LayerScorer, leader: str) -> bool:
        """Whether, from the deepest layer up, some are certainly too far below the leader and the next is not."""
        for name in reversed(self._candidates):
            if name == leader:
                return True
            margin = scorer.margin(name, leader, NEAR)
            if margin.high >= 0:
                return margin.low > 0
        return False

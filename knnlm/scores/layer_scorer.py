"""Label-free scores of many layers in one streaming pass over the model's tensors.

Legend: B windows of a batch, T positions, D dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from index.torch_threads import one_thread
from knnlm.progress import Advance, ignore
from knnlm.results import SCORES, Interval, LayerScore
from knnlm.scores.choose import NEAR
from knnlm.scores.dispersion import DispersionResult, DispersionScorer, Float64, Span, dispersion
from knnlm.scores.pilot import MeasurePilot, Pilot, no_pilot, pilot_change
from knnlm.scores.sample import LayerSample, Sample, SamplePlan, SampleUpdate
from knnlm.scores.sample_scores import (
    Probe,
    effective_rank,
    intrinsic_dimension,
    participation_ratio,
    retrieval_probe,
    spectrum,
    standardized_dispersion,
)
from knnlm.scores.sample_search import SampleSearch, search_sample

# Sampled vectors are kept for all layers at once: at most 8,192 of each, as float32 or, beyond this many bytes in all,
# as float16. 1.25 GiB, which are 7,715 vectors of the 151 layers of SmolLM2-135M, keep `run` on it below 3 GB.
SAMPLE_CAPACITY = 8192
SAMPLE_BYTES = 5 << 28
# Layers scored at a time: each needs some 50 MB.
_MOST_AT_ONCE = 8

T = TypeVar("T")


class _Once(Generic[T]):
    """A property that is computed once. That of `functools` has, in Python 3.11, one lock for all objects: layers that
    are scored in threads would wait for one another.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute

    def __get__(self, owner: object, kind: type) -> T:
        value = self._compute(owner)
        vars(owner)[self._compute.__name__] = value  # from now on found before this descriptor
        return value


@dataclass(frozen=True)
class Seen:
    """The data of one layer from a pass: the dispersion of all its keys, and a sample of them."""

    dispersion: DispersionResult
    sample: Sample
    seed: int
    measure_pilot: MeasurePilot = no_pilot

    @_Once
    def spectrum(self) -> Float64:
        """Squared singular values of the centred sample."""
        return spectrum(self.sample.vectors_MD)

    @_Once
    def search(self) -> SampleSearch:
        """Neighbours of some of the sample."""
        return search_sample(self.sample, seed=self.seed)

    @_Once
    def probe(self) -> Probe:
        """Retrieval probe of the sample, with its interval."""
        return retrieval_probe(self.search)

    @_Once
    def pilot(self) -> Pilot:
        """The small kNN-LM of the sample."""
        return self.measure_pilot(self.search)


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
    "pilot": lambda seen: seen.pilot.perplexity,
    "participation_ratio": lambda seen: participation_ratio(seen.spectrum),
    "intrinsic_dimension": lambda seen: intrinsic_dimension(seen.sample.vectors_MD, seed=seen.seed),
}

# What the choice of a layer rests on; the other scores take several times as long.
FOR_CHOICE = (
    *("dispersion", "interval", "dispersion_within", "dispersion_segments"),
    *("probe", "probe_interval", "pilot"),
)


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

    def __init__(self, dims: Mapping[str, int], *, head: int | None = None, seed: int = 0) -> None:
        """Prepare for layers of these dimensions.

        :param head: dimension of the `final_norm` vectors that `receive_head` will be given.
        """
        half = 4 * SAMPLE_CAPACITY * sum(dims.values()) > SAMPLE_BYTES
        affordable = SAMPLE_BYTES // ((2 if half else 4) * sum(dims.values()))
        self._plan = SamplePlan(max(256, min(SAMPLE_CAPACITY, affordable)), seed)
        self._dispersion = {name: DispersionScorer(dim) for name, dim in dims.items()}
        self._samples = {name: LayerSample(self._plan, dim, half=half) for name, dim in dims.items()}
        self._head = None if head is None else LayerSample(self._plan, head)
        self._spans: Sequence[Span] = ()
        self._update: SampleUpdate | None = None
        self._pilots: dict[str, Pilot] = {}
        self.seed = seed
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
        kept: dict[str, NDArray[Any]] = {}
        for name, sample in self._all_samples().items():
            kept |= {f"{name} {what}": array for what, array in sample.state().items()}
        for name, scorer in self._dispersion.items():
            kept |= {f"{name} {what}": array for what, array in scorer.state().items()}
        return kept

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take the place of the scorer that gave this state; every batch before it was begun again."""

        def own(name: str) -> dict[str, NDArray[Any]]:
            return {key.removeprefix(f"{name} "): array for key, array in state.items() if key.startswith(f"{name} ")}

        for name, sample in self._all_samples().items():
            sample.restore(own(name))
        for name, scorer in self._dispersion.items():
            scorer.restore(own(name))

    def _all_samples(self) -> dict[str, LayerSample]:
        return self._samples | ({} if self._head is None else {"head": self._head})

    def receive_head(self, vectors_BTD: Tensor) -> None:
        """Add the `final_norm` vectors of the batch, from which the model's own probabilities are computed."""
        assert self._update is not None
        if self._head is not None:
            self._head.write(vectors_BTD, self._update)

    @property
    def has_head(self) -> bool:
        """Whether it gets `final_norm` vectors."""
        return self._head is not None

    @property
    def head(self) -> Sample:
        """The sample's `final_norm` vectors, for a scorer made with `head`."""
        assert self._head is not None
        return self._head.sample()

    def dispersion(self, name: str) -> float:
        """Return the layer's pooled dispersion so far."""
        return self._dispersion[name].result().pooled

    def margin(self, name: str, leader: str, share: float) -> Interval:
        """Return the interval of a layer's dispersion minus `share` times the leader's."""
        return self._dispersion[name].margin(self._dispersion[leader], share)

    def scores(
        self,
        advance: Advance = ignore,
        *,
        measure_pilot: MeasurePilot = no_pilot,
        only: Collection[str] | None = None,
    ) -> tuple[LayerScore, ...]:
        """Return scores of every layer, in the order in which the layers were given.

        :param only: fields to compute, such as `FOR_CHOICE`; the other scores are NaN, to be added by `completed`.
        """
        wanted = {field: function for field, function in functions().items() if only is None or field in only}

        def score(name: str) -> LayerScore:
            seen = self._seen(name, measure_pilot)
            self._pilots[name] = seen.pilot
            values = {field: function(seen) for field, function in wanted.items()}
            return LayerScore(layer=name, **({kind.name: math.nan for kind in SCORES} | values))

        return _for_each(score, tuple(self._dispersion), advance)

    def completed(self, scores: Sequence[LayerScore]) -> tuple[LayerScore, ...]:
        """Return these layers' scores with those that `FOR_CHOICE` left out."""
        left_out = {field: function for field, function in functions().items() if field not in FOR_CHOICE}

        def complete(score: LayerScore) -> LayerScore:
            seen = self._seen(score.layer, no_pilot)
            return replace(score, **{field: function(seen) for field, function in left_out.items()})

        return _for_each(complete, scores)

    def pilot_of(self, name: str) -> Pilot:
        """Return a layer's pilot. Call after `scores`."""
        return self._pilots[name]

    def pilot_change(self, one: str, other: str, comparisons: int) -> Interval:
        """Return the interval of one layer's pilot relative to another's, as `scores.pilot.pilot_change`.

        Call after `scores`.
        """
        return pilot_change(self._pilots[one], self._pilots[other], comparisons=comparisons)

    def _seen(self, name: str, measure_pilot: MeasurePilot) -> Seen:
        return Seen(self._dispersion[name].result(), self._samples[name].sample(), self.seed, measure_pilot)


def _for_each(
    function: Callable[[T], LayerScore], items: Sequence[T], advance: Advance = ignore
) -> tuple[LayerScore, ...]:
    """Call it for a layer on each core: threads inside its small steps wait for one another, most of all on shared
    cores.
    """
    scores, cores = [], min(_MOST_AT_ONCE, torch.get_num_threads())
    with one_thread(), ThreadPoolExecutor(cores) as pool:
        for one in pool.map(function, items):
            scores.append(one)
            advance(len(scores), len(items))
    return tuple(scores)


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

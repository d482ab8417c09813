"""The stages that a verb expects, and what they will take before any of them is measured.

What passes through the model is measured on its first batches. The other stages come later, so that their time is
reckoned: work of the sizes at hand, in nanoseconds of one machine (2 cores, AVX-512), times what a small search takes
here over what it takes there.

Legend: N keys, Q queries, D dimension.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from index.exact import ExactIndex
from index.metric import Metric
from index.source import ArraySource
from knnlm.model.lm import LanguageModel
from knnlm.progress import Stage

# A search of every key: for each pair of query and key, its product by dimension and its rank; for each neighbour, its
# exact distance by dimension and its place.
_DIMENSION_NS, _RANK_NS, _DISTANCE_NS, _NEIGHBOUR_NS = 0.008, 1.8, 0.09, 60.0
# For each query: k, λ and T of 1,188 settings on two parts, the gate, and the losses.
_FIT_NS = 90_000.0
# For each number of a layer's sampled vectors: effective rank, probe and intrinsic dimension.
_SCORE_NS = 250.0
# For each number of the keys: clusters and codes of an index, and its tuning.
_INDEX_NS = 150.0
_SAMPLED = 8192
# The search that is timed.
_TRIAL_KEYS, _TRIAL_QUERIES, _TRIAL_DIM, _TRIAL_K = 8192, 256, 256, 512
# Seconds of a stage that is short whatever the sizes are.
_SHORT = 1.0


@dataclass(frozen=True)
class Reckoning:
    """Seconds of work that is not measured yet."""

    slowness: float
    """Seconds here for a second there."""

    def searching(self, keys: int, queries: int, dim: int, k: int) -> float:
        """Seconds of one layer's exact search, and of fitting."""
        of_a_key, of_a_neighbour = _DIMENSION_NS * dim + _RANK_NS, _DISTANCE_NS * dim + _NEIGHBOUR_NS
        return self._seconds(queries * (keys * of_a_key + min(k, keys) * of_a_neighbour + _FIT_NS))

    def scoring(self, tokens: int, dim: int) -> float:
        """Seconds of one layer's scores on the sample."""
        return self._seconds(min(tokens, _SAMPLED) * dim * _SCORE_NS)

    def indexing(self, keys: int, dim: int) -> float:
        """Seconds of building and tuning an index."""
        return self._seconds(keys * dim * _INDEX_NS)

    def _seconds(self, nanoseconds: float) -> float:
        return 1e-9 * nanoseconds * self.slowness


def reckon() -> Reckoning:
    """Time a small search, some hundredths of a second."""
    rng = np.random.default_rng(0)
    index = ExactIndex(ArraySource(rng.standard_normal((_TRIAL_KEYS, _TRIAL_DIM), np.float32)), Metric.L2)
    queries_QD, taken = rng.standard_normal((_TRIAL_QUERIES, _TRIAL_DIM), np.float32), []
    for _ in range(3):
        start = time.perf_counter()
        index.search(queries_QD, _TRIAL_K)
        taken.append(time.perf_counter() - start)
    there = Reckoning(1.0)
    fitted = there.searching(_TRIAL_KEYS, _TRIAL_QUERIES, _TRIAL_DIM, _TRIAL_K)
    return Reckoning(min(taken) / (fitted - 1e-9 * _FIT_NS * _TRIAL_QUERIES))


def score_stages(lm: LanguageModel, layers: Sequence[str], tokens: int | None) -> list[Stage]:
    """What `score` expects."""
    return [_through_model("scoring layers", tokens), _scoring(lm, layers, tokens, reckon())]


def build_stages(lm: LanguageModel, layers: Sequence[str], tokens: int | None, sample: int) -> list[Stage]:
    """What `build` expects.

    :param sample: tokens on which the layer is chosen, 0 if it is named.
    """
    here = reckon()
    extracting = _through_model("extracting keys", tokens)
    chosen = [*score_stages(lm, lm.layer_names, sample), extracting]
    named = [extracting, _scoring(lm, layers, tokens, here)]
    return [*(chosen if sample else named), *_indexing(lm, layers, tokens, here)]


def evaluate_stages(lm: LanguageModel, layers: Sequence[str], keys: int, queries: int, k: int) -> list[Stage]:
    """What `evaluate` expects, with exact search; an index is faster."""
    return _evaluating(lm, layers, keys, queries, k, reckon())


def run_stages(lm: LanguageModel, layers: Sequence[str], keys: int | None, queries: int, k: int) -> list[Stage]:
    """What `run` expects."""
    here = reckon()
    return [
        _through_model("extracting keys", keys),
        _scoring(lm, layers, keys, here),
        *_evaluating(lm, layers, keys, queries, k, here),
        *_indexing(lm, layers, keys, here),
        _short("perplexity through the index", "indexing"),
        _short("writing the report", "evaluating"),
    ]


def _through_model(name: str, tokens: float | None) -> Stage:
    """A stage that passes text through the model."""
    return Stage(name=name, amount=tokens, part="through the model", kind="model")


def _scoring(lm: LanguageModel, layers: Sequence[str], tokens: int | None, here: Reckoning) -> Stage:
    """Scores of the sample."""
    of_a_layer = here.scoring(tokens or _SAMPLED, _dim(lm, layers))
    return Stage(name="effective rank and retrieval probe", amount=len(layers), part="scoring", seconds=of_a_layer)


def _evaluating(
    lm: LanguageModel, layers: Sequence[str], keys: int | None, queries: int, k: int, here: Reckoning
) -> list[Stage]:
    """The stages of an evaluation, of which the search of each layer takes most of the time."""
    of_a_layer = here.searching(keys or 0, queries, _dim(lm, layers), k)
    return [
        _short("looking for the evaluation text in the datastore", "evaluating"),
        _through_model("evaluation text through the model", queries),
        Stage(name="evaluating", amount=len(layers), part="evaluating", seconds=of_a_layer),
        _short("finding examples", "evaluating"),
    ]


def _indexing(lm: LanguageModel, layers: Sequence[str], keys: int | None, here: Reckoning) -> list[Stage]:
    """The stages of an index."""
    seconds = here.indexing(keys or 0, _dim(lm, layers))
    return [
        Stage(name="indexing", amount=keys or 1, part="indexing", seconds=seconds / 2 / (keys or 1)),
        Stage(name="tuning the index", amount=1, part="indexing", seconds=seconds / 4),
        Stage(name="measuring recall", amount=1, part="indexing", seconds=seconds / 4),
    ]


def _short(name: str, part: str) -> Stage:
    return Stage(name=name, amount=1, part=part, seconds=_SHORT)


def _dim(lm: LanguageModel, layers: Sequence[str]) -> int:
    return sum(lm.dims[name] for name in layers) // max(1, len(layers))

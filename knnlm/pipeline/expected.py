"""The stages that a verb expects, and what they will take before any of them is measured.

What passes through the model is measured on its first batches; the other stages come later, and are reckoned.
"""

from __future__ import annotations

from collections.abc import Sequence

from knnlm.config import KNNConfig
from knnlm.knn.reckoning import SAMPLED, Reckoning, reckon
from knnlm.model.lm import LanguageModel
from knnlm.progress import Stage

# Seconds of a stage that is short whatever the sizes are.
_SHORT = 1.0


def score_stages(lm: LanguageModel, layers: Sequence[str], tokens: int | None) -> list[Stage]:
    """What `score` expects, and a sample on which a layer is chosen."""
    return [_through_model("scoring layers", tokens), _scoring(lm, layers, tokens, reckon())]


def build_stages(
    lm: LanguageModel, layers: Sequence[str], tokens: int | None, *, scored: bool, queries: int
) -> list[Stage]:
    """What `build` expects once its layers are settled.

    :param scored: they were chosen by scores; otherwise all keys are scored.
    :param queries: tokens that k, lambda and T are fitted on.
    """
    here = reckon()
    _, through_model, evaluating, _ = _evaluating(lm, layers, tokens, queries, KNNConfig.max_k, here)
    return [
        *_extracting(lm, layers, tokens, here, scored=scored),
        *([through_model] if queries else []),
        *_indexing(lm, layers, tokens, here),
        *([evaluating] if queries else []),
    ]


def evaluate_stages(lm: LanguageModel, layers: Sequence[str], keys: int, queries: int, k: int) -> list[Stage]:
    """What `evaluate` expects, with exact search; an index is faster."""
    return _evaluating(lm, layers, keys, queries, k, reckon())


def run_stages(
    lm: LanguageModel, layers: Sequence[str], keys: int | None, queries: int, k: int, *, scored: bool
) -> list[Stage]:
    """What `run` expects once its layers are settled; see `build_stages`."""
    here = reckon()
    return [
        *_extracting(lm, layers, keys, here, scored=scored),
        *_evaluating(lm, layers, keys, queries, k, here),
        *_indexing(lm, layers, keys, here),
        _short("perplexity through the index", "indexing"),
        _short("writing the report", "evaluating"),
    ]


def _extracting(
    lm: LanguageModel, layers: Sequence[str], tokens: int | None, here: Reckoning, *, scored: bool
) -> list[Stage]:
    scores = [] if scored else [_scoring(lm, layers, tokens, here)]
    return [_through_model("extracting keys", tokens), *scores]


def _through_model(name: str, tokens: float | None) -> Stage:
    """A stage that passes text through the model."""
    return Stage(name=name, amount=tokens, part="through the model", kind="model")


def _scoring(lm: LanguageModel, layers: Sequence[str], tokens: int | None, here: Reckoning) -> Stage:
    """Scores of the sample."""
    of_a_layer = here.scoring(tokens or SAMPLED, _dim(lm, layers))
    return Stage(name="pilots and other scores", amount=len(layers), part="scoring", seconds=of_a_layer)


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
        Stage(name="indexing", amount=keys or 1, part="indexing", seconds=0.6 * seconds / (keys or 1)),
        Stage(name="tuning the index", amount=1, part="indexing", seconds=0.3 * seconds),
        Stage(name="measuring recall", amount=1, part="indexing", seconds=0.1 * seconds),
    ]


def _short(name: str, part: str) -> Stage:
    return Stage(name=name, amount=1, part=part, seconds=_SHORT)


def _dim(lm: LanguageModel, layers: Sequence[str]) -> int:
    return sum(lm.dims[name] for name in layers) // max(1, len(layers))

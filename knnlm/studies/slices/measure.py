"""Difficulty of a set of questions or a text for a model, by dispersion, without labels; compared with labels if given.

    result = measure_slices(lm, questions=["arc.jsonl"], cloze=["nursing.jsonl"])
    print([(one.name, one.layers[-1].within.value) for one in result.sets])

With labels: slices of a set with 0, 10, … 100 % right answers, and the dispersion between the vectors of their prompts
(arXiv 2506.24106, on label-free accuracy). Without: the dispersion within an item's prompt ranks the items of a set,
and its mean ranks sets. `OURS` lists what the paper's protocol leaves open and was decided here.

Legend: Q items, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnlm.config import check_seed
from knnlm.errors import InputError
from knnlm.layer_names import FINAL, select_layers
from knnlm.model.lm import LanguageModel
from knnlm.progress import Progress, Silent
from knnlm.scores.dispersion import dispersion, unit_rows
from knnlm.shown import UNKNOWN, Shown, Table, figure
from knnlm.statistics import CorrelationEstimate, correlate
from knnlm.studies.slices.items import ItemSet, cloze_set, question_set
from knnlm.studies.slices.sets import GivenSets, read_sets
from knnlm.studies.slices.statistics import (
    LEVELS,
    SMALLEST_SLICE,
    Estimate,
    SliceCurve,
    draw_slices,
    mean,
    right_minus_wrong,
    slice_size,
    tail_auc,
)
from knnlm.text.segments import check_context

OURS = (
    "a query's vector is that of the last token of its prompt: the paper's summaries do not say which",
    "an answer is right by plain likelihood (`accuracy`), not by likelihood for its length",
    "every question has the prompt of lm-eval's ARC tasks and its choices in full, MMLU's too",
    "slices shrink where a set has too few right or wrong items",
    "the dispersion that ranks items, and sets by its mean, is inside a prompt, over all its tokens",
    "the intervals, the difference between right and wrong items, and the AUC",
)


@dataclass(frozen=True, kw_only=True)
class SliceConfig:
    """Settings of the study.

    :raises InputError: a value out of range.
    """

    layers: str = FINAL
    """Patterns of layers whose vectors are used; the deepest is reported first."""
    slice_size: int = 100
    seeds: int = 10
    """Random draws of each slice."""
    context: int = 128
    """Tokens before the predicted one of a cloze item."""
    max_segments: int = 100_000
    """Maximum number of cloze items of a text; drawn at random if it has more."""
    text_field: str = "text"
    tail: int | None = None
    """Number of items of lowest dispersion to return for each set; none by default."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.slice_size < SMALLEST_SLICE or self.slice_size % LEVELS:
            raise InputError(
                f"`slice_size` is {self.slice_size}, but must be a multiple of {LEVELS} from {SMALLEST_SLICE} on: "
                f"slices are {100 // LEVELS} % apart"
            )
        if self.seeds < 2:
            raise InputError(f"`seeds` is {self.seeds}, but a band needs at least 2 draws")
        if self.context < 2:
            raise InputError(f"`context` is {self.context}, but dispersion needs at least 2 tokens")
        for name, value in (("max_segments", self.max_segments), ("tail", self.tail)):
            if value is not None and value < 1:
                raise InputError(f"`{name}` is {value}, but must be above 0")
        check_seed(self.seed)


@dataclass(frozen=True)
class LayerSlices:
    """Results for a set at one layer."""

    layer: str
    within: Estimate
    """Mean over items of the dispersion within the prompt, by which sets are ranked."""
    between: float
    """Dispersion between the vectors of the prompts' last tokens; NaN for one item."""
    curve: SliceCurve | None = None
    """None without labels, or with too few right or wrong items."""
    right_minus_wrong: Estimate | None = None
    item_correlation: CorrelationEstimate | None = None
    """Correlation over items of the dispersion within the prompt with correctness (1 or 0)."""
    tail_auc: Estimate | None = None
    """AUC of low dispersion within the prompt as a detector of wrong answers; 0.5 is chance."""


@dataclass(frozen=True)
class SetSlices:
    """Results for one set; fields that need labels are None without them."""

    name: str
    items: int
    layers: tuple[LayerSlices, ...]
    """In the order of the network."""
    accuracy: Estimate | None = None
    accuracy_normalized: Estimate | None = None
    chance: float | None = None
    confidence_auc: Estimate | None = None
    """AUC of the model's own low confidence as a detector of wrong answers: the baseline for dispersion."""
    length_auc: Estimate | None = None
    """AUC of short prompts as a detector; below 0.5, long ones are harder. None if all have the same length."""
    tail: tuple[Mapping[str, Any], ...] = ()
    """Items of lowest dispersion within the prompt at the deepest layer, the lowest first."""
    notes: tuple[str, ...] = ()


_HEADS = ("set", "items", "right", "chance", "layer", "inside a prompt", "tail AUC", "confidence AUC")


def _cells(one: SetSlices, layer: LayerSlices) -> Iterator[str]:
    yield one.name
    yield f"{one.items:,}"
    yield _value(one.accuracy, ".1%")
    yield figure(one.chance, ".1%")
    yield layer.layer
    yield _value(layer.within, ".4f")
    yield _value(layer.tail_auc, ".3f")
    yield _value(one.confidence_auc, ".3f")


def _value(estimate: Estimate | None, form: str) -> str:
    return figure(estimate.value if estimate else None, form)


@dataclass(frozen=True, repr=False)
class SlicesResult(Shown):
    """All sets, the hardest first, that is, by increasing mean dispersion within a prompt."""

    sets: tuple[SetSlices, ...]
    first: SetSlices
    """The set given first."""
    set_correlation: CorrelationEstimate | None = None
    """Correlation over sets of mean dispersion within a prompt with accuracy; above 0, low dispersion means hard.

    None for fewer than 3 labelled sets, or for questions mixed with texts, whose accuracies cannot be compared."""

    def _facts(self) -> Iterator[str]:
        yield f"{len(self.sets)} sets, the hardest first"
        for one in self.sets:
            right = _value(one.accuracy, ".1%")
            inside = figure(one.layers[-1].within.value, ".4f") if one.layers else UNKNOWN
            yield f"{one.name}: {one.items:,} items, {right} right, dispersion inside a prompt {inside}"

    def _table(self) -> Table:
        rows = tuple(tuple(_cells(one, layer)) for one in self.sets for layer in one.layers)
        return Table("Sets by dispersion inside a prompt, the hardest first if low means hard", _HEADS, rows)


def measure_slices(
    lm: LanguageModel,
    questions: Sequence[str | Path] = (),
    *,
    cloze: Sequence[str | Path] = (),
    config: SliceConfig | None = None,
    progress: Progress | None = None,
) -> SlicesResult:
    """Measure sets of questions (.jsonl files, hub sets) and texts whose next tokens are predicted.

    All questions are read before the model is used.
    :raises InputError: no set, a repeated or unusable one, or `config.context` over the model's limit.
    :raises LayerError: no layer matches `config.layers`.
    """
    config = config or SliceConfig()
    sets = read_sets(questions, cloze, text_field=config.text_field)
    return measure_sets(lm, sets, config=config, progress=progress or Silent())


def check_model(
    name: str, layer_names: Sequence[str], context_limit: int | None, config: SliceConfig, *, cloze: bool
) -> tuple[str, ...]:
    """Return the layers to use; raises as `measure_slices`, before the model is loaded."""
    if cloze:
        check_context(config.context, name, context_limit)
    return select_layers(config.layers, layer_names)


def measure_sets(lm: LanguageModel, sets: GivenSets, *, config: SliceConfig, progress: Progress) -> SlicesResult:
    """Like `measure_slices`, for sets already read."""
    layers = check_model(lm.name, lm.layer_names, lm.context_limit, config, cloze=bool(sets.cloze))
    found = [
        _measure(question_set(lm, name, questions, layers, progress), config)
        for name, questions in sets.questions.items()
    ]
    for name, text in sets.cloze.items():
        items = cloze_set(
            lm,
            name,
            text,
            layers,
            progress,
            context=config.context,
            max_segments=config.max_segments,
            text_field=config.text_field,
            seed=config.seed,
        )
        found.append(_measure(items, config))
    ranked = sorted(found, key=lambda one: one.layers[-1].within.value)
    return SlicesResult(tuple(ranked), found[0], _set_correlation(found))


def _set_correlation(sets: Sequence[SetSlices]) -> CorrelationEstimate | None:
    labelled = [one for one in sets if one.accuracy is not None]
    if len(labelled) < 3 or len({one.chance is None for one in labelled}) > 1:
        return None
    within = [one.layers[-1].within.value for one in labelled]
    return correlate(within, [one.accuracy.value for one in labelled if one.accuracy])


def _measure(items: ItemSet, config: SliceConfig) -> SetSlices:
    answers, count = items.answers, len(items.lengths_Q)
    layers = tuple(_measure_layer(items, layer, config) for layer in items.vectors)
    tail = _tail(items, layers[-1].layer, config.tail)
    if answers is None:
        return SetSlices(items.name, count, layers, tail=tail, notes=items.notes)
    wrong_Q, clusters_Q = ~answers.correct_Q, items.clusters_Q
    normalized_Q, lengths_Q = answers.correct_normalized_Q, items.lengths_Q.astype(np.float64)
    return SetSlices(
        name=items.name,
        items=count,
        layers=layers,
        accuracy=mean(answers.correct_Q, clusters_Q, (0.0, 1.0)),
        accuracy_normalized=None if normalized_Q is None else mean(normalized_Q, clusters_Q, (0.0, 1.0)),
        chance=answers.chance,
        confidence_auc=tail_auc(answers.confidence_Q, wrong_Q, clusters_Q),
        length_auc=tail_auc(lengths_Q, wrong_Q, clusters_Q) if np.ptp(lengths_Q) else None,
        tail=tail,
        notes=(*items.notes, *_slice_notes(items, answers.correct_Q, config.slice_size)),
    )


def _measure_layer(items: ItemSet, layer: str, config: SliceConfig) -> LayerSlices:
    vectors, clusters_Q = items.vectors[layer], items.clusters_Q
    within = mean(vectors.within_Q, clusters_Q, (0.0, 2.0))
    between = dispersion(vectors.last_QD) if len(clusters_Q) > 1 else float("nan")
    if items.answers is None:
        return LayerSlices(layer, within, between)
    correct_Q = items.answers.correct_Q
    units_QD = unit_rows(vectors.last_QD)
    size = slice_size(config.slice_size, int(correct_Q.sum()), int((~correct_Q).sum()))
    return LayerSlices(
        layer=layer,
        within=within,
        between=between,
        curve=draw_slices(units_QD, correct_Q, size, draws=config.seeds, seed=config.seed) if size else None,
        right_minus_wrong=right_minus_wrong(units_QD, correct_Q, clusters_Q) if size else None,
        item_correlation=correlate(vectors.within_Q, correct_Q, clusters=clusters_Q.tolist()),
        tail_auc=tail_auc(vectors.within_Q, ~correct_Q, clusters_Q),
    )


def _slice_notes(items: ItemSet, correct_Q: NDArray[np.bool_], wanted: int) -> list[str]:
    right, wrong = int(correct_Q.sum()), int((~correct_Q).sum())
    size = slice_size(wanted, right, wrong)
    if size == wanted:
        return []
    told = f"{items.name} has {right} right and {wrong} wrong answers"
    if size is None:
        return [f"{told}: too few of one kind for slices of {SMALLEST_SLICE}, so there are none"]
    return [f"{told}, so slices have {size} items and not {wanted}"]


def _tail(items: ItemSet, layer: str, count: int | None) -> tuple[Mapping[str, Any], ...]:
    if count is None:
        return ()
    within_Q = items.vectors[layer].within_Q
    lowest = np.argsort(within_Q, kind="stable")[:count]
    return tuple(
        {"set": items.name, "rank": rank, "dispersion": float(within_Q[at]), "layer": layer, **items.describe(int(at))}
        for rank, at in enumerate(lowest, start=1)
    )

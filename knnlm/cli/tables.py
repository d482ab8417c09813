"""Results as tables and lines: rich renderables; nothing is printed here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from knnlm.errors import InputError
from knnlm.report.numbers import MISSING
from knnlm.results import (
    SCORES,
    Correlation,
    EvalResult,
    Interval,
    LayerResult,
    LayerScore,
    ScoreKind,
    ScoreResult,
    VectorScores,
)

TITLES = {kind.name: kind.title for kind in SCORES}
# Scores in the tables without --show.
IN_VECTOR_TABLE = (
    *("dispersion", "dispersion_within", "dispersion_segments", "dispersion_standardized"),
    *("effective_rank", "probe"),
)
# Vectors have no language model, and so no pilot.
IN_SCORE_TABLE = (*IN_VECTOR_TABLE, "pilot")
IN_EVAL_TABLE = ("dispersion", "pilot")
# Rows of the table of perplexities without --all, before the chosen layer and the last ffn_input.
BEST_ROWS = 10


def compact_table(heads: Sequence[str], *, title: str | None = None, left: Sequence[str] = ("layer",)) -> Table:
    """Return an empty table without lines between its columns, which are never wrapped.

    :param left: heads of left-aligned columns, which hold words; the others are right-aligned.
    """
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right", no_wrap=True)
    return table


def shown_scores(names: str | None, default: Sequence[str]) -> tuple[ScoreKind, ...]:
    """Return the scores named by `--show`, such as `probe,effective_rank` or `all`; those of `default` for None.

    :raises InputError: an unknown score.
    """
    if names == "all":
        return SCORES
    known = {name: kind for kind in SCORES for name in (kind.name, kind.short)}
    wanted = default if names is None else [name.strip() for name in names.split(",")]
    if unknown := next((name for name in wanted if name not in known), None):
        raise InputError(f"--show {unknown!r} is no score; there are all, {', '.join(kind.short for kind in SCORES)}")
    return tuple(known[name] for name in wanted)


def score_table(result: ScoreResult | VectorScores, show: str | None = None) -> Table:
    """Table of the label-free scores of every layer or file; the chosen layer is marked."""
    kinds = shown_scores(show, IN_SCORE_TABLE if isinstance(result, ScoreResult) else IN_VECTOR_TABLE)
    chosen = None
    if isinstance(result, ScoreResult):
        table = Table(title=f"Label-free scores, on {result.tokens:,} tokens of {result.documents:,} documents")
        chosen = result.choice.layer
    else:
        table = Table(title=f"{result.vectors:,} vectors in {result.rows:,} rows")
    table.add_column("layer" if chosen else "file")
    for kind in kinds:
        table.add_column(kind.title, justify="right")
        if kind.name == "dispersion":
            table.add_column("95 % interval", justify="right")
    for one in result.layers:
        table.add_row(*_score_cells(one, kinds, chosen), style="bold green" if one.layer == chosen else None)
    return table


def _score_cells(one: LayerScore, kinds: Sequence[ScoreKind], chosen: str | None) -> Iterator[str]:
    yield f"{one.layer} ◀ chosen" if one.layer == chosen else one.layer
    for kind in kinds:
        yield _known(getattr(one, kind.name), f".{kind.digits}f")
        if kind.name == "dispersion":
            yield interval(one.interval)


def eval_table(result: EvalResult, show: str | None = None, *, all_layers: bool = False) -> Table:
    """Table of perplexity and scores, the best layer first: the ten best, the chosen one and the last `ffn_input`.

    :param all_layers: show every layer, also those that have only scores.
    """
    kinds = shown_scores(show, IN_EVAL_TABLE)
    lm = result.lm
    known = "" if math.isnan(lm.interval.low) else f" ({lm.interval.low:.2f} … {lm.interval.high:.2f})"
    title = f"Perplexity on {lm.tokens:,} tokens, {result.keys:,} keys; the plain LM: {lm.perplexity:.3f}{known}"
    heads = ("layer", *(kind.title for kind in kinds), "perplexity", "against LM", "k", "λ", "T")
    table = compact_table(heads, title=title + _resolution(result))
    for one in _ranked(result) if all_layers else _shown(result):
        style = "bold green" if one.layer == result.selected else "bold" if one.layer == result.best else None
        table.add_row(*_eval_cells(one, kinds, result), style=style)
    for score in unevaluated(result) if all_layers else ():
        table.add_row(score.layer, *_score_values(score, kinds), *([MISSING] * 5))
    return table


def unevaluated(result: EvalResult) -> list[LayerScore]:
    """Return the scores of layers that were not evaluated, those with the best pilots first."""
    evaluated = {one.layer for one in result.layers}
    rest = [score for score in result.examined if score.layer not in evaluated]
    return sorted(rest, key=lambda score: (math.isnan(score.pilot), score.pilot))


def rest_line(result: EvalResult) -> str:
    """Return where the layers are that the table without --all leaves out; empty if it has all."""
    evaluated, scored = len(result.layers) - len(_shown(result)), len(unevaluated(result))
    told = [f"{evaluated} more that were evaluated"] if evaluated else []
    told += [f"{scored} that have scores and a pilot only"] if scored else []
    return f"Not in the table: {' and '.join(told)}; --all shows them, as does report.html." if told else ""


def _ranked(result: EvalResult) -> list[LayerResult]:
    return sorted(result.layers, key=lambda one: (math.isnan(one.perplexity), one.perplexity))


def _shown(result: EvalResult) -> list[LayerResult]:
    ranked = _ranked(result)
    last = [one.layer for one in result.layers if one.layer.endswith(".ffn_input")][-1:]
    wanted = (*(one.layer for one in ranked[:BEST_ROWS]), result.selected, *last)
    return [one for one in ranked if one.layer in wanted]


def _resolution(result: EvalResult) -> str:
    """What the title adds where most layers cannot be told from the best."""
    others = [one for one in result.layers if one.layer != result.best]
    equal = [one for one in others if one.versus_best_interval.low <= 0]
    if not result.best or 2 * len(equal) < len(others) or not others:
        return ""
    return f"\nToo few tokens to tell {len(equal)} of {len(result.layers)} layers from the best"


def _eval_cells(one: LayerResult, kinds: Sequence[ScoreKind], result: EvalResult) -> Iterator[str]:
    marks = [mark for mark, name in (("chosen", result.selected), ("best", result.best)) if name == one.layer]
    yield f"{one.layer} ◀ {', '.join(marks)}" if marks else one.layer
    yield from _score_values(one.score, kinds)
    yield f"{one.perplexity:.3f}"
    yield _change(one.change, one.interval)
    yield f"{one.k}"
    yield f"{one.lam:.3f}"
    yield f"{one.temperature:.4g}"


def _score_values(score: LayerScore | None, kinds: Sequence[ScoreKind]) -> Iterator[str]:
    for kind in kinds:
        value = MISSING if score is None else _known(getattr(score, kind.name), f".{kind.digits}f")
        yield f"{value} ± {_half(score.interval):.3f}" if score and kind.name == "dispersion" else value


def _change(value: float, interval: Interval) -> str:
    return MISSING if math.isnan(value) else f"{value:+.1%} ± {_known(_half(interval), '.1%')}"


def _known(value: float, form: str) -> str:
    return MISSING if math.isnan(value) else format(value, form)


def interval(value: Interval) -> str:
    """Both ends of an interval, with four decimals."""
    return f"{value.low:.4f} … {value.high:.4f}"


def _half(value: Interval) -> float:
    return (value.high - value.low) / 2


def choice_lines(result: ScoreResult | VectorScores | EvalResult) -> Iterator[Text]:
    """Yield sentences on the choice, its regret and correlations, and warnings; scores of files have no choice."""
    if not isinstance(result, VectorScores) and result.choice:
        yield Text(f"Chosen: {result.choice.reason}.", style="green")
        if result.choice.disagreement:
            yield Text(f"Note: {result.choice.disagreement}.", style="yellow")
    if isinstance(result, EvalResult):
        yield from _verdict_lines(result)


def _verdict_lines(result: EvalResult) -> Iterator[Text]:
    if result.regret:
        low, high = result.regret.interval.low, result.regret.interval.high
        told = f"{result.regret.value:+.2%} (95 % interval {low:+.2%} … {high:+.2%})"
        yield Text(
            f"Regret of the choice: {told}; against the best in hindsight {result.regret.against_hindsight:+.2%}."
        )
    yield from _by_query_lines(result)
    yield from _correlation_lines(result.correlations)
    if result.index:
        one = result.index
        with_it = f", perplexity {one.perplexity:.3f} with it" if one.perplexity else ""
        yield Text(f"Index of {one.layer}: {one.spec}, recall@{one.recall_k} {one.recall:.4f}{with_it}.")
    for warning in result.warnings:
        yield Text(f"Warning: {warning}.", style="yellow")


def _by_query_lines(result: EvalResult) -> Iterator[Text]:
    """Yield a sentence on λ by query for the chosen layer, or for the best one if none was chosen."""
    for one in result.layers:
        moved = one.by_query
        if moved and one.layer == (result.selected or result.best):
            against = f"{_change(moved.change, moved.interval)} against its fixed λ"
            yield Text(f"λ by query: {one.layer} has perplexity {moved.perplexity:.3f}, {against}.")


def _correlation_lines(correlations: Sequence[Correlation]) -> Iterator[Text]:
    """Yield a line with all scores for each group of layers."""
    for (among, layers), group in groupby(correlations, key=lambda one: (one.among, one.layers)):
        told = ", ".join(f"{TITLES.get(one.score, one.score)} {_known(one.spearman, '+.2f')}" for one in group)
        over = f"{among} {layers} layers" if among == "all" else f"{layers} {among}"
        yield Text(f"Rank correlation with perplexity over {over}: {told}.")

"""Views of an evaluation's result: the contents of the page, with formatted numbers.

Regret is by how much the perplexity of the chosen layer exceeds that of the best one; against hindsight, the best is
picked on the very tokens that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from knnlm.layer_names import loosely_split, network_order
from knnlm.report import numbers
from knnlm.report.examples import ExampleView, example_view
from knnlm.report.headline import Headline, make_headline, shown_layer
from knnlm.report.table import COLUMNS, Column, TableRow, layer_rows
from knnlm.results import Correlation, EvalResult, Interval, LayerResult, LayerScore, Perplexity


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Point:
    """One layer in the charts: numbers, and its hover text."""

    layer: str
    block: int | None
    part: str
    x: float
    """Block number; for a layer after the last block, the number of blocks."""
    dispersion: float | None
    dispersion_error: tuple[float, float]
    """Distances from the value to the interval's ends, above and below."""
    perplexity: float | None
    perplexity_error: tuple[float, float]
    """As `dispersion_error`, of the difference from the best layer."""
    pilot: float | None
    candidate: bool
    chosen: bool
    best: bool
    hover: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """Perplexity of one layer as a function of λ."""

    label: str
    part: str
    chosen: bool
    points: tuple[tuple[float, float], ...]
    fitted: tuple[float, float]


@dataclass(frozen=True)
class ChartData:
    """Data of the charts."""

    points: tuple[Point, ...]
    lm_perplexity: float | None
    curves: tuple[Curve, ...]
    num_blocks: int


@dataclass(frozen=True)
class Fact:
    """A name and its value."""

    name: str
    value: str


@dataclass(frozen=True)
class CorrelationTable:
    """Spearman correlations: a row for each score, a column for each set of layers."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class ReportView:
    """Contents of the page."""

    title: str
    headline: Headline | None
    tiles: tuple[Tile, ...]
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    parts: tuple[str, ...]
    charts: ChartData
    correlations: CorrelationTable
    fitted: bool
    """Whether k, λ or T were fitted on part of the evaluation text."""
    helped: tuple[ExampleView, ...]
    hurt: tuple[ExampleView, ...]
    warnings: tuple[str, ...]
    index: tuple[Fact, ...]
    settings: tuple[Fact, ...]
    versions: tuple[Fact, ...]
    seconds: tuple[Fact, ...]


def make_view(result: EvalResult, *, title: str) -> ReportView:
    """Make the view of a result."""
    names = {layer.layer for layer in result.layers} | {score.layer for score in result.examined}
    ordered = sorted(names, key=network_order)
    return ReportView(
        title=title,
        headline=make_headline(result),
        tiles=tuple(_tiles(result)),
        columns=COLUMNS,
        rows=layer_rows(result),
        parts=tuple(dict.fromkeys(loosely_split(name)[1] for name in ordered)),
        charts=_chart_data(result),
        correlations=_correlation_table(result.correlations),
        fitted=result.tuning_tokens > 0,
        helped=tuple(example_view(example) for example in result.helped),
        hurt=tuple(example_view(example) for example in result.hurt),
        warnings=result.warnings,
        index=tuple(_index_facts(result)),
        settings=_facts(result.settings),
        versions=_facts(result.versions),
        seconds=tuple(Fact(name, numbers.duration(value)) for name, value in result.seconds.items()),
    )


def _tiles(result: EvalResult) -> Iterable[Tile]:
    low, high = (numbers.perplexity(end) for end in (result.lm.interval.low, result.lm.interval.high))
    known = "" if math.isnan(result.lm.interval.low) else f"95 % interval {low} to {high}, "
    yield Tile("Plain LM", numbers.perplexity(result.lm.perplexity), known + _other_units(result.lm))
    shown = shown_layer(result)
    if shown is not None:
        name = {result.best: "best layer", result.selected: "chosen layer"}.get(shown.layer, shown.layer)
        yield Tile(f"kNN-LM, {name}", numbers.perplexity(shown.perplexity), _other_units(shown))
        interval = _interval_note(shown.interval)
        yield Tile("Change", numbers.percent(shown.change, signed=True), interval)
        yield from _by_query_tile(shown)
    if result.regret is not None:
        hindsight = f"against hindsight {numbers.percent(result.regret.against_hindsight, signed=True)}"
        note = ", ".join(filter(None, (_interval_note(result.regret.interval), hindsight)))
        yield Tile("Regret", numbers.percent(result.regret.value, signed=True), note)
    tuned = f", tuned on {result.tuning_tokens:,}" if result.tuning_tokens else ""
    yield Tile("Keys", f"{result.keys:,}", f"reported on {result.lm.tokens:,} tokens{tuned}")


def _by_query_tile(shown: LayerResult) -> Iterable[Tile]:
    if shown.by_query is not None:
        change = f"{numbers.percent(shown.by_query.change, signed=True)} against its fixed λ"
        note = ", ".join(filter(None, (change, _interval_note(shown.by_query.interval))))
        yield Tile("With a λ for each query", numbers.perplexity(shown.by_query.perplexity), note)


def _interval_note(interval: Interval) -> str:
    text = numbers.percent_interval(interval)
    return text and f"95 % interval {text}"


def _other_units(measured: Perplexity | LayerResult) -> str:
    bits, word = numbers.decimal(measured.bits_per_byte, 3), numbers.perplexity(measured.word_perplexity)
    return f"{bits} bits per byte, {word} per word"


def _chart_data(result: EvalResult) -> ChartData:
    measured = {layer.layer: layer for layer in result.layers}
    scores = {score.layer: score for score in result.examined}
    scores |= {name: layer.score for name, layer in measured.items() if layer.score is not None}
    names = sorted(measured.keys() | scores.keys(), key=network_order)
    blocks = [block for block, _ in map(loosely_split, names) if block is not None]
    num_blocks = max(blocks, default=-1) + 1
    return ChartData(
        points=tuple(_point(name, measured.get(name), scores.get(name), result, num_blocks) for name in names),
        lm_perplexity=_finite(result.lm.perplexity),
        curves=tuple(_curves(result)),
        num_blocks=num_blocks,
    )


def _point(
    name: str, layer: LayerResult | None, score: LayerScore | None, result: EvalResult, num_blocks: int
) -> Point:
    block, part = loosely_split(name)
    perplexity = math.nan if layer is None else layer.perplexity
    against = layer.versus_best_interval if layer else Interval(math.nan, math.nan)
    best = perplexity / (1 + layer.versus_best) if layer else math.nan
    dispersion = math.nan if score is None else score.dispersion
    arms = (math.nan, math.nan) if score is None else (score.interval.low, score.interval.high)
    return Point(
        layer=name,
        block=block,
        part=part,
        x=num_blocks if block is None else block,
        dispersion=_finite(dispersion),
        dispersion_error=_arms(dispersion, *arms),
        perplexity=_finite(perplexity),
        perplexity_error=_arms(perplexity, best * (1 + against.low), best * (1 + against.high)),
        pilot=None if score is None else _finite(score.pilot),
        candidate=result.choice is not None and name in result.choice.candidates,
        chosen=name == result.selected,
        best=name == result.best,
        hover=tuple(_hover(name, layer, score)),
    )


def _hover(name: str, layer: LayerResult | None, score: LayerScore | None) -> Iterable[str]:
    yield name
    if layer is not None:
        change = numbers.percent(layer.change, signed=True)
        yield f"perplexity {numbers.perplexity(layer.perplexity)} ({change})"
    if score is not None:
        width = numbers.decimal(numbers.half_width(score.interval), 3)
        yield f"dispersion {numbers.decimal(score.dispersion, 3)} ± {width}"
        yield f"probe {numbers.decimal(score.probe, 3)}, pilot {numbers.perplexity(score.pilot)}"


def _curves(result: EvalResult) -> Iterable[Curve]:
    for layer in result.layers:
        if layer.layer not in (result.selected, result.best):
            continue
        points = tuple((lam, value) for lam, value in layer.lambda_curve if math.isfinite(lam) and math.isfinite(value))
        marks = [mark for mark, name in (("chosen", result.selected), ("best", result.best)) if name == layer.layer]
        label, part = f"{layer.layer} ({' and '.join(marks)})", loosely_split(layer.layer)[1]
        yield Curve(label, part, layer.layer == result.selected, points, (layer.lam, layer.perplexity))


def _arms(value: float, low: float, high: float) -> tuple[float, float]:
    above, below = high - value, value - low
    known = math.isfinite(above) and math.isfinite(below)
    return (max(above, 0.0), max(below, 0.0)) if known else (0.0, 0.0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _correlation_table(correlations: Sequence[Correlation]) -> CorrelationTable:
    values = {(item.score, item.among): numbers.decimal(item.spearman, 2, signed=True) for item in correlations}
    sets = {item.among: f"{item.among} ({item.layers} layers)" for item in correlations}
    scores = dict.fromkeys(item.score for item in correlations)
    rows = tuple(
        (score.replace("_", " "), tuple(values.get((score, among), numbers.MISSING) for among in sets))
        for score in scores
    )
    return CorrelationTable(tuple(sets.values()), rows)


def _index_facts(result: EvalResult) -> Iterable[Fact]:
    index = result.index
    if index is None:
        return
    yield Fact("layer", index.layer)
    yield Fact("kind", index.spec)
    yield Fact(f"recall@{index.recall_k}", numbers.percent(index.recall))
    yield Fact("size", numbers.size(index.size_bytes))
    if index.perplexity is not None:
        yield Fact("perplexity with this index", numbers.perplexity(index.perplexity))


def _facts(values: Mapping[str, object]) -> tuple[Fact, ...]:
    return tuple(Fact(name, _setting(value)) for name, value in values.items())


def _setting(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_setting(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_setting(item) for item in value)
    return str(value)

"""The table of layers: columns and rows of formatted cells, best perplexity first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from knnlm.layer_names import loosely_split, network_order
from knnlm.report import numbers
from knnlm.results import SCORES, EvalResult, Interval, LayerResult, LayerScore, ScoreKind


@dataclass(frozen=True)
class Column:
    """Key, label and help text of a column."""

    key: str
    label: str
    help: str
    extra: bool = False
    """Hidden unless asked for."""


@dataclass(frozen=True)
class Cell:
    """One value: its text, a note in small print, and the number to sort by (None: unknown, sorted last)."""

    text: str
    note: str = ""
    order: float | None = None


@dataclass(frozen=True)
class TableRow:
    """One layer."""

    layer: str
    part: str
    chosen: bool
    best: bool
    candidate: bool
    bar: float
    """Perplexity as a share of the plain LM's, 0 to 1."""
    cells: dict[str, Cell]


def _score_columns(*, extra: bool) -> tuple[Column, ...]:
    """Columns of the scores: the two always shown before perplexity, or the others."""
    return tuple(
        Column(kind.name, _sentence(kind.name.replace("_", " ")), _sentence(kind.meaning), extra)
        for kind in SCORES
        if (kind.name not in ("dispersion", "pilot")) == extra
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


COLUMNS = (
    Column("layer", "Layer", "Block and part of the network whose vectors are the keys"),
    *_score_columns(extra=False),
    Column("perplexity", "Perplexity", "Perplexity of the kNN-LM with keys from this layer"),
    Column("change", "Against the LM", "Change of perplexity relative to the plain LM, with its 95 % interval"),
    Column("k", "k", "Neighbours retrieved for each token"),
    Column("lam", "λ", "Weight of the neighbours' distribution in the mixture"),
    Column("temperature", "T", "Temperature, in this layer's squared distances"),
    Column("versus_best", "Against the best", "Perplexity relative to the best layer's", extra=True),
    Column("bits", "Bits per byte", "Bits per byte of the kNN-LM; comparable across tokenizers", extra=True),
    Column("word", "Word perplexity", "Perplexity of the kNN-LM per word of the text", extra=True),
    *_score_columns(extra=True),
)


def layer_rows(result: EvalResult) -> tuple[TableRow, ...]:
    """A row for each layer, the lowest perplexity first; then those that have only scores, the best pilot first."""
    candidates = set(result.choice.candidates) if result.choice else set()
    places = _score_places(result)
    measured = {layer.layer: _cells(layer, places) for layer in result.layers}
    scored = {score.layer: _unmeasured(score, places) for score in result.examined}
    every = scored | measured
    bars = {layer.layer: _share(layer.perplexity, result.lm.perplexity) for layer in result.layers}
    rows = [
        TableRow(
            layer=name,
            part=loosely_split(name)[1],
            chosen=name == result.selected,
            best=name == result.best,
            candidate=name in candidates,
            bar=bars.get(name, 0.0),
            cells=every[name] | {"layer": Cell(name, order=position)},
        )
        for position, name in enumerate(sorted(every, key=network_order))
    ]
    return tuple(sorted(rows, key=_rank))


def _rank(row: TableRow) -> tuple[float, float]:
    return _last_if_unknown(row.cells["perplexity"].order), _last_if_unknown(row.cells["pilot"].order)


def _share(part: float, whole: float) -> float:
    return min(part / whole, 1.0) if math.isfinite(part) and math.isfinite(whole) and whole > 0 else 0.0


def _last_if_unknown(order: float | None) -> float:
    return math.inf if order is None else order


def _score_places(result: EvalResult) -> int:
    """Decimals of dispersion and probe, the same for all layers: enough to show the intervals."""
    widths = sorted(numbers.half_width(layer.score.interval) for layer in result.layers if layer.score)
    widths = [width for width in widths if width > 0]
    return 4 if widths and widths[len(widths) // 2] < 0.001 else 3


def _cells(layer: LayerResult, places: int) -> dict[str, Cell]:
    return {
        "perplexity": _cell(layer.perplexity, numbers.perplexity),
        "change": _change(layer.change, layer.interval),
        "k": Cell(f"{layer.k:,}", order=layer.k),
        "lam": _cell(layer.lam, lambda value: numbers.decimal(value, 2 if 0.01 <= value <= 0.99 else 3)),
        "temperature": _cell(layer.temperature, numbers.significant),
        "versus_best": _change(layer.versus_best, layer.versus_best_interval),
        "bits": _cell(layer.bits_per_byte, lambda value: numbers.decimal(value, 3)),
        "word": _cell(layer.word_perplexity, numbers.perplexity),
    } | _score_cells(layer.score, places)


def _unmeasured(score: LayerScore, places: int) -> dict[str, Cell]:
    return {column.key: Cell(numbers.MISSING) for column in COLUMNS} | _score_cells(score, places)


def _score_cells(score: LayerScore | None, places: int) -> dict[str, Cell]:
    if score is None:
        return {kind.name: Cell(numbers.MISSING) for kind in SCORES}
    notes = {"dispersion": score.interval, "probe": score.probe_interval}
    return {kind.name: _score_cell(kind, score, places, notes.get(kind.name)) for kind in SCORES}


def _score_cell(kind: ScoreKind, score: LayerScore, places: int, interval: Interval | None) -> Cell:
    digits = min(kind.digits, places)
    note = _plus_minus(interval, digits) if interval else ""
    return _cell(getattr(score, kind.name), lambda value: numbers.decimal(value, digits), note)


def _cell(value: float, show: Callable[[float], str], note: str = "") -> Cell:
    return Cell(show(value), note, value if math.isfinite(value) else None)


def _change(value: float, interval: Interval) -> Cell:
    return _cell(value, lambda fraction: numbers.percent(fraction, signed=True), numbers.percent_interval(interval))


def _plus_minus(interval: Interval, places: int) -> str:
    width = numbers.half_width(interval)
    return f"±{numbers.SPACE}{numbers.decimal(width, places)}" if math.isfinite(width) else ""

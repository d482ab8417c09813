"""Plotly figures of a view, as plain objects; colours are CSS variables that the page's script resolves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from knnlm.report import numbers
from knnlm.report.view import ChartData, Curve, Point

Figure = dict[str, Any]
Trace = dict[str, Any]

INK, MUTED, GRID = "var(--ink)", "var(--muted)", "var(--grid)"
# Parts differ by shape as well as colour; outputs of sublayers are dotted, the residual stream is dashed.
SYMBOLS = {
    "attn_input": "circle",
    "attn_output": "square",
    "ffn_input": "diamond",
    "ffn_output": "triangle-up",
    "block_output": "cross",
    "final_norm": "triangle-down",
}
DASHES = {"attn_output": "dot", "ffn_output": "dot", "block_output": "dash"}


@dataclass(frozen=True)
class Chart:
    """A figure with its key, title and caption."""

    key: str
    title: str
    caption: str
    figure: Figure


def make_charts(data: ChartData) -> tuple[Chart, ...]:
    """Charts that have data: a line needs several layers, a dispersion chart needs scores."""
    scored = [point for point in data.points if point.dispersion is not None]
    measured = [point for point in data.points if point.perplexity is not None]
    both = [point for point in scored if point.perplexity is not None]
    charts = []
    if len(scored) > 1:
        charts.append(_dispersion_chart(data, scored))
    if len(measured) > 1:
        charts.append(_perplexity_chart(data, measured))
    if sum(point.pilot is not None for point in data.points) > 1:
        charts.append(_pilot_chart(data))
    if len(both) > 1:
        charts.append(_scatter_chart(data, both))
    if any(len(curve.points) > 1 for curve in data.curves):
        charts.append(_lambda_chart(data))
    return tuple(charts)


def colour(part: str) -> str:
    """The CSS variable of a part's colour."""
    return f"var(--{part.replace('_', '-')})" if part in SYMBOLS else MUTED


def _dispersion_chart(data: ChartData, points: Sequence[Point]) -> Chart:
    traces = _part_lines(points, "dispersion")
    marks = _marks(points, lambda point: (point.x, point.dispersion))
    layout = base_layout(_block_axis(data), {"title": {"text": "dispersion"}})
    caption = "How differently a layer’s vectors point, by block, one line for each part. Bars are 95 % intervals."
    return Chart("dispersion", "Dispersion by depth", caption, {"data": [*traces, *marks], "layout": layout})


def _perplexity_chart(data: ChartData, points: Sequence[Point]) -> Chart:
    traces = _part_lines(points, "perplexity")
    marks = _marks(points, lambda point: (point.x, point.perplexity))
    layout = base_layout(_block_axis(data), _perplexity_axis(data, points)) | _lm_line(data, "end")
    caption = (
        "Perplexity of the kNN-LM with keys from each layer, by block; lower is better. Bars are 95 % intervals of the "
        "difference from the best layer. Dashed: the plain LM."
    )
    return Chart("perplexity", "Perplexity by layer", caption, {"data": [*traces, *marks], "layout": layout})


def _pilot_chart(data: ChartData) -> Chart:
    points = [point for point in data.points if point.pilot is not None]
    marks = _marks(points, lambda point: (point.x, point.pilot))
    values = [point.pilot for point in points if point.pilot is not None]
    layout = base_layout(_block_axis(data), _value_axis("pilot’s perplexity", values))
    caption = (
        "Perplexity of a small kNN-LM inside the sample on which the layer was chosen, for every layer. It compares "
        "layers; its level is not that of the full datastore."
    )
    figure = {"data": [*_part_lines(points, "pilot"), *marks], "layout": layout}
    return Chart("pilot", "Pilot by layer", caption, figure)


def _scatter_chart(data: ChartData, points: Sequence[Point]) -> Chart:
    traces = [_scatter_trace(part, group) for part, group in _by_part(points)]
    marks = _marks(points, lambda point: (point.dispersion, point.perplexity))
    layout = base_layout({"title": {"text": "dispersion"}}, _perplexity_axis(data, points)) | _lm_line(data, "end")
    caption = (
        "Where dispersion orders layers well, points fall from left to right. Filled: candidates; hollow: the rest."
    )
    return Chart("scatter", "Dispersion against perplexity", caption, {"data": [*traces, *marks], "layout": layout})


def _lambda_chart(data: ChartData) -> Chart:
    curves = [curve for curve in data.curves if len(curve.points) > 1]
    traces = [trace for curve in curves for trace in _curve_traces(curve)]
    axis = {"title": {"text": "λ, weight of the neighbours"}, "range": [-0.02, 1.02], "dtick": 0.2}
    layout = base_layout(axis, _curve_axis(data, curves)) | _lm_line(data, "middle")
    layout |= {"showlegend": len(curves) > 1}
    caption = "Perplexity as the neighbours’ weight grows, at the fitted k and temperature. The dot is the fitted λ."
    return Chart("lambda", "Weight of retrieval", caption, {"data": traces, "layout": layout})


def _by_part(points: Sequence[Point]) -> Iterable[tuple[str, list[Point]]]:
    for part in dict.fromkeys(point.part for point in points):
        yield part, [point for point in points if point.part == part]


def _part_lines(points: Sequence[Point], what: str) -> list[Trace]:
    return [_part_line(part, group, what) for part, group in _by_part(points)]


def _part_line(part: str, points: Sequence[Point], what: str) -> Trace:
    arms = [getattr(point, f"{what}_error", (0.0, 0.0)) for point in points]
    return _named(part) | {
        "mode": "lines+markers",
        "x": [point.x for point in points],
        "y": [getattr(point, what) for point in points],
        "error_y": {
            "type": "data",
            "array": [above for above, _ in arms],
            "arrayminus": [below for _, below in arms],
            "thickness": 1,
            "width": 0,
            "color": colour(part),
        },
        "line": {"color": colour(part), "width": 2, "dash": DASHES.get(part, "solid")},
        "marker": {"color": colour(part), "symbol": SYMBOLS.get(part, "circle"), "size": 7 if len(points) < 20 else 5},
        "customdata": _hover_texts(points),
    }


def _scatter_trace(part: str, points: Sequence[Point]) -> Trace:
    symbol = SYMBOLS.get(part, "circle")
    return _named(part) | {
        "mode": "markers",
        "x": [point.dispersion for point in points],
        "y": [point.perplexity for point in points],
        "marker": {
            "color": colour(part),
            "symbol": [symbol if point.candidate else f"{symbol}-open" for point in points],
            "size": [(11 if point.candidate else 8) - (3 if len(points) > 20 else 0) for point in points],
            "opacity": 1,
            "line": {"color": colour(part), "width": 1.5},
        },
        "customdata": _hover_texts(points),
    }


def _named(part: str) -> Trace:
    """Fields shared by every trace of a part; the page's script hides traces by `meta.part`."""
    return {
        "type": "scatter",
        "name": escape(part),
        "meta": {"part": part},
        "showlegend": False,
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _hover_texts(points: Sequence[Point]) -> list[str]:
    return ["<br>".join(escape(line) for line in point.hover) for point in points]


def _marks(points: Sequence[Point], place: Any) -> list[Trace]:  # noqa: ANN401 - a function of a point to (x, y)
    """A ring around the chosen layer and a square around the best; the page's legend names them."""
    rings = [(point, "circle-open", 17) for point in points if point.chosen]
    squares = [(point, "square-open", 23) for point in points if point.best]
    return [_mark(symbol, size, *place(point)) for point, symbol, size in rings + squares]


def _mark(symbol: str, size: int, x: float, y: float) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [x],
        "y": [y],
        "marker": {"symbol": symbol, "size": size, "color": INK, "line": {"width": 2, "color": INK}},
        "cliponaxis": False,
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _curve_traces(curve: Curve) -> list[Trace]:
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": escape(curve.label),
        "x": [lam for lam, _ in curve.points],
        "y": [value for _, value in curve.points],
        "line": {"color": colour(curve.part), "width": 2.5, "dash": "solid" if curve.chosen else "dash"},
        "customdata": [numbers.perplexity(value) for _, value in curve.points],
        "hovertemplate": f"{escape(curve.label)}<br>λ %{{x:.2f}}: perplexity %{{customdata}}<extra></extra>",
    }
    lam, value = curve.fitted
    if not (math.isfinite(lam) and math.isfinite(value)):
        return [line]
    dot = {
        "type": "scatter",
        "mode": "markers",
        "x": [lam],
        "y": [value],
        "marker": {"color": colour(curve.part), "size": 11, "line": {"color": INK, "width": 2}},
        "hovertemplate": f"fitted λ {lam:.2f}: perplexity {numbers.perplexity(value)}<extra></extra>",
        "showlegend": False,
    }
    return [line, dot]


def _block_axis(data: ChartData) -> Figure:
    step = max(1, math.ceil(data.num_blocks / 9))
    ticks = list(range(0, data.num_blocks, step))
    labels = [str(tick) for tick in ticks]
    if any(point.block is None for point in data.points):
        ticks, labels = [*ticks, data.num_blocks], [*labels, "final"]
    margin = 0.02 * data.num_blocks + 0.25
    return {
        "title": {"text": "block"},
        "tickvals": ticks,
        "ticktext": labels,
        "range": [-margin, max(point.x for point in data.points) + margin],
    }


def _perplexity_axis(data: ChartData, points: Sequence[Point]) -> Figure:
    values = [point.perplexity for point in points if point.perplexity is not None]
    return _value_axis("perplexity", values + ([data.lm_perplexity] if data.lm_perplexity else []))


def _value_axis(title: str, values: Sequence[float]) -> Figure:
    low, high = min(values), max(values)
    # A few layers with very high perplexity must not compress the range of the good ones.
    if scale := log_where_wide(low, high):
        low, high = math.log10(low), math.log10(high)
    room = (high - low) or 1.0
    return {"title": {"text": title}, "range": [low - 0.1 * room, high + 0.14 * room]} | scale


def log_where_wide(low: float, high: float) -> Figure:
    """A logarithmic axis where values span orders of magnitude, so that one does not compress the range of the rest."""
    return log_scale(low, high) if high > 4 * low > 0 else {}


def log_scale(low: float, high: float) -> Figure:
    """A logarithmic axis with ticks at 1, 2 and 5 times powers of ten; plotly itself would label 50 as 5."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    places = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    ticks = [place for place in places if low / 2 <= place <= 2 * high]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _curve_axis(data: ChartData, curves: Sequence[Curve]) -> Figure:
    """Perplexity axis, cut a little above the plain LM: curves go to infinity near λ = 1."""
    values = [value for curve in curves for _, value in curve.points]
    top = max([data.lm_perplexity or 0, *(curve.points[0][1] for curve in curves)])
    low = min(values)
    top = min(max(values), top + 0.15 * (top - low) if top > low else max(values))
    return {"title": {"text": "perplexity"}, "range": [low - 0.08 * (top - low), top + 0.12 * (top - low)]}


def _lm_line(data: ChartData, side: str) -> Figure:
    if data.lm_perplexity is None:
        return {}
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": data.lm_perplexity, "y1": data.lm_perplexity}
    text = f"plain LM {numbers.perplexity(data.lm_perplexity)}"
    label = {"text": text, "textposition": side, "font": {"color": MUTED}}
    return {"shapes": [line | {"line": {"color": MUTED, "width": 1.5, "dash": "dash"}, "label": label}]}


def base_layout(xaxis: Figure, yaxis: Figure) -> Figure:
    """Layout shared by all figures: backgrounds, fonts, margins, grid; the axes as given."""
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "ticks": "", "automargin": True}
    return {
        "autosize": True,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": MUTED, "size": 12.5, "family": "var(--font)"},
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": GRID, "font": {"color": INK}, "align": "left"},
        "margin": {"l": 8, "r": 16, "t": 16, "b": 8},
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": INK}},
        "xaxis": axis | {"showgrid": False} | xaxis,
        "yaxis": axis | yaxis,
    }

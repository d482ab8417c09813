"""slices.html: the page of `knnlm slices`, made from slices.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from knnlm.report import numbers
from knnlm.report.charts import MUTED, Chart, Figure, Trace, base_layout, colour
from knnlm.report.page import Lines, Page, PageTable, render_page, settings_lines, write_page

Set = Mapping[str, Any]

_COLOURS = ("attn_input", "ffn_input", "block_output", "attn_output", "ffn_output")
# Detectors of a set's wrong answers: the field, and its name.
_FINDERS = (
    ("tail_auc", "low dispersion inside the prompt"),
    ("confidence_auc", "the model’s low confidence"),
    ("length_auc", "a short prompt"),
)


def write_slices(document: Set, folder: str | Path) -> Path:
    """Write slices.json and slices.html into a folder; return the path of the latter.

    :raises OSError: a file cannot be written.
    """
    return write_page("slices", document, render_slices(document), folder)


def render_slices(document: Set) -> str:
    """Render the page as text."""
    sets = document["sets"]
    sliced = [one for one in sets if one["slices"]]
    labelled = [one for one in sets if one["accuracy"] is not None]
    page = Page(
        title=f"How hard is this set? {document['model']}",
        headline=_headline(document),
        lead=[_lead(document)],
        notes=[note for one in sets for note in one["notes"]],
        charts=[
            *(_slice_chart(one) for one in sliced),
            *([_auc_chart(labelled)] if labelled else []),
            *([_ranking_chart(sets)] if len(sets) > 1 else []),
            *([_ranked_chart(labelled, document["set_correlation"])] if document["set_correlation"] else []),
        ],
        tables=[_table(sets), *_slice_tables(sliced)],
        lists=[
            Lines("What is not known of the paper’s protocol, and was decided here", document["protocol"]["ours"]),
            settings_lines(document["settings"]),
        ],
    )
    return render_page(page)


def _headline(one: Set) -> str:
    if one["accuracy"] is None:
        return (
            f"{one['set']}: mean dispersion inside a prompt {numbers.decimal(one['within'], 4)}; no answers to check it"
        )
    if one["tail_auc"] is None:
        return (
            f"{one['set']}: {numbers.percent(one['accuracy'])} of the answers are right, so nothing can be told apart"
        )
    low, high = one["tail_auc_interval"]
    verdict = "finds" if low > 0.5 else "points away from" if high < 0.5 else "does not find"
    return f"Low dispersion {verdict} the wrong answers of {one['set']}: AUC {numbers.decimal(one['tail_auc'], 3)}"


def _lead(one: Set) -> str:
    told = f"{one['items']:,} items at {one['layer']}."
    if one["accuracy"] is None:
        return told
    told += f" Right: {numbers.percent(one['accuracy'])}"
    told += f", by chance {numbers.percent(one['chance'])}." if one["chance"] is not None else "."
    if one["tail_auc"] is None:
        return told
    low, high = one["tail_auc_interval"]
    return (
        f"{told} The AUC is the probability that a wrong item has the lower dispersion of a wrong and a right one; 0.5 "
        f"is chance, its 95 % interval is {numbers.decimal(low, 3)} to {numbers.decimal(high, 3)}. The model’s own "
        f"confidence has {numbers.decimal(one['confidence_auc'], 3)}."
    )


def _slice_chart(one: Set) -> Chart:
    traces = [_slice_line(layer, number) for number, layer in enumerate(one["layers"])]
    layout = base_layout(
        {"title": {"text": "right answers in the slice"}, "tickformat": ".0%", "range": [-0.03, 1.05]},
        {"title": {"text": "dispersion between queries"}},
    )
    caption = (
        f"{one['draws']} draws of {one['slice_size']} items at each accuracy. Bars: where 95 % of such draws fall. "
        f"{_difference(one)}"
    )
    key = f"slices-{_key(one['set'])}"
    return Chart(key, f"Slices of {one['set']}", caption, {"data": traces, "layout": layout})


def _difference(one: Set) -> str:
    low, high = one["right_minus_wrong_interval"]
    found = f"{_signed(one['right_minus_wrong'])} ({_signed(low)} to {_signed(high)})"
    return f"Right minus wrong items at {one['layer']}: {found}."


def _slice_line(layer: Set, number: int) -> Trace:
    look = colour(_COLOURS[number % len(_COLOURS)])
    slices = layer["slices"]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(layer["layer"]),
        # Error bars of several layers are offset, so that they do not overlap.
        "x": [each["accuracy"] + 0.008 * number for each in slices],
        "y": [each["dispersion"] for each in slices],
        "error_y": _arms([(each["dispersion"], *each["interval"]) for each in slices], look),
        "line": {"color": look, "width": 2},
        "marker": {"color": look, "size": 7},
        "customdata": [_share(each) for each in slices],
        "hovertemplate": "%{customdata} right: %{y:.4f}<extra></extra>",
        "showlegend": True,
    }


def _auc_chart(sets: Sequence[Set]) -> Chart:
    traces = [_points(sets, field, words, number) for number, (field, words) in enumerate(_FINDERS)]
    half = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0.5, "y1": 0.5}
    layout = base_layout({"type": "category"}, {"title": {"text": "AUC"}}) | {
        "shapes": [half | {"line": {"color": MUTED, "width": 1.5, "dash": "dash"}}],
        "scattermode": "group",
    }
    caption = "How well each finds the wrong answers; 0.5 is chance. Bars are 95 % intervals."
    return Chart("auc", "What finds the wrong answers", caption, {"data": traces, "layout": layout})


def _ranking_chart(sets: Sequence[Set]) -> Chart:
    traces = [_points(sets, "within", "dispersion inside the prompt", 0)]
    layout = base_layout({"type": "category"}, {"title": {"text": "mean dispersion inside a prompt"}})
    caption = "Sets from the hardest to the easiest, if low dispersion means hard. Bars are 95 % intervals."
    return Chart("ranking", "Sets, without labels", caption, {"data": traces, "layout": layout | {"showlegend": False}})


def _ranked_chart(sets: Sequence[Set], found: Set) -> Chart:
    trace = {
        "type": "scatter",
        "mode": "markers+text",
        "x": [one["within"] for one in sets],
        "y": [one["accuracy"] for one in sets],
        "text": [escape(one["set"].rsplit(".", 1)[0]) for one in sets],
        "textposition": "top center",
        "cliponaxis": False,
        "marker": {"color": colour(_COLOURS[0]), "size": 9},
        "hovertemplate": "%{text}: dispersion %{x:.4f}, right %{y:.1%}<extra></extra>",
    }
    layout = base_layout(
        {"title": {"text": "mean dispersion inside a prompt"}},
        {"title": {"text": "right answers"}, "tickformat": ".0%"},
    )
    low, high = found["spearman_interval"]
    caption = (
        f"If low dispersion means hard, points rise. Spearman {_decimal(found['spearman'], 2)} "
        f"({numbers.decimal(low, 2)} to {numbers.decimal(high, 2)})."
    )
    return Chart("ranked", "Does the ranking hold?", caption, {"data": [trace], "layout": layout})


def _points(sets: Sequence[Set], field: str, words: str, number: int) -> Trace:
    shown = [one for one in sets if one[field] is not None]
    look = colour(_COLOURS[number])
    return {
        "type": "scatter",
        "mode": "markers",
        "name": words,
        "x": [escape(one["set"]) for one in shown],
        "y": [one[field] for one in shown],
        "error_y": _arms([(one[field], *one[f"{field}_interval"]) for one in shown], look),
        "marker": {"color": look, "size": 9},
        "hovertemplate": f"{words}: %{{y:.4f}}<extra></extra>",
    }


def _arms(ends: Sequence[tuple[float, float, float]], look: str) -> Figure:
    """Error bars of (value, low, high)."""
    return {
        "type": "data",
        "array": [high - value for value, _, high in ends],
        "arrayminus": [value - low for value, low, _ in ends],
        "thickness": 1.5,
        "width": 0,
        "color": look,
    }


def _table(sets: Sequence[Set]) -> PageTable:
    heads = (
        *("set", "items", "layer", "right", "right, normalised", "chance"),
        *("inside a prompt", "95 %", "between prompts", "tail AUC", "95 %", "confidence AUC", "length AUC"),
    )
    rows = [_cells(one, layer) for one in sets for layer in one["layers"]]
    caption = "The lower the dispersion inside its prompts, the harder a set should be; AUCs say whether that holds."
    return PageTable("Every set and layer", caption, heads, rows)


def _cells(one: Set, layer: Set) -> list[str]:
    return [
        one["set"],
        f"{one['items']:,}",
        layer["layer"],
        *(_percent(one[name]) for name in ("accuracy", "accuracy_normalized", "chance")),
        *(numbers.decimal(layer["within"], 4), _interval(layer["within_interval"], 4), _decimal(layer["between"], 4)),
        *(_decimal(layer["tail_auc"], 3), _interval(layer["tail_auc_interval"], 3)),
        *(_decimal(one["confidence_auc"], 3), _decimal(one["length_auc"], 3)),
    ]


def _slice_tables(sets: Sequence[Set]) -> Iterator[PageTable]:
    if not sets:
        return
    shares = [_share(each) for each in sets[0]["slices"]]
    heads = ("set", "layer", "items", *shares, "right minus wrong", "95 %", "Spearman")
    rows = [
        [
            *(one["set"], layer["layer"], f"{layer['slice_size']}"),
            *(numbers.decimal(each["dispersion"], 4) for each in layer["slices"]),
            *(_signed(layer["right_minus_wrong"]), _interval(layer["right_minus_wrong_interval"], 4)),
            _decimal(layer["slice_correlation"]["spearman"], 2),
        ]
        for one in sets
        for layer in one["layers"]
    ]
    caption = (
        "Dispersion between the queries of a slice, by the share of right answers in it. Spearman is over all draws, "
        "which share their items; whether right items are more dispersed than wrong ones, the column before tells."
    )
    yield PageTable("Slices", caption, heads, rows)


def _share(one: Set) -> str:
    return f"{100 * one['accuracy']:.0f}{numbers.SPACE}%"


def _key(name: str) -> str:
    """A name as part of an HTML id."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)


def _decimal(value: float | None, places: int) -> str:
    return numbers.MISSING if value is None else numbers.decimal(value, places)


def _signed(value: float) -> str:
    return numbers.decimal(value, 4, signed=True)


def _percent(value: float | None) -> str:
    return numbers.MISSING if value is None else numbers.percent(value)


def _interval(ends: Sequence[float] | None, places: int) -> str:
    if ends is None:
        return numbers.MISSING
    return numbers.TIE.join((numbers.decimal(ends[0], places), "to", numbers.decimal(ends[1], places)))

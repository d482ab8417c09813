"""rank-models.html: the page of `knnlm rank-models`, made from rank-models.json.

Regret is by how much the figure of the first-ranked model is worse than the best figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from knnlm.files import short_names
from knnlm.report import numbers
from knnlm.report.charts import Chart, Trace, base_layout, colour, log_where_wide
from knnlm.report.page import Lines, Page, PageTable, render_page, settings_lines, steps, write_page

Document = Mapping[str, Any]

_LOOK = {"color": colour("ffn_input"), "size": 10}


def write_rank_models(document: Document, folder: str | Path) -> Path:
    """Write rank-models.json and rank-models.html into a folder; return the path of the latter.

    :raises OSError: a file cannot be written.
    """
    return write_page("rank-models", document, render_rank_models(document), folder)


def render_rank_models(document: Document) -> str:
    """Render the page as text."""
    models = document["models"]
    names = short_names([one["model"] for one in models])
    measured = [one["measured"] for one in models if one["measured"] is not None]
    protocol = document["protocol"]
    page = Page(
        title="Models by dispersion gap",
        headline=f"{names[0]} has the largest gap, {numbers.decimal(models[0]['gap'], 4)}",
        lead=_lead(document),
        notes=document["notes"],
        charts=[_gap_chart(models, names), *([_measured_chart(document, names)] if len(measured) > 1 else [])],
        tables=[_table(models, names)],
        lists=[
            *_token_lists(document["tokens"]),
            steps("As in arXiv 2506.24106", protocol["released"]),
            steps("What was ours", protocol["ours"]),
            settings_lines(document["settings"]),
        ],
    )
    return render_page(page)


def _lead(document: Document) -> list[str]:
    told = "The gap is the mean distance within the domain’s tokens plus that between them and everyday ones. "
    told += "It is for finished models tuned from one base: along a training from scratch it ranked in reverse."
    return [told] if document["regret"] is None else [told, regret_words(document)]


def regret_words(document: Document) -> str:
    """A sentence that compares the first model's figure with the best one."""
    worse, best = ("below", "highest") if document["higher_is_better"] else ("above", "lowest")
    if document["regret"] == 0:
        return f"The first model’s figure is the {best}."
    return f"The first model’s figure is {numbers.percent(document['regret'])} {worse} the {best}."


def _gap_chart(models: Sequence[Document], names: Sequence[str]) -> Chart:
    # Reversed, so that the first is at the top.
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [one["gap"] for one in reversed(models)],
        "y": [escape(name) for name in reversed(names)],
        "marker": _LOOK,
        "hovertemplate": "%{y}: %{x:.4f}<extra></extra>",
    }
    axis = {"title": {"text": "dispersion gap"}}
    figure = {"data": [trace], "layout": base_layout(axis, {"type": "category"})}
    return Chart("gap", "Gap by model", "The axis does not begin at 0: differences are small.", figure)


def _measured_chart(document: Document, names: Sequence[str]) -> Chart:
    models = document["models"]
    trace: Trace = {
        "type": "scatter",
        "mode": "markers+text" if len(models) <= 20 else "markers",
        "x": [one["measured"] for one in models],
        "y": [one["gap"] for one in models],
        "text": [escape(name) for name in names],
        "textposition": "top center",
        "cliponaxis": False,
        "marker": _LOOK,
        "hovertemplate": "%{text}: measured %{x:.4g}, gap %{y:.4f}<extra></extra>",
    }
    direction = "rise" if document["higher_is_better"] else "fall"
    caption = f"Where a large gap goes with a good figure, points {direction} from left to right. {_spearman(document)}"
    axis = {"title": {"text": "measured"}} | log_where_wide(min(trace["x"]), max(trace["x"]))
    layout = base_layout(axis, {"title": {"text": "dispersion gap"}})
    return Chart("measured", "Gap against what was measured", caption, {"data": [trace], "layout": layout})


def _spearman(document: Document) -> str:
    if document["spearman"] is None:
        return ""
    found, low, high = (
        numbers.decimal(value, 2, signed=True) for value in (document["spearman"], *document["spearman_interval"])
    )
    return f"Spearman {found} ({low} to {high})."


def _table(models: Sequence[Document], names: Sequence[str]) -> PageTable:
    heads = ("model", "gap", "within", "between", "domain tokens", "everyday tokens", "measured", "tensor")
    rows = [
        [
            name,
            *(numbers.decimal(one[part], 4) for part in ("gap", "within", "between")),
            *(str(one["domain_tokens"]), str(one["general_tokens"])),
            numbers.MISSING if one["measured"] is None else numbers.significant(one["measured"], 4),
            one["tensor"] + (" (tied)" if one["tied"] else ""),
        ]
        for one, name in zip(models, names, strict=True)
    ]
    return PageTable("Every model", "The largest gap first.", heads, rows)


def _token_lists(tokens: Sequence[Document]) -> Iterator[Lines]:
    for one in tokens:
        told = [f"of the domain: {_tokens(one, 'domain')}", f"everyday: {_tokens(one, 'general')}"]
        whose = f" of {', '.join(short_names(one['models']))}" if len(tokens) > 1 else ""
        yield Lines(f"Tokens{whose}", told)


def _tokens(one: Document, kind: str) -> str:
    """Text of the tokens, or their ids if the text is unknown."""
    text = one[f"{kind}_text"]
    return ", ".join(map(str, one[kind]) if text is None else (repr(each)[1:-1].replace(" ", "␣") for each in text))

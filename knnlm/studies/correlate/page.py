"""correlate.html: the page of `knnlm correlate`, made from correlate.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from knnlm.files import short_names
from knnlm.report import numbers
from knnlm.report.charts import (
    GRID,
    INK,
    MUTED,
    SYMBOLS,
    Chart,
    Figure,
    Trace,
    base_layout,
    colour,
    log_scale,
)
from knnlm.report.page import Page, PageTable, render_page, settings_lines, steps, write_page
from knnlm.results import SCORES

Study = Mapping[str, Any]

# Line styles of the studies, in order; twelve before they repeat.
_COLOURS = [colour(part) for part in ("attn_input", "ffn_input", "block_output", "attn_output", "ffn_output")]
_DASHES = ("solid", "dash", "dot")
_CORRELATION_AXIS = {"range": [-1.05, 1.05], "zeroline": True, "zerolinecolor": MUTED}
_DEPTH_AXIS = {"title": {"text": "depth of the layer"}, "range": [-0.03, 1.03]}
_HEADS = (
    *("model", "context", "layer", "score", "Pearson", "95 %", "Spearman", "95 %"),
    *(
        "groups",
        "grouped Pearson",
        "95 %",
        "grouped Spearman",
        "across, grouped",
        "final token",
        "final token, grouped",
    ),
)


def write_correlate(document: Study, folder: str | Path) -> Path:
    """Write correlate.json and correlate.html into a folder; return the path of the latter.

    :raises OSError: a file cannot be written.
    """
    return write_page("correlate", document, render_correlate(document), folder)


def render_correlate(document: Study) -> str:
    """Render the page as text."""
    studies = [document, *document["others"]]
    same_length = [study for study in studies if study["context"] == document["context"]]
    charts = [
        _scatter_chart(document),
        _depth_chart(same_length, "ungrouped"),
        _depth_chart(same_length, "grouped"),
        *([_model_chart(same_length)] if len(same_length) > 2 else []),
        *([_context_chart(studies)] if len(studies) > len(same_length) else []),
        *(_cluster_chart(same_length, kind) for kind in _cluster_kinds(document)),
    ]
    page = Page(
        title=f"{_kind(document)[0].capitalize()} and perplexity: {document['model']}",
        headline=_headline(document),
        lead=_lead(document),
        notes=list(dict.fromkeys(f"{_name(study, studies)}: {note}" for study in studies for note in study["notes"])),
        charts=charts,
        tables=[_table(studies), *_cluster_tables(same_length)],
        lists=[
            steps("As in the released code of arXiv 2506.24106", document["protocol"]["released"]),
            steps("What was ours", document["protocol"]["ours"]),
            settings_lines(document["settings"]),
        ],
    )
    return render_page(page)


def _headline(study: Study) -> str:
    row = study["layers"][-1]
    low, high = row["ungrouped"]["spearman_interval"]
    verdict = "falls as" if high < 0 else "rises as" if low > 0 else "cannot be told to change as"
    told = f"Spearman {_signed(row['ungrouped']['spearman'])}"
    return f"At {row['layer']}, perplexity {verdict} {_kind(study)[0]} rises: {told}"


def _kind(study: Study) -> tuple[str, int]:
    """Name of the correlated score, and its number of decimals."""
    kind = next(kind for kind in SCORES if kind.name == study["score"])
    return ("dispersion" if kind.short == "within" else kind.name.replace("_", " ")), kind.digits


def _lead(study: Study) -> list[str]:
    row = study["layers"][-1]
    ungrouped = _with_interval(row["ungrouped"])
    grouped = _with_interval(row["grouped"])
    return [
        f"{study['segments']:,} segments of {study['context']} tokens, documents: {study['documents']:,}; "
        f"perplexity {numbers.perplexity(study['perplexity'])}.",
        f"Segment by segment, Spearman is {ungrouped}. Averaged in {study['groups']} groups of {study['group_size']} "
        f"segments with like perplexity, it is {grouped}: averages hide how much single segments scatter. The second "
        "says how steady the trend is; only the first says how well one segment’s score tells its perplexity.",
    ]


def _scatter_chart(study: Study) -> Chart:
    scatter = study["scatter"]
    segments = _points(scatter["segments"], "segments", {"size": 5, "color": colour("attn_input"), "opacity": 0.45})
    groups = _points(
        scatter["groups"],
        f"groups of {study['group_size']}",
        {"size": 11, "symbol": "diamond", "color": colour("ffn_input"), "line": {"width": 1, "color": INK}},
    )
    score, _ = _kind(study)
    axis = {"title": {"text": f"{score} within the segment"}}
    caption = f"Every dot is a segment of {study['model']}; a diamond is the mean of a group."
    figure = {"data": [segments, groups], "layout": base_layout(_log_axis(scatter["segments"]), axis)}
    return Chart("scatter", f"Perplexity and {score} at {scatter['layer']}", caption, figure)


def _points(points: Sequence[Sequence[float]], name: str, marker: Figure) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "marker": marker,
        "hovertemplate": "perplexity %{x:.4g}<br>score %{y:.4f}<extra></extra>",
    }


def _log_axis(points: Sequence[Sequence[float]]) -> Figure:
    values = [x for x, _ in points]
    return {"title": {"text": "perplexity"}, "gridcolor": GRID} | log_scale(min(values), max(values))


def _depth_chart(studies: Sequence[Study], kind: str) -> Chart:
    traces = [
        _line(
            _name(study, studies),
            number,
            [row["depth"] for row in study["layers"]],
            [row[kind] for row in study["layers"]],
            [row["layer"] for row in study["layers"]],
        )
        for number, study in enumerate(studies)
    ]
    layout = base_layout(_DEPTH_AXIS, {"title": {"text": "Spearman"}, **_CORRELATION_AXIS})
    words = {
        "ungrouped": ("Segment by segment", f"Rank correlation of perplexity and {_kind(studies[0])[0]}, by depth."),
        "grouped": ("In groups, as in the paper", "The same between means of groups; bars take groups as independent."),
    }
    title, caption = words[kind]
    return Chart(kind, title, f"{caption} Bars are 95 % intervals.", {"data": traces, "layout": layout})


def _line(name: str, number: int, x: Sequence[object], estimates: Sequence[Study], labels: Sequence[str]) -> Trace:
    """Spearman correlations with their intervals, in the style of a study."""
    shown = [
        (at, one, label) for at, one, label in zip(x, estimates, labels, strict=True) if one["spearman"] is not None
    ]
    values = [one["spearman"] for _, one, _ in shown]
    look = _COLOURS[number % len(_COLOURS)]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(name),
        "x": [at for at, _, _ in shown],
        "y": values,
        "error_y": {
            "type": "data",
            "array": [one["spearman_interval"][1] - one["spearman"] for _, one, _ in shown],
            "arrayminus": [one["spearman"] - one["spearman_interval"][0] for _, one, _ in shown],
            "thickness": 1,
            "width": 0,
            "color": look,
        },
        "line": {"color": look, "width": 2, "dash": _DASHES[number // len(_COLOURS) % len(_DASHES)]},
        "marker": {"color": look, "size": 7, "symbol": list(SYMBOLS.values())[number % len(SYMBOLS)]},
        "customdata": [escape(label) for label in labels],
        "hovertemplate": "%{customdata}: %{y:+.2f}<extra></extra>",
    }


def _model_chart(studies: Sequence[Study]) -> Chart:
    names = [escape(_name(study, studies)) for study in studies]
    rows = [study["layers"][-1] for study in studies]
    labels = [f"{name}, {row['layer']}" for name, row in zip(names, rows, strict=True)]
    traces = [
        _line(kind, number, names, [row[kind] for row in rows], labels)
        for number, kind in enumerate(("ungrouped", "grouped"))
    ]
    layout = base_layout({"type": "category"}, {"title": {"text": "Spearman"}, **_CORRELATION_AXIS})
    caption = f"Rank correlation of perplexity and {_kind(studies[0])[0]} at each model’s deepest layer."
    return Chart("models", "Model by model", caption, {"data": traces, "layout": layout})


def _context_chart(studies: Sequence[Study]) -> Chart:
    traces = []
    for number, model in enumerate(dict.fromkeys(study["model"] for study in studies)):
        own = sorted((study for study in studies if study["model"] == model), key=lambda study: int(study["context"]))
        rows = [study["layers"][-1] for study in own]
        if len(own) > 1:
            lengths, name = [study["context"] for study in own], _name(own[0], studies)
            traces.append(_line(name, number, lengths, [row["ungrouped"] for row in rows], [name] * len(own)))
    lengths = sorted({study["context"] for study in studies})
    axis = {
        "type": "log",
        "title": {"text": "tokens of a segment"},
        "tickvals": lengths,
        "ticktext": list(map(str, lengths)),
    }
    layout = base_layout(axis, {"title": {"text": "Spearman"}, **_CORRELATION_AXIS})
    caption = "Segment by segment, at the deepest layer, for segments of other lengths."
    return Chart("contexts", "Length of the context", caption, {"data": traces, "layout": layout})


def _cluster_kinds(study: Study) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in study["clusters"]))


def _cluster_chart(studies: Sequence[Study], kind: str) -> Chart:
    traces = [
        _cluster_line(study, kind, what, number, _name(study, studies))
        for number, study in enumerate(studies)
        for what in ("within", "between")
    ]
    layout = base_layout(_DEPTH_AXIS, {"title": {"text": "mean cosine distance"}})
    title = {"ngram": "Contexts with the same continuation", "kmeans": "Clusters of nearest contexts"}[kind]
    caption = "Mean distance between contexts of one cluster (solid) and of different clusters (dotted), by depth."
    return Chart(f"clusters-{kind}", title, caption, {"data": traces, "layout": layout})


def _cluster_line(study: Study, kind: str, what: str, number: int, name: str) -> Trace:
    rows = [row for row in study["clusters"] if row["kind"] == kind]
    look = _COLOURS[number % len(_COLOURS)]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"{escape(name)}, {what}",
        "x": [row["depth"] for row in rows],
        "y": [row[what] for row in rows],
        "line": {"color": look, "width": 2, "dash": "solid" if what == "within" else "dot"},
        "marker": {"color": look, "size": 6},
        "customdata": [f"{escape(row['layer'])}, {what}" for row in rows],
        "hovertemplate": "%{customdata}: %{y:.4f}<extra></extra>",
    }


def _table(studies: Sequence[Study]) -> PageTable:
    rows = [_cells(study, row, studies) for study in studies for row in study["layers"]]
    caption = (
        f"Sequence-level perplexity against {_kind(studies[0])[0]} within the segment, the score; across is against "
        "the dispersion between the last vectors of a group, and the last two are of the last token’s perplexity, all "
        "three Spearman’s."
    )
    return PageTable("Every layer", caption, _HEADS, rows)


def _cells(study: Study, row: Study, studies: Sequence[Study]) -> list[str]:
    ungrouped, grouped, final = row["ungrouped"], row["grouped"], row["final_token"]
    return [
        _name(study, studies),
        f"{study['context']}",
        row["layer"],
        numbers.decimal(row["score"], _kind(study)[1]),
        *(_signed(ungrouped["pearson"]), _interval(ungrouped["interval"])),
        *(_signed(ungrouped["spearman"]), _interval(ungrouped["spearman_interval"])),
        f"{grouped['count']}",
        *(_signed(grouped["pearson"]), _interval(grouped["interval"]), _signed(grouped["spearman"])),
        _signed(row["across"]["grouped"]["spearman"]),
        _signed(final["ungrouped"]["spearman"]),
        _signed(final["grouped"]["spearman"]),
    ]


def _cluster_tables(studies: Sequence[Study]) -> Iterator[PageTable]:
    rows = [
        [
            *(_name(study, studies), row["layer"], row["kind"]),
            *("–" if row[what] is None else numbers.decimal(row[what], 4) for what in ("within", "between")),
            *(f"{row['clusters']:,}", f"{row['contexts']:,}"),
        ]
        for study in studies
        for row in study["clusters"]
    ]
    if rows:
        caption = "Mean cosine distance; each cluster, and each pair of clusters, counts the same."
        yield PageTable(
            "Clusters", caption, ("model", "layer", "kind", "within", "between", "clusters", "contexts"), rows
        )


def _name(study: Study, studies: Sequence[Study]) -> str:
    """Short name of the study's model."""
    models = list(dict.fromkeys(str(one["model"]) for one in studies))
    return short_names(models)[models.index(study["model"])]


def _signed(value: float | None) -> str:
    return numbers.MISSING if value is None else numbers.decimal(value, 2, signed=True)


def _interval(ends: Sequence[float]) -> str:
    return f"{_signed(ends[0])}{numbers.TIE}to{numbers.TIE}{_signed(ends[1])}"


def _with_interval(estimate: Study) -> str:
    if estimate["spearman"] is None:
        return "unknown"
    return f"{_signed(estimate['spearman'])} (95 % interval {_interval(estimate['spearman_interval'])})"

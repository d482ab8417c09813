"""train.html: the page of `knnlm train`, made from the object in train.json."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from knnlm.report import numbers
from knnlm.report.charts import Chart, Figure, Trace, base_layout, colour, log_where_wide
from knnlm.report.page import Page, PageTable, render_page, settings_lines, steps, write_page

Training = dict[str, Any]

# Held-out text, the other text, training batches: in the same look on every chart.
_LOOKS = {
    "held-out text": ("ffn_input", "solid"),
    "held-out other text": ("attn_input", "dash"),
    "training batches": ("block_output", "dot"),
}
_RAISED = {
    "push-away": "the mean distance of all pairs in a batch",
    "uniformity": "minus the uniformity, where near pairs count most",
    "different-tokens": "the mean distance of contexts that different tokens follow",
}


def write_train(document: Training, folder: str | Path) -> Path:
    """Write train.json and train.html into a folder; gives the latter.

    :raises OSError: a file cannot be written.
    """
    return write_page("train", document, render_train(document), folder)


def render_train(document: Training) -> str:
    """The page as text."""
    protocol, settings = document["protocol"], document["settings"]
    page = Page(
        title=f"Training of {settings['model']}",
        headline=_headline(document),
        lead=[_amount(document), _loss(settings)],
        charts=[
            _perplexity_chart(document),
            _dispersion_chart(document),
            *([_spread_chart(document)] if _is_special(settings) else []),
        ],
        tables=[_table(document)],
        lists=[
            steps("As in arXiv 2506.24106", protocol["paper"]),
            steps("What was ours", protocol["ours"]),
            settings_lines(settings),
        ],
    )
    return render_page(page)


def _headline(document: Training) -> str:
    first, last = (document["points"][at]["text"] for at in (0, -1))
    perplexities = [numbers.perplexity(point["perplexity"]) for point in (first, last)]
    dispersions = [numbers.decimal(point["dispersion"], 4) for point in (first, last)]
    return (
        f"In {document['points'][-1]['step']:,} steps, perplexity on held-out text {' → '.join(perplexities)}; "
        f"dispersion of {document['layer']} {' → '.join(dispersions)}"
    )


def _amount(document: Training) -> str:
    return (
        f"{document['trained_parameters']:,} of {document['parameters']:,} parameters were trained on "
        f"{document['tokens']:,} tokens of a text of {document['text_tokens']:,}, in "
        f"{numbers.duration(document['seconds'])}."
    )


def _loss(settings: Training) -> str:
    if not settings["weight"]:
        return "The loss is the cross-entropy alone: dispersions were measured, not raised."
    return (
        f"The loss is the cross-entropy minus {settings['weight']:g} times what is raised: {_raised(settings)}. One "
        "training does not tell what that did; the same one without push-away beside it does."
    )


def _raised(settings: Training) -> str:
    return "the mean distance between the texts" if settings["between_domains"] else _RAISED[settings["regularizer"]]


def _is_special(settings: Training) -> bool:
    """Whether what is raised differs from the dispersion of the batches."""
    return bool(settings["between_domains"]) or settings["regularizer"] != "push-away"


def _perplexity_chart(document: Training) -> Chart:
    traces = [_line(document, name, (key, "perplexity"), numbers.perplexity) for name, key in _held_out(document)]
    values = [value for trace in traces for value in trace["y"]]
    caption = "Perplexity on held-out text, by step; lower is better."
    layout = base_layout(_STEPS, {"title": {"text": "perplexity"}} | log_where_wide(min(values), max(values)))
    return Chart("perplexity", "Perplexity", caption, {"data": traces, "layout": layout})


def _dispersion_chart(document: Training) -> Chart:
    traces = [_line(document, name, (key, "dispersion"), _four) for name, key in _held_out(document)]
    traces.append(_line(document, "training batches", ("dispersion",), _four))
    caption = (
        f"Mean cosine distance of the vectors of {document['layer']} in a batch, by step; of training batches, the "
        "mean since the point before."
    )
    layout = base_layout(_STEPS, {"title": {"text": "dispersion"}})
    return Chart("dispersion", "Dispersion", caption, {"data": traces, "layout": layout})


def _spread_chart(document: Training) -> Chart:
    raised = _raised(document["settings"])
    layout = base_layout(_STEPS, {"title": {"text": "what is raised"}})
    trace = _line(document, "training batches", ("spread",), _four)
    caption = f"{raised[0].upper()}{raised[1:]}; the mean since the point before."
    return Chart("spread", "What is raised", caption, {"data": [trace], "layout": layout})


_STEPS: Figure = {"title": {"text": "step"}, "rangemode": "tozero"}


def _held_out(document: Training) -> list[tuple[str, str]]:
    """Names and keys of the texts that the model was validated on."""
    both = document["points"][0]["other"] is not None
    return [("held-out text", "text"), *([("held-out other text", "other")] if both else [])]


def _line(document: Training, name: str, path: Sequence[str], words: Any) -> Trace:  # noqa: ANN401 - float to str
    """A number of each point, where the point has one."""
    part, dash = _LOOKS[name]
    found = [(point["step"], reduce(getitem, path, point)) for point in document["points"]]
    shown = [(step, value) for step, value in found if value is not None]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [step for step, _ in shown],
        "y": [value for _, value in shown],
        "line": {"color": colour(part), "width": 2, "dash": dash},
        "marker": {"color": colour(part), "size": 7},
        "customdata": [words(value) for _, value in shown],
        "cliponaxis": False,
        "hovertemplate": f"{name}, step %{{x:,}}: %{{customdata}}<extra></extra>",
        "showlegend": True,
    }


def _four(value: float | None) -> str:
    return numbers.MISSING if value is None else numbers.decimal(value, 4)


def _table(document: Training) -> PageTable:
    names = [name for name, _ in _held_out(document)]
    heads = ["step", "cross-entropy", "raised", "dispersion"]
    heads += [f"{name}, {what}" for name in names for what in ("dispersion", "perplexity")]
    caption = "The first three are means over the training batches since the point before."
    return PageTable("Every point", caption, heads, [_cells(point, document) for point in document["points"]])


def _cells(point: Training, document: Training) -> list[str]:
    training = [_four(point[name]) for name in ("cross_entropy", "spread", "dispersion")]
    held_out = [point[key] for _, key in _held_out(document)]
    return [
        f"{point['step']:,}",
        *training,
        *(cell for one in held_out for cell in (_four(one["dispersion"]), numbers.perplexity(one["perplexity"]))),
    ]

"""Markdown table and picture of docs/correlate.md, from several correlate.json.

    .venv/bin/python scripts/studies/correlate_table.py --texts nursing=a/correlate.json rust-book=b/correlate.json \
        --steps c/correlate.json --contexts d/correlate.json --picture correlate.html

Everything is at `final_norm`: perplexity of a segment against the dispersion within it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

Study = Mapping[str, Any]
LAYER = "final_norm"
COLOURS = ("#1f6feb", "#bf3989", "#1a7f37", "#57606a", "#bc4c00")


def studies_of(file: Path) -> list[Study]:
    """Every model and context of one document."""
    document = json.loads(file.read_text(encoding="utf-8"))
    return [document, *document["others"]]


def at_layer(rows: Sequence[Study]) -> Study:
    return next(row for row in rows if row["layer"] == LAYER)


def model_of(study: Study) -> str:
    return str(study["model"]).rstrip("/").rsplit("/", 1)[-1]


def with_interval(estimate: Study) -> str:
    low, high = estimate["spearman_interval"]
    return f"{estimate['spearman']:+.2f} ({low:+.2f} … {high:+.2f})"


def rows(text: str, studies: Sequence[Study]) -> Iterator[str]:
    """A line of the table for each study."""
    for study in studies:
        row, final = at_layer(study["layers"]), at_layer(study["final_token"]["layers"])
        groups = f"{with_interval(row['grouped'])}, {study['groups']} x {study['group_size']}"
        cells = (
            *(model_of(study), text, f"{study['context']}", f"{study['segments']:,}", f"{study['perplexity']:.0f}"),
            *(f"{row['score']:.3f}", f"{row['ungrouped']['pearson']:+.2f}", with_interval(row["ungrouped"]), groups),
            f"{final['ungrouped']['spearman']:+.2f}",
        )
        yield f"| {' | '.join(cells)} |"


def points(x: Sequence[Any], estimates: Sequence[Study], name: str, number: int, **look: Any) -> go.Scatter:  # noqa: ANN401
    """Spearman's correlations with their intervals."""
    middle = [one["spearman"] for one in estimates]
    above = [one["spearman_interval"][1] - one["spearman"] for one in estimates]
    below = [one["spearman"] - one["spearman_interval"][0] for one in estimates]
    bars = {"type": "data", "symmetric": False, "thickness": 1.2, "array": above, "arrayminus": below}
    return go.Scatter(x=x, y=middle, error_y=bars, name=name, marker_color=COLOURS[number], **look)


def picture(texts: Mapping[str, list[Study]], steps: list[Study], contexts: list[Study], file: Path) -> None:
    """Models by text; steps of one training; lengths of the context."""
    titles = ("Segments of 512 tokens, one by one", "Steps of one training, nursing", "Length of the segments, nursing")
    figure = make_subplots(1, 3, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03)
    names = list(dict.fromkeys(model_of(study) for studies in texts.values() for study in studies))
    for number, name in enumerate(names):
        found = {
            text: at_layer(study["layers"])["ungrouped"]
            for text, studies in texts.items()
            for study in studies
            if model_of(study) == name
        }
        # Beside one another, so that intervals do not cover one another.
        places = [list(texts).index(text) + 0.15 * (number - (len(names) - 1) / 2) for text in found]
        figure.add_trace(points(places, list(found.values()), name, number, mode="markers"), 1, 1)
        own = sorted((study for study in contexts if model_of(study) == name), key=lambda study: int(study["context"]))
        if own:
            estimates = [at_layer(study["layers"])["ungrouped"] for study in own]
            lengths = [study["context"] for study in own]
            trace = points(lengths, estimates, name, number, mode="lines+markers", showlegend=False)
            figure.add_trace(trace, 1, 3)
    trained = [int(re.sub(r"\D", "", model_of(study))) for study in steps]
    for number, kind in enumerate(("ungrouped", "grouped")):
        estimates = [at_layer(study["layers"])[kind] for study in steps]
        label = {"ungrouped": "gpt2-4m, one by one", "grouped": "gpt2-4m, in groups of 20"}[kind]
        look = {"mode": "lines+markers", "line_dash": ("solid", "dot")[number], "showlegend": bool(number)}
        figure.add_trace(points(trained, estimates, label, 4 * number, **look), 1, 2)
    lengths = sorted({study["context"] for study in contexts})
    figure.update_xaxes(tickvals=list(range(len(texts))), ticktext=list(texts), row=1, col=1)
    figure.update_xaxes(title="step", row=1, col=2)
    figure.update_xaxes(title="tokens", type="log", tickvals=lengths, ticktext=list(map(str, lengths)), row=1, col=3)
    figure.update_yaxes(range=[-1.05, 1.05], zerolinecolor="#888")
    figure.update_yaxes(title="Spearman of perplexity and dispersion", row=1, col=1)
    figure.update_layout(template="plotly_white", width=1300, height=460, font_size=14, margin={"b": 40, "t": 50})
    figure.update_layout(legend={"orientation": "h", "y": -0.2})
    figure.write_html(file, include_plotlyjs=True, config={"displayModeBar": False})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--steps", type=Path, required=True)
    parser.add_argument("--contexts", type=Path, required=True, nargs="+")
    parser.add_argument("--picture", type=Path, required=True, help="an HTML page to make")
    args = parser.parse_args()
    texts = {name: studies_of(Path(file)) for name, _, file in (one.partition("=") for one in args.texts)}
    steps, contexts = studies_of(args.steps), [study for file in args.contexts for study in studies_of(file)]
    for name, studies in {**texts, "nursing, steps": steps, "nursing, contexts": contexts}.items():
        print("\n".join(rows(name, studies)))
    picture(texts, steps, contexts, args.picture)


if __name__ == "__main__":
    main()

"""Tables and pictures from the files of `scripts/studies/findings.py`, for docs/findings.md.

    .venv/bin/python scripts/studies/findings_table.py findings --picture pages

Of the folder it reads layers.json, segments.json and checkpoints.json, and tuned.json: checkpoints that were tuned on
other text than they are measured on. It prints Markdown; --picture writes an HTML page for each picture, to take a
screenshot of.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from layer_table import score_of
from plotly.subplots import make_subplots

from knnlm.layer_names import select_layers
from knnlm.results import SCORES, Interval
from knnlm.scores.choose import by_dispersion
from knnlm.scores.layer_scorer import SEGMENT_FUNCTIONS
from knnlm.statistics import CorrelationEstimate, correlate, jackknife_interval, spearman

NAMES = tuple(kind.name for kind in SCORES)
WORDS = {name: name.replace("_", " ") for name in NAMES}
COLOURS = ("#1f6feb", "#bf3989", "#1a7f37", "#bc4c00", "#8250df", "#57606a", "#9a6700")
Record = dict[str, Any]
Sets = Mapping[str, Callable[[Sequence[str]], Sequence[str]]]

# In which layers a score may choose. Some cases have the normed inputs only.
SETS: Sets = {
    "every block and part": lambda names: names,
    "normed inputs of all blocks": lambda names: [n for n in names if n.endswith(("attn_input", "ffn_input", "norm"))],
    "`ffn_input`, upper half": lambda names: select_layers("candidates", names),
}
EVERY_PART = 40
"""Layers that a case has at least where every part was measured."""


def load(file: Path) -> Record:
    found: Record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    # The demo's model lies in a folder of that name.
    return {
        name.replace("model.", "gpt2-4m.") if name.startswith("model.") else name: one for name, one in found.items()
    }


def model_of(case: str) -> str:
    return case.rsplit(".", 1)[0]


def text_of(case: str) -> str:
    return case.rsplit(".", 1)[1]


# Choosing the key layer


def cases_of(found: Record, among: str) -> dict[str, list[Record]]:
    """The layers of each case that a set has; the set of all parts only where they were measured."""
    sets = {}
    for case, one in found.items():
        names = SETS[among]([row["layer"] for row in one["layers"]])
        if among != next(iter(SETS)) or len(names) >= EVERY_PART:
            sets[case] = [row for row in one["layers"] if row["layer"] in names]
    return sets


def order(rows: Sequence[Record], score: str) -> float:
    """Spearman's correlation of a score with perplexity over layers."""
    return spearman([row[score] for row in rows], [row["perplexity"] for row in rows])


def cost(rows: Sequence[Record], score: str) -> float:
    """log of the perplexity of the layer with the highest score, over that of the best layer of the case."""
    return excess(rows, max(rows, key=lambda row: row[score])["layer"])


def excess(rows: Sequence[Record], layer: str) -> float:
    """log of the layer's perplexity over that of the case's best layer."""
    return math.log1p(next(row for row in rows if row["layer"] == layer)["versus_best"])


def over_models(values: Mapping[str, float], bounds: tuple[float, float]) -> tuple[float, Interval]:
    """The mean over models of their mean over texts, and the interval that leaves out one model each."""
    models = sorted({model_of(case) for case in values})
    means = np.array([np.mean([value for case, value in values.items() if model_of(case) == m]) for m in models])
    without = (means.sum() - means) / (len(means) - 1)
    return float(means.mean()), jackknife_interval(float(means.mean()), without, bounds=bounds)


def layer_table(found: Record) -> Iterator[str]:
    heads = []
    for among in SETS:
        cases = cases_of(found, among)
        heads.append(f"{among}: {len(cases)} cases, {len({model_of(case) for case in cases})} models")
    yield f"| score | {' | '.join(heads)} |"
    yield f"| --- {'| --- ' * len(heads)}|"
    for score in NAMES:
        yield f"| {WORDS[score]} | {' | '.join(layer_cell(cases_of(found, among), score) for among in SETS)} |"
    cases = cases_of(found, tuple(SETS)[-1])
    ours = {case: by_dispersion([score_of(row) for row in rows]).layer for case, rows in cases.items()}
    last = {case: select_layers("-1.ffn_input", [row["layer"] for row in rows])[0] for case, rows in cases.items()}
    for name, taken in (("the default rule of knnlm", ours), ("always the last `ffn_input`", last)):
        yield f"| {name} | | | {told({case: excess(rows, taken[case]) for case, rows in cases.items()})} |"


def layer_cell(cases: Mapping[str, Sequence[Record]], score: str) -> str:
    """The order of the layers, the cost of taking the highest, and the worst cost."""
    rho = signed(*over_models({case: order(rows, score) for case, rows in cases.items()}, (-1, 1)))
    return f"ρ {rho}; {told({case: cost(rows, score) for case, rows in cases.items()})}"


def told(costs: Mapping[str, float]) -> str:
    mean, interval = over_models(costs, (-math.inf, math.inf))
    spread = f"{percent(mean)} ({percent(interval.low)} … {percent(interval.high)})"
    return f"costs {spread}, at worst {percent(max(costs.values()))}"


def layer_picture(found: Record) -> go.Figure:
    among = tuple(SETS)[1:]
    figure = make_subplots(
        1, 2, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[a.replace("`", "") for a in among]
    )
    for column, name in enumerate(among, 1):
        cases = cases_of(found, name)
        for number, model in enumerate(dict.fromkeys(map(model_of, cases))):
            points = [
                (100 * math.expm1(cost(rows, score)), place + 0.1 * (number - 3))
                for place, score in enumerate(NAMES)
                for case, rows in cases.items()
                if model_of(case) == model
            ]
            figure.add_trace(dots(points, model, number, show=column == 1), row=1, col=column)
    figure.update_xaxes(title="perplexity above the best layer's, %", zeroline=True, showgrid=True)
    figure.update_yaxes(autorange="reversed", tickvals=list(range(len(NAMES))), ticktext=[WORDS[n] for n in NAMES])
    return laid_out(figure, height=460)


# Finding hard text


def segment_estimates(found: Record, layer: int) -> Iterator[tuple[str, str, CorrelationEstimate]]:
    """Of each score, and of the number of distinct tokens, in each case: its correlation with the loss."""
    for case, one in found.items():
        scores = list(one["layers"].values())[layer] | {"distinct tokens": one["distinct_tokens"]}
        for name, values in scores.items():
            yield name, case, correlate(one["loss"], values, clusters=one["clusters"])


def segment_table(found: Record) -> Iterator[str]:
    cases = list(found)
    yield f"| score, at `final_norm` | {' | '.join(cases)} |"
    yield f"| --- {'| --- ' * len(cases)}|"
    by_name: dict[str, list[str]] = {}
    for name, _, estimate in segment_estimates(found, -1):
        by_name.setdefault(name, []).append(signed(estimate.spearman, estimate.spearman_interval))
    for name, cells in by_name.items():
        yield f"| {WORDS.get(name, name)} | {' | '.join(cells)} |"


def segment_picture(found: Record) -> go.Figure:
    titles = ("the last ffn_input", "final_norm")
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles)
    rows = [*SEGMENT_FUNCTIONS, "distinct tokens"]
    texts = list(dict.fromkeys(map(text_of, found)))
    for column, layer in enumerate((0, -1), 1):
        for number, text in enumerate(texts):
            mine = [one for one in segment_estimates(found, layer) if text_of(one[1]) == text]
            models = list(dict.fromkeys(case for _, case, _ in mine))
            trace = go.Scatter(
                x=[estimate.spearman for *_, estimate in mine],
                y=[rows.index(name) + 0.24 * (number - 1) + 0.07 * (models.index(case) - 1) for name, case, _ in mine],
                error_x=arms([estimate.spearman for *_, estimate in mine], [e.spearman_interval for *_, e in mine]),
                mode="markers",
                name=text,
                marker={"size": 6, "color": COLOURS[number]},
                showlegend=column == 1,
            )
            figure.add_trace(trace, row=1, col=column)
    figure.update_xaxes(title="Spearman with log-perplexity", range=[-1, 1], zeroline=True, showgrid=True)
    ticks = {"tickvals": list(range(len(rows))), "ticktext": [WORDS.get(name, name) for name in rows]}
    figure.update_yaxes(autorange="reversed", **ticks)
    return laid_out(figure, height=480)


# Ranking checkpoints


def by_text(found: Record) -> dict[str, list[Record]]:
    texts: dict[str, list[Record]] = {}
    for case, one in found.items():
        texts.setdefault(text_of(case), []).append(one)
    return texts


def checkpoint_table(found: Record) -> Iterator[str]:
    groups = {}
    for text, rows in by_text(found).items():
        one_run = [row for row in rows if not row["tuned"]]
        groups[f"{text}, {len(one_run)} of one training"] = one_run
        groups[f"{text}, and {len(rows) - len(one_run)} tuned on other text"] = rows
    yield f"| score, at `final_norm` | {' | '.join(groups)} |"
    yield f"| --- {'| --- ' * len(groups)}|"
    for score in NAMES:
        found_here = [order_of(rows, [row["layers"]["final_norm"][score] for row in rows]) for rows in groups.values()]
        yield f"| {WORDS[score]} | {' | '.join(found_here)} |"
    # Those tuned elsewhere were trained the longest.
    found_here = [order_of(rows, range(len(rows))) for rows in groups.values()]
    yield f"| how long it was trained | {' | '.join(found_here)} |"


def order_of(rows: Sequence[Record], values: Sequence[float]) -> str:
    estimate = correlate(losses(rows), values)
    return signed(estimate.spearman, estimate.spearman_interval)


def losses(rows: Sequence[Record]) -> list[float]:
    return [math.log(row["perplexity"]) for row in rows]


def checkpoint_picture(found: Record) -> go.Figure:
    figure = make_subplots(2, 4, subplot_titles=[WORDS[name] for name in NAMES], horizontal_spacing=0.06)
    for place, score in enumerate(NAMES):
        for number, (text, rows) in enumerate(by_text(found).items()):
            for tuned, name, marker in ((False, text, "circle"), (True, f"{text}, tuned on other text", "x")):
                mine = [row for row in rows if row["tuned"] == tuned]
                trace = go.Scatter(
                    x=[row["perplexity"] for row in mine],
                    y=[row["layers"]["final_norm"][score] for row in mine],
                    mode="markers" if tuned else "lines+markers",
                    name=name,
                    line={"color": COLOURS[number], "width": 1},
                    marker={"size": 5, "color": COLOURS[number], "symbol": marker},
                    showlegend=place == 0,
                )
                figure.add_trace(trace, row=1 + place // 4, col=1 + place % 4)
    figure.update_xaxes(type="log", dtick="D2", tickangle=0)
    figure.update_xaxes(title="perplexity", row=2)
    return laid_out(figure, height=520)


# What they share


def signed(value: float, interval: Interval) -> str:
    return f"{value:+.2f} ({interval.low:+.2f} … {interval.high:+.2f})"


def percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f} %"


def dots(points: Sequence[tuple[float, float]], name: str, number: int, *, show: bool) -> go.Scatter:
    x, y = zip(*points, strict=True)
    marker = {"size": 6, "color": COLOURS[number % len(COLOURS)]}
    return go.Scatter(x=x, y=y, mode="markers", name=name, marker=marker, showlegend=show)


def arms(values: Sequence[float], intervals: Sequence[Interval]) -> Record:
    high = [interval.high - value for value, interval in zip(values, intervals, strict=True)]
    low = [value - interval.low for value, interval in zip(values, intervals, strict=True)]
    return {"type": "data", "array": high, "arrayminus": low, "thickness": 1, "width": 0}


def laid_out(figure: go.Figure, *, height: int) -> go.Figure:
    legend = {"orientation": "h", "y": -0.18, "x": 0}
    margin = {"l": 10, "r": 10, "t": 40, "b": 10}
    return figure.update_layout(
        template="simple_white", width=1000, height=height, legend=legend, margin=margin, font={"size": 12}
    )


PARTS = {
    "layers": (layer_table, layer_picture),
    "segments": (segment_table, segment_picture),
    "checkpoints": (checkpoint_table, checkpoint_picture),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--picture", type=Path, help="a folder for the pages")
    args = parser.parse_args()
    for name, (table, picture) in PARTS.items():
        found = load(args.folder / f"{name}.json")
        if name == "checkpoints":
            tuned = load(args.folder / "tuned.json")
            found = {case: one | {"tuned": case in tuned} for case, one in (found | tuned).items()}
        if not found:
            continue
        print("\n".join(table(found)), end="\n\n")
        if args.picture:
            args.picture.mkdir(parents=True, exist_ok=True)
            page = args.picture / f"findings-{name}.html"
            picture(found).write_html(page, include_plotlyjs=True, full_html=True, config={"displayModeBar": False})


if __name__ == "__main__":
    main()

"""Pictures of docs/performance.md from the JSON of indexes.py and growth.py, as HTML pages to take screenshots of.

.venv/bin/python scripts/benchmarks/pictures.py --indexes indexes.json --growth growth.json --out pages
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star", "hexagon", "pentagon")


def front(found: Sequence[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Settings than which no other is both faster and better, the fastest first."""
    best, kept = -1.0, []
    for one in sorted(found, key=lambda one: (one["milliseconds"], -one[what])):
        if one[what] > best:
            kept.append(one)
            best = one[what]
    return kept


def indexes(document: dict[str, Any], file: Path) -> None:
    """Time a query against what is missed of the neighbours' weight, and against perplexity."""
    found, exact = document["found"][1:], document["found"][0]
    kinds = list(dict.fromkeys(one["kind"] for one in found))
    titles = ("Share of the neighbours' weight that is missed", "Perplexity")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.08)
    for number, kind in enumerate(kinds):
        own = front([one for one in found if one["kind"] == kind], "mass")
        colour = f"hsl({360 * number // len(kinds)},65%,42%)"
        look = {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8, "color": colour}
        label = kind.removeprefix(kinds[0].split(",")[0] + ",")
        x = [one["milliseconds"] for one in own]
        for column, y in ((1, [max(1 - one["mass"], 1e-6) for one in own]), (2, [one["perplexity"] for one in own])):
            line = {"mode": "lines+markers", "line_color": colour, "showlegend": column == 1}
            figure.add_trace(go.Scatter(x=x, y=y, name=label, marker=look, legendgroup=kind, **line), 1, column)
    figure.add_hline(y=exact["perplexity"], line_dash="dot", annotation_text="exact", row=1, col=2)
    figure.update_xaxes(type="log", title="milliseconds a query")
    figure.update_yaxes(type="log", row=1, col=1)
    _write(figure, file)


def growth(document: dict[str, Any], file: Path) -> None:
    """Seconds and megabytes by number of keys, with the exponent of the last decade."""
    sizes = sorted(map(int, document["sizes"]))
    figure = make_subplots(1, 2, subplot_titles=("Seconds", "Peak memory, MB"), horizontal_spacing=0.08)
    for name in document["sizes"][str(sizes[0])]:
        x = [size for size in sizes if name in document["sizes"][str(size)]]
        y = [document["sizes"][str(size)][name] for size in x]
        slope = float(np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2])) if len(x) > 1 else float("nan")
        label = f"{name}: N^{slope:.2f}"
        figure.add_trace(go.Scatter(x=x, y=y, name=label, mode="lines+markers"), 1, 2 if "memory" in name else 1)
    figure.update_xaxes(type="log", title="keys")
    figure.update_yaxes(type="log")
    _write(figure, file)


def _write(figure: go.Figure, file: Path) -> None:
    figure.update_layout(template="plotly_white", width=1250, height=470, font_size=13, margin={"t": 50, "b": 50})
    figure.write_html(file, include_plotlyjs=True, config={"displayModeBar": False})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--indexes", type=Path)
    parser.add_argument("--growth", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("indexes", indexes), ("growth", growth)):
        if file := getattr(args, name):
            draw(json.loads(file.read_text(encoding="utf-8")), args.out / f"{name}.html")


if __name__ == "__main__":
    main()

"""Ranking of checkpoints by dispersion gap and by perplexity: the figures and the picture of docs/rank-models.md.

    S=scripts/studies/rank_checkpoints.py
    .venv/bin/python $S measure MODEL... --text rust-book.jsonl --rest rest.jsonl --out scores.json
    knnlm rank-models MODEL... --domain-text rest.jsonl --general-text other.jsonl --scores scores.json --json > a.json
    .venv/bin/python $S picture "title=a.json" "other title=b.json" --out picture.html

Every fifth document is measured, as `train_model.py --held-out 5` keeps it from training; the others are --rest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from knnlm.extraction.collect import collect
from knnlm.extraction.sinks import TargetScorer
from knnlm.files import write_json
from knnlm.model.loading import load_model
from knnlm.text.corpus import Document, tokenize
from knnlm.text.held_out import take_slices
from knnlm.text.windows import WindowConfig

HELD_OUT = 5
COLUMNS = 2
TICKS = [20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    measure = verbs.add_parser("measure", help="perplexity of each model on the held-out documents")
    measure.add_argument("models", nargs="+")
    measure.add_argument("--text", type=Path, required=True)
    measure.add_argument("--rest", type=Path, required=True, help="the documents that are not held out go here")
    measure.add_argument("--max-tokens", type=int, default=8000)
    measure.add_argument("--out", type=Path, required=True)
    picture = verbs.add_parser("picture", help="gap against perplexity, a panel for each ranking")
    picture.add_argument("rankings", nargs="+", help="TITLE=FILE, of knnlm rank-models --scores --json")
    picture.add_argument("--out", type=Path, required=True, help="an HTML page")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> None:
    lines = args.text.read_text(encoding="utf-8").splitlines()
    args.rest.write_text("\n".join(line for i, line in enumerate(lines) if i % HELD_OUT) + "\n", encoding="utf-8")
    held_out = [Document(json.loads(line)["text"], args.text.name, i) for i, line in enumerate(lines[::HELD_OUT], 1)]
    scores: dict[str, float] = {}
    for model in args.models:
        scores[model] = perplexity(model, held_out, args.max_tokens)
        write_json(args.out, scores)


def perplexity(model: str, documents: list[Document], max_tokens: int) -> float:
    """Perplexity of the plain LM, in windows of 512 tokens with stride 256, on the same slices for every model."""
    lm = load_model(model)
    slices = take_slices(tokenize(documents, lm.encode), max_tokens, seed=0)
    targets = TargetScorer(lm)
    found = collect(lm, slices, WindowConfig(context=512, stride=256), [], targets=targets)
    value = float(np.exp(-targets.targets().log_probs_N.mean()))
    print(f"{model} {value:.3f} on {found.tokens:,} tokens", flush=True)
    return value


def picture(args: argparse.Namespace) -> None:
    from plotly.subplots import make_subplots

    titles, files = zip(*(ranking.split("=", 1) for ranking in args.rankings), strict=True)
    rankings = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    rows = -(-len(rankings) // COLUMNS)
    told = [f"{title}<br>{spearman(ranking)}" for title, ranking in zip(titles, rankings, strict=True)]
    figure = make_subplots(rows, COLUMNS, subplot_titles=told, vertical_spacing=0.18, horizontal_spacing=0.16)
    for place, ranking in enumerate(rankings):
        figure.add_trace(dots(ranking["models"]), row=place // COLUMNS + 1, col=place % COLUMNS + 1)
    figure.update_xaxes(title="measured perplexity", type="log", tickvals=TICKS)
    figure.update_yaxes(title="dispersion gap")
    figure.update_layout(template="simple_white", showlegend=False, width=540 * COLUMNS, height=380 * rows)
    figure.update_layout(margin={"t": 60, "b": 50, "l": 60, "r": 60})
    figure.write_html(args.out, include_plotlyjs=True, config={"displayModeBar": False})


def dots(models: list[dict[str, Any]]) -> Any:  # noqa: ANN401 - plotly has no types
    """A dot for each model; of those that lie close together, the first has its name."""
    import plotly.graph_objects as go

    x, y = np.log([one["measured"] for one in models]), np.array([one["gap"] for one in models])
    at = np.stack([(x - x.min()) / np.ptp(x) / 2, (y - y.min()) / np.ptp(y)], axis=1)
    named: list[int] = []
    for i, place in enumerate(at):
        if not named or (np.abs(at[named] - place) > 0.06).any(axis=1).all():
            named.append(i)
    names = [short(one["model"]) if i in named else "" for i, one in enumerate(models)]
    look = {"textposition": "middle right", "textfont_size": 10, "cliponaxis": False}
    look |= {"marker_size": 8, "marker_color": "#1f6feb"}
    return go.Scatter(x=np.exp(x), y=y, text=names, mode="markers+text", **look)


def short(model: str) -> str:
    """`rust-book/step-30` is rust-book 30."""
    name, step = Path(model).name, Path(model).name.removeprefix("step-")
    return name if name == step else f"{Path(model).parent.name} {step}"


def spearman(ranking: dict[str, Any]) -> str:
    low, high = ranking["spearman_interval"]
    return f"Spearman {ranking['spearman']:+.2f} ({low:+.2f} … {high:+.2f})"


if __name__ == "__main__":
    arguments = parse_arguments()
    (measure if arguments.verb == "measure" else picture)(arguments)

"""Does the dispersion gap rank checkpoints as perplexity does? The figures and the picture of docs/rank-models.md.

    S=scripts/rank_checkpoints.py
    .venv/bin/python $S measure MODEL... --text rust-book.jsonl --rest rest.jsonl --out scores.json
    knnlm rank-models MODEL... --domain-text rest.jsonl --general-text other.jsonl --scores scores.json --json > a.json
    .venv/bin/python $S picture "title=a.json" "other title=b.json" --out picture.html

Every fifth document is measured, as scripts/train_model.py --held-out 5 keeps it from training; the others are --rest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from knnlm.collect import collect
from knnlm.corpus import Document, tokenize
from knnlm.lm import load_model
from knnlm.storage import write_json
from knnlm.windows import WindowConfig, take_slices

HELD_OUT = 5


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
    """Of the plain LM, in windows of 512 tokens that move by 256; the same slices of the documents for every model."""
    lm = load_model(model)
    slices = take_slices(tokenize(documents, lm.encode), max_tokens, seed=0)
    found = collect(lm, slices, WindowConfig(context=512, stride=256), [], log_probs=True)
    assert found.lm_log_probs_N is not None
    value = float(np.exp(-found.lm_log_probs_N.mean()))
    print(f"{model} {value:.3f} on {found.tokens:,} tokens", flush=True)
    return value


def picture(args: argparse.Namespace) -> None:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    titles, files = zip(*(ranking.split("=", 1) for ranking in args.rankings), strict=True)
    rankings = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    figure = make_subplots(
        1, len(rankings), subplot_titles=[f"{t}<br>{told(r)}" for t, r in zip(titles, rankings, strict=True)]
    )
    for column, ranking in enumerate(rankings, start=1):
        models = ranking["models"]
        dots = go.Scatter(
            x=[one["measured"] for one in models],
            y=[one["gap"] for one in models],
            text=[Path(one["model"]).name for one in models],
            mode="markers+text",
            textposition="top center",
            textfont={"size": 9},
            marker={"size": 8, "color": "#1f6feb"},
        )
        figure.add_trace(dots, row=1, col=column)
    figure.update_xaxes(title="measured perplexity", type="log", dtick="D2")
    figure.update_yaxes(title="dispersion gap", col=1)
    figure.update_layout(template="simple_white", showlegend=False, width=440 * len(rankings), height=420)
    figure.write_html(args.out, include_plotlyjs=True, full_html=True)


def told(ranking: dict[str, Any]) -> str:
    low, high = ranking["spearman_interval"]
    return f"Spearman {ranking['spearman']:+.2f} ({low:+.2f} … {high:+.2f})"


if __name__ == "__main__":
    arguments = parse_arguments()
    (measure if arguments.verb == "measure" else picture)(arguments)

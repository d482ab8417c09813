"""Markdown tables from the files of `scripts/studies/layer_study.py`.

    .venv/bin/python scripts/studies/layer_table.py study/*.json

Each file is a case: a model on a text.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from knnlm.layer_names import select_layers
from knnlm.results import SCORES, Interval, LayerScore
from knnlm.scores.choose import by_dispersion
from knnlm.statistics import spearman

Study = dict[str, Any]


def percent(value: float) -> str:
    """With sign and two decimals."""
    return f"{value:+.2%}"


def spread(value: float, interval: Sequence[float]) -> str:
    """A change with its interval."""
    return f"{percent(value)} ({percent(interval[0])} … {percent(interval[1])})"


def default(study: Study) -> dict[str, Any]:
    """The default's choice in one case, and its regret; of files without pilots, what dispersion takes."""
    if recorded := next((one for one in study["choices"] if one["score"] == "auto"), None):
        return recorded
    names = select_layers("candidates", [row["layer"] for row in study["layers"]])
    layer = by_dispersion([score_of(row) for row in study["layers"] if row["layer"] in names]).layer
    return next(one for one in study["choices"] if one["layer"] == layer)


def score_of(row: dict[str, Any]) -> LayerScore:
    """The scores of one layer, as they stand in its row."""
    values = {field.name: row.get(field.name, math.nan) for field in fields(LayerScore)}
    return LayerScore(
        **{name: Interval(*value) if isinstance(value, list) else value for name, value in values.items()}
    )


def overview(studies: Sequence[Study]) -> Iterator[str]:
    """One line a case: the LM, the best layer, what the default takes, its regret."""
    yield (
        "| case | keys | LM | best layer, perplexity | default takes | regret (95 % interval) "
        "| against the last `ffn_input` (95 % interval) | regret of the last `ffn_input` |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for study in studies:
        by_name = {layer["layer"]: layer for layer in study["layers"]}
        best = study["best"]
        ours = default(study)
        last = pick(study, "always", "the last ffn_input")
        yield (
            f"| {study['case']} | {study['keys']:,} | {study['lm']['perplexity']:.1f} "
            f"| {best} {by_name[best]['perplexity']:.2f} | {ours['layer']} "
            f"| {spread(ours['regret'], ours['interval'])} "
            f"| {spread(ours['against_last_ffn_input'], ours['against_interval'])} | {percent(last['regret'])} |"
        )


def known_scores(studies: Sequence[Study]) -> list[str]:
    """Scores that every file has; older files lack later scores."""
    return [kind.name for kind in SCORES if all(kind.name in study["layers"][0] for study in studies)]


def pick(study: Study, score: str, among: str) -> dict[str, Any]:
    """What one rule chose in one case."""
    return next(one for one in study["choices"] if (one["score"], one["among"]) == (score, among))


def regrets(studies: Sequence[Study]) -> Iterator[str]:
    """Median and worst regret of every score in every candidate set."""
    sets = list(dict.fromkeys(one["among"] for one in studies[0]["choices"] if one["score"] in known_scores(studies)))
    yield f"| score | {' | '.join(sets)} |"
    yield f"| --- {'| --- ' * len(sets)}|"
    for score in known_scores(studies):
        cells = []
        for among in sets:
            values = [pick(study, score, among)["regret"] for study in studies]
            cells.append(f"{percent(statistics.median(values))}, {percent(max(values))}")
        yield f"| {score} | {' | '.join(cells)} |"
    values = [pick(study, "always", "the last ffn_input")["regret"] for study in studies]
    ours = [default(study)["regret"] for study in studies]
    for name, found in (("The default", ours), ("Always the last `ffn_input`", values)):
        yield f"\n{name}: median {percent(statistics.median(found))}, worst {percent(max(found))}."


def rank_correlations(studies: Sequence[Study]) -> Iterator[str]:
    """Spearman's correlation of each score with perplexity: median, and the range over cases."""
    groups = {
        "all layers": lambda name: True,
        "ffn_input of all blocks": lambda name: name.endswith("ffn_input"),
        "normed inputs of all blocks": lambda name: name.endswith(("ffn_input", "attn_input")),
        "block_output": lambda name: name.endswith("block_output"),
    }
    yield f"| score | {' | '.join(groups)} |"
    yield f"| --- {'| --- ' * len(groups)}|"
    for score in known_scores(studies):
        cells = []
        for belongs in groups.values():
            found = []
            for study in studies:
                layers = [layer for layer in study["layers"] if belongs(layer["layer"])]
                found.append(spearman([one[score] for one in layers], [one["perplexity"] for one in layers]))
            cells.append(f"{statistics.median(found):+.2f} ({min(found):+.2f} … {max(found):+.2f})")
        yield f"| {score} | {' | '.join(cells)} |"


def by_block(study: Study) -> Iterator[str]:
    """Perplexity of every block and part of one case."""
    parts = ("attn_input", "attn_output", "ffn_input", "ffn_output", "block_output")
    by_name = {layer["layer"]: layer["perplexity"] for layer in study["layers"]}
    blocks = sorted({int(name.split(".")[0]) for name in by_name if "." in name})
    yield f"### {study['case']}\n"
    yield f"| block | {' | '.join(parts)} |"
    yield f"| --- {'| --- ' * len(parts)}|"
    for block in blocks:
        cells = [f"{by_name[f'{block}.{part}']:.2f}" if f"{block}.{part}" in by_name else "–" for part in parts]
        yield f"| {block} | {' | '.join(cells)} |"
    yield f"\n`final_norm`: {by_name.get('final_norm', float('nan')):.2f}"


def main() -> None:
    """Print all tables."""
    studies = []
    for path in map(Path, sys.argv[1:]):
        studies.append(json.loads(path.read_text(encoding="utf-8")) | {"case": path.stem})
    tables = [overview(studies), regrets(studies), rank_correlations(studies)]
    for lines in [*tables, *(by_block(study) for study in studies)]:
        print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    main()

"""Markdown tables and picture of docs/train.md, from the files of `scripts/studies/push_away_study.py`.

    .venv/bin/python scripts/studies/push_away_table.py --study study --picture train.html

A difference is that of the logarithms of two perplexities of the same seed, which share the initial weights where they
are new, the order of windows and the held-out text; its 95 % interval is Student's over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from knnlm.statistics import t_quantile

Study = dict[str, dict[str, Any]]
Measure = Callable[[dict[str, Any]], float]
# With what each is compared: trained for as many steps in all, as the warm-up depends on them.
BASES = {"single-push": "single-none"} | dict.fromkeys(
    ("single-key", "single-different", "single-uniformity"), "short-none"
)
ARMS = {
    "single-push": "push-away, λ = 0.1",
    "single-key": "push-away on the last `ffn_input`, λ = 0.1",
    "single-different": "different next tokens, λ = 0.1",
    "single-uniformity": "uniformity, λ = 0.1",
}


def seeds(study: Study, *kinds: str) -> list[str]:
    """The seeds that all of the kinds of runs have."""
    return sorted(
        set.intersection(*({name.rpartition("-")[2] for name in study if name.startswith(f"{k}-")} for k in kinds))
    )


def values(study: Study, kind: str, measure: Measure, among: Sequence[str]) -> list[float]:
    return [measure(study[f"{kind}-{seed}"]) for seed in among]


def mean_and_reach(numbers: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval."""
    if len(numbers) < 2:
        return numbers[0], math.inf
    spread = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return statistics.fmean(numbers), t_quantile(len(numbers) - 1) * spread


def change(study: Study, kind: str, base: str, measure: Measure) -> tuple[float, float, float]:
    """Relative change of a perplexity against the base, with its interval."""
    among = seeds(study, kind, base)
    pairs = zip(values(study, kind, measure, among), values(study, base, measure, among), strict=True)
    middle, reach = mean_and_reach([math.log(a / b) for a, b in pairs])
    return math.expm1(middle), math.expm1(middle - reach), math.expm1(middle + reach)


def shown(found: tuple[float, float, float]) -> str:
    value, low, high = found
    return f"{value:+.1%} ({low:+.1%} … {high:+.1%})"


def at(step: int, which: str = "text", what: str = "perplexity") -> Measure:
    return lambda run: next(float(one[which][what]) for one in run["points"] if one["step"] == step)


def after(part: str) -> Measure:
    """Perplexity after the training, on the text of the kNN-LM: of the `lm`, or with its keys of the `layer`."""
    return lambda run: float(run["knn"][part]["perplexity"])


def average(study: Study, kind: str, measure: Measure) -> float:
    return statistics.fmean(values(study, kind, measure, seeds(study, kind)))


def steps_of(study: Study, kind: str) -> list[int]:
    return [one["step"] for one in study[f"{kind}-{seeds(study, kind)[0]}"]["points"] if one["step"]]


def on_the_way(study: Study) -> Iterator[str]:
    """Perplexity with and without push-away at each evaluation."""
    yield "| setting | step | without | with | change (95 % interval) | dispersion without | with |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for setting, which in (("single", "text"), ("cross", "text"), ("cross", "other")):
        base, kind = f"{setting}-none", f"{setting}-push"
        for step in steps_of(study, kind):
            label = setting if setting == "single" else f"{setting}, {'WikiText' if which == 'text' else 'Rust book'}"
            cells = [f"{average(study, one, at(step, which)):.1f}" for one in (base, kind)]
            spread = [f"{average(study, one, at(step, which, 'dispersion')):.3f}" for one in (base, kind)]
            found = shown(change(study, kind, base, at(step, which)))
            yield f"| {label} | {step} | {cells[0]} | {cells[1]} | {found} | {spread[0]} | {spread[1]} |"


def regularizers(study: Study) -> Iterator[str]:
    """At 1,000 steps: the LM's and the kNN-LM's perplexity, and the dispersion of the key layer."""
    yield "| loss | LM | change | kNN-LM | change | dispersion of `final_norm` | of the keys | probe |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    alone = {"short-none": "cross-entropy alone", "single-none": "the same, on the way to 2,000 steps"}
    for kind, label in (alone | ARMS).items():
        cells = []
        for measure in (after("lm"), after("layer")):
            cells.append(f"{average(study, kind, measure):.1f}")
            cells.append(shown(change(study, kind, BASES[kind], measure)) if kind in BASES else "")
        for layer, what in (("final_norm", "dispersion"), ("3.ffn_input", "dispersion"), ("3.ffn_input", "probe")):
            cells.append(f"{average(study, kind, lambda run, a=layer, b=what: run['dispersion'][a][b]):.3f}")
        yield f"| {label} | {' | '.join(cells)} |"


def lasting(study: Study) -> Iterator[str]:
    """Whether the gain of uniformity outlives a longer training and a better learning rate."""
    rows = (
        ("1,000 steps at 5e-4, LM", "single-uniformity", "short-none", at(1000)),
        ("2,000 steps at 5e-4, LM", "long-uniformity", "single-none", at(2000)),
        ("1,000 steps at 2e-3, LM", "fast-uniformity", "fast-none", at(1000)),
        ("1,000 steps at 2e-3, LM (kNN-LM's text)", "fast-uniformity", "fast-none", after("lm")),
        ("1,000 steps at 2e-3, kNN-LM", "fast-uniformity", "fast-none", after("layer")),
    )
    yield "| setting | cross-entropy alone | with uniformity, λ = 0.1 | change (95 % interval) |"
    yield "| --- | --- | --- | --- |"
    for label, kind, base, measure in rows:
        if seeds(study, kind, base):
            cells = [f"{average(study, one, measure):.1f}" for one in (base, kind)]
            yield f"| {label} | {' | '.join(cells)} | {shown(change(study, kind, base, measure))} |"


def fine_tuning(study: Study) -> Iterator[str]:
    """Dispersion before and after."""
    layers = ("7.ffn_input", "7.block_output", "final_norm")
    yield f"| model | perplexity | {' | '.join(f'`{layer}`, pooled | within' for layer in layers)} |"
    yield f"| --- | --- {'| --- | --- ' * len(layers)}|"
    for kind, label, key, step in (
        ("tuned-lora", "before", "dispersion_before", 0),
        ("tuned-lora", "LoRA", "dispersion", -1),
        ("tuned-full", "all weights", "dispersion", -1),
    ):
        cells = [f"{average(study, kind, lambda run, s=step: run['points'][s]['text']['perplexity']):.1f}"]
        for layer in layers:
            for what in ("dispersion", "dispersion_within"):
                found = values(study, kind, lambda run, a=layer, b=what, k=key: run[k][a][b], seeds(study, kind))
                middle, reach = mean_and_reach(found)
                cells.append(f"{middle:.3f}" + (f" ± {reach:.3f}" if 0 < reach < math.inf else ""))
        yield f"| {label} | {' | '.join(cells)} |"


def weights(study: Study) -> Iterator[str]:
    """One seed each: how much the weight matters, at 1,000 steps."""
    yield "| loss | λ | LM | change | kNN-LM | change | dispersion of `final_norm` |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, kind in (("push", "push-away"), ("different", "different next tokens"), ("uniformity", "uniformity")):
        for weight in ("0.01", "0.1", "1"):
            run = study.get(f"single-{name}-0" if weight == "0.1" else f"weight-{name}-{weight}-0")
            if run is None:
                continue
            base = study["single-none-0" if (name, weight) == ("push", "0.1") else "short-none-0"]
            cells = []
            for part in ("lm", "layer"):
                found, without = after(part)(run), after(part)(base)
                cells += [f"{found:.1f}", f"{found / without - 1:+.1%}"]
            spread = run["dispersion"]["final_norm"]["dispersion"]
            yield f"| {kind} | {weight} | {' | '.join(cells)} | {spread:.3f} |"


def picture(study: Study, file: Path) -> None:
    """Change of perplexity on the way, and at the end for each regularizer."""
    titles = ("Validation perplexity on the way, against cross-entropy alone", "At 1,000 steps, λ = 0.1")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.08, column_widths=[0.62, 0.38])
    lines = (
        ("single-push", "single-none", "text", "push-away"),
        ("long-uniformity", "single-none", "text", "uniformity"),
        ("cross-push", "cross-none", "text", "two domains, λ = 0.01: WikiText"),
        ("cross-push", "cross-none", "other", "two domains: Rust book"),
    )
    for number, (kind, base, which, label) in enumerate(lines):
        steps = steps_of(study, kind)
        found = [change(study, kind, base, at(step, which)) for step in steps]
        # Beside one another, so that intervals do not cover one another.
        figure.add_trace(_points([step + 20 * number for step in steps], found, label, "lines+markers"), 1, 1)
    names = [name.replace("`", "").replace(", λ = 0.1", "").replace("push-away on", "…on") for name in ARMS.values()]
    for number, (part, label) in enumerate((("lm", "LM"), ("layer", "kNN-LM"))):
        found = [change(study, kind, BASES[kind], after(part)) for kind in ARMS]
        figure.add_trace(_points([at + 0.15 * number for at in range(len(found))], found, label, "markers"), 1, 2)
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names, row=1, col=2)
    figure.add_hline(y=0, line_color="#888", line_width=1)
    figure.update_yaxes(tickformat="+.0%", zeroline=False)
    figure.update_xaxes(title="step", row=1, col=1)
    figure.update_layout(template="plotly_white", width=1200, height=470, font_size=14, margin={"b": 60, "t": 60})
    figure.update_layout(legend={"orientation": "h", "y": -0.22})
    figure.write_html(file, include_plotlyjs=True, config={"displayModeBar": False})


def _points(x: Sequence[Any], found: Sequence[tuple[float, float, float]], name: str, mode: str) -> go.Scatter:
    middle = [value for value, _, _ in found]
    above, below = [high - value for value, _, high in found], [value - low for value, low, _ in found]
    bars = {"type": "data", "symmetric": False, "thickness": 1.2, "array": above, "arrayminus": below}
    return go.Scatter(x=x, y=middle, error_y=bars, mode=mode, name=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="an HTML page to make")
    args = parser.parse_args()
    study = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.study.glob("*.json"))}
    for table in (on_the_way, regularizers, lasting, fine_tuning, weights):
        print("\n".join(table(study)), end="\n\n")
    if args.picture:
        picture(study, args.picture)


if __name__ == "__main__":
    main()

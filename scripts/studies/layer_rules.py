"""What each rule of choice takes and costs, from the folders of `scripts/studies/layer_pilots.py`: Markdown tables.

    .venv/bin/python scripts/studies/layer_rules.py study/smol.* study/llama8m.*

Rules see the sample that `run` takes (`layer_sample.py`) or, with `--all-keys`, one drawn from all stored tokens.
Regret is cross-fitted: the best evaluated layer is picked on one half of the held-out text and compared on the other.
Rules choose among all layers that were scored; where one takes a layer that was not evaluated in full, its row says so.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnlm.layer_names import network_order, select_layers
from knnlm.results import Interval
from knnlm.scores.choose import NEAR
from knnlm.statistics import relative_change

DEFAULT, LAST = "the last `ffn_input`, unless a pilot is better", "the last `ffn_input`"
Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One model on one text."""

    name: str
    common: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    """Figures of each evaluated layer."""
    scores: dict[str, dict[str, Any]]
    pilots: dict[str, Losses]
    cluster: NDArray[np.int64]

    def change(self, one: str, other: str) -> tuple[float, Interval]:
        """Perplexity of one layer relative to another's, minus 1, with the paired interval."""
        return relative_change(*(self.losses(name) for name in (one, other)), self.common["clusters"][self.both])

    def regret(self, layer: str) -> tuple[float, Interval]:
        """Cost of a layer, cross-fitted."""
        best, swapped = (
            min(self.layers.values(), key=lambda one: float(one[key])) for key in ("tuning_loss", "swapped_loss")
        )
        theirs = np.where(self.common["tuning"], swapped["losses"], best["losses"])[self.both].astype(float)
        return relative_change(self.losses(layer), theirs, self.common["clusters"][self.both])

    def losses(self, layer: str) -> Losses:
        """-log p of the tokens that are compared."""
        found: Losses = self.layers[layer]["losses"][self.both].astype(float)
        return found

    @property
    def both(self) -> NDArray[np.bool_]:
        """The tokens of both halves, without the gaps between them."""
        found: NDArray[np.bool_] = self.common["tuning"] | self.common["fitting"]
        return found

    def pilot(self, name: str) -> float:
        """Mean loss of a layer's pilot."""
        return float(self.pilots[name].mean())

    def pilot_change(self, one: str, other: str, comparisons: int) -> Interval:
        """Interval of one layer's pilot relative to another's, among so many comparisons."""
        return relative_change(self.pilots[one], self.pilots[other], self.cluster, comparisons=comparisons)[1]

    def judged(self, proposal: str, names: Sequence[str], *, comparisons: int = 1) -> str:
        """The best pilot among those better than the proposal's beyond the interval, else the proposal."""
        rivals = [name for name in names if self.pilot(name) < self.pilot(proposal)]
        better = [name for name in rivals if self.pilot_change(name, proposal, comparisons).high < 0]
        return min(better, key=self.pilot, default=proposal)

    def deepest(self, names: Sequence[str]) -> str:
        """The deepest layer whose pilot is not worse than the best one's beyond the interval."""
        best = min(names, key=self.pilot)
        return [name for name in names if name == best or not self.pilot_change(name, best, len(names)).low > 0][-1]

    def choices(self) -> dict[str, str]:
        """What each rule takes, among all layers that were scored."""
        names = sorted(self.scores, key=network_order)
        dispersion = {name: float(self.scores[name]["dispersion"]) for name in names}
        many = len(names) - 1
        upper, parts = select_layers("candidates", names), select_layers("*.ffn_input", names)
        leader = max(upper, key=dispersion.__getitem__)
        near = [name for name in upper if dispersion[name] >= NEAR * dispersion[leader]][-1]
        return {
            "dispersion, upper half": leader,
            "deepest within 5 % of it": near,
            "probe, all layers": max(names, key=lambda name: float(self.scores[name]["probe"])),
            "pilot, all layers": min(names, key=self.pilot),
            "pilot, `ffn_input`": min(parts, key=self.pilot),
            "judge of dispersion": self.judged(leader, names, comparisons=many),
            "judge of the deepest within 5 %": self.judged(near, names, comparisons=many),
            "deepest as good as the best pilot": self.deepest(parts),
            "judge of the last `ffn_input`": self.judged(parts[-1], names, comparisons=many),
            DEFAULT: self.judged(parts[-1], (names[0], *parts)),
            LAST: parts[-1],
        }


def read_case(folder: Path, *, all_keys: bool) -> Case:
    """Read one folder of the study.

    :param all_keys: take the sample that was drawn from all stored tokens.
    """
    layers = {path.stem.removeprefix("layer-"): dict(np.load(path)) for path in sorted(folder.glob("layer-*.npz"))}
    return Case(
        folder.name,
        dict(np.load(folder / "common.npz")),
        layers,
        *read_scored(folder if all_keys else folder / "sample"),
    )


def read_scored(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Losses], NDArray[np.int64]]:
    """Read scores and pilots of all layers, and the clusters of the pilots' queries."""
    pilots = dict(np.load(folder / "pilots.npz"))
    scores = {one["layer"]: one for one in json.loads((folder / "scores.json").read_text(encoding="utf-8"))}
    cluster = pilots.pop("cluster")
    return scores, {name: losses.astype(float) for name, losses in pilots.items()}, cluster


def print_overview(cases: Sequence[Case]) -> None:
    """A row for each case: the plain LM, the best layer in hindsight, the default, and the last `ffn_input`."""
    print("| case | keys | layers | tokens | LM | best in hindsight | the default takes | the last `ffn_input` |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in cases:
        chosen, keys = case.choices(), int(case.common["keys"])
        best = min(case.layers, key=lambda name: float(case.losses(name).mean()))
        plain = math.exp(-float(case.common["lm"][case.both].mean()))
        told = [f"{name} {perplexity(case, name)}" for name in (best, chosen[DEFAULT], chosen[LAST])]
        sizes = f"{keys:,} | {len(case.layers)} | {int(case.both.sum()):,}"
        print(f"| {case.name} | {sizes} | {plain:.2f} | {' | '.join(told)} |")


def perplexity(case: Case, layer: str) -> str:
    """Of the tokens that are compared."""
    return f"{math.exp(case.losses(layer).mean()):.3f}" if layer in case.layers else "(not evaluated)"


def print_rules(cases: Sequence[Case]) -> dict[str, list[tuple[float, bool]]]:
    """A row for each case and rule; return each rule's costs, and whether it is surely worse than the last layer."""
    print("\n| case | rule | takes | perplexity | regret (95 % interval) | against the last `ffn_input` |")
    print("| --- | --- | --- | --- | --- | --- |")
    costs: dict[str, list[tuple[float, bool]]] = {}
    for case in cases:
        chosen = case.choices()
        for rule, layer in chosen.items():
            begun = f"| {case.name} | {rule} | {layer} | {perplexity(case, layer)} |"
            if layer not in case.layers:
                print(f"{begun} | |")
                continue
            (cost, spread), (more, beside) = case.regret(layer), case.change(layer, chosen[LAST])
            print(f"{begun} {told(cost, spread)} | {told(more, beside) if layer != chosen[LAST] else ''} |")
            costs.setdefault(rule, []).append((cost, beside.low > 0))
    return costs


def told(value: float, interval: Interval) -> str:
    """A change of perplexity with its interval."""
    return f"{value:+.2%} ({interval.low:+.2%} … {interval.high:+.2%})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--all-keys", action="store_true", help="pilots of a sample of all stored tokens")
    args = parser.parse_args()
    cases = [read_case(folder, all_keys=args.all_keys) for folder in args.folders]
    print_overview(cases)
    costs = print_rules(cases)
    print("\n| rule | median regret | worst | worse than the last `ffn_input` beyond the interval |")
    print("| --- | --- | --- | --- |")
    for rule, found in costs.items():
        regrets = [cost for cost, _ in found]
        worse = sum(worse for _, worse in found)
        print(f"| {rule} | {statistics.median(regrets):+.2%} | {max(regrets):+.2%} | {worse} of {len(found)} |")


if __name__ == "__main__":
    main()

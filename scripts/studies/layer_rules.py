"""What each rule of choice takes and costs, from the folders of `scripts/studies/layer_pilots.py`: Markdown tables.

    .venv/bin/python scripts/studies/layer_rules.py study/smol.* study/llama8m.*

Regret is cross-fitted: the best evaluated layer is picked on one half of the held-out text and compared on the other.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnlm.layer_names import network_order, select_layers
from knnlm.results import Interval
from knnlm.statistics import relative_change

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

    def judged(self, proposal: str) -> str:
        """The best pilot among those better than the proposal's beyond the interval, else the proposal."""
        means = {name: float(losses.mean()) for name, losses in self.pilots.items()}
        count = max(1, len(means) - 1)

        def beyond(name: str) -> bool:
            pair = self.pilots[name], self.pilots[proposal]
            return relative_change(*pair, self.cluster, comparisons=count)[1].high < 0

        better = [name for name in means if means[name] < means[proposal] and beyond(name)]
        return min(better, key=means.__getitem__, default=proposal)

    def choices(self) -> dict[str, str]:
        """What each rule takes, among the layers that were evaluated."""
        names = sorted(self.layers, key=network_order)
        means = {name: float(self.pilots[name].mean()) for name in names}
        dispersion = {name: float(self.scores[name]["dispersion"]) for name in names}
        upper, parts = select_layers("candidates", names), select_layers("*.ffn_input", names)
        leader = max(upper, key=dispersion.__getitem__)
        near = [name for name in upper if dispersion[name] >= 0.95 * dispersion[leader]][-1]
        return {
            "dispersion, upper half": leader,
            "deepest within 5 % of it": near,
            "probe, all layers": max(names, key=lambda name: float(self.scores[name]["probe"])),
            "pilot, all layers": min(names, key=means.__getitem__),
            "pilot, `ffn_input`": min(parts, key=means.__getitem__),
            "judge of dispersion": self.judged(leader),
            "judge of the deepest within 5 %": self.judged(near),
            "judge of the last `ffn_input`": self.judged(parts[-1]),
            "the last `ffn_input`": parts[-1],
        }


def read_case(folder: Path) -> Case:
    """Read one folder of the study."""
    layers = {path.stem.removeprefix("layer-"): dict(np.load(path)) for path in sorted(folder.glob("layer-*.npz"))}
    pilots = dict(np.load(folder / "pilots.npz"))
    scores = {one["layer"]: one for one in json.loads((folder / "scores.json").read_text(encoding="utf-8"))}
    cluster = pilots.pop("cluster")
    kept = {name: losses.astype(float) for name, losses in pilots.items() if name in layers}
    return Case(folder.name, dict(np.load(folder / "common.npz")), layers, scores, kept, cluster)


def main() -> None:
    """Print a row for each case and rule, and one for each rule over all cases."""
    cases = [read_case(Path(folder)) for folder in sys.argv[1:]]
    print("| case | rule | takes | perplexity | regret (95 % interval) | against the last `ffn_input` |")
    print("| --- | --- | --- | --- | --- | --- |")
    costs: dict[str, list[tuple[float, bool]]] = {}
    for case in cases:
        chosen = case.choices()
        for rule, layer in chosen.items():
            (cost, spread), (more, beside) = case.regret(layer), case.change(layer, chosen["the last `ffn_input`"])
            perplexity = math.exp(case.losses(layer).mean())
            told = f"{cost:+.2%} ({spread.low:+.2%} … {spread.high:+.2%}) | {more:+.2%} ({beside.low:+.2%} … "
            print(f"| {case.name} | {rule} | {layer} | {perplexity:.3f} | {told}{beside.high:+.2%}) |")
            costs.setdefault(rule, []).append((cost, beside.low > 0))
    print("\n| rule | median regret | worst | worse than the last `ffn_input` beyond the interval |")
    print("| --- | --- | --- | --- |")
    for rule, found in costs.items():
        regrets = [cost for cost, _ in found]
        worse = sum(worse for _, worse in found)
        print(f"| {rule} | {statistics.median(regrets):+.2%} | {max(regrets):+.2%} | {worse} of {len(found)} |")


if __name__ == "__main__":
    main()

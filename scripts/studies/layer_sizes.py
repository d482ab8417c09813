"""Does the ranking of layers change with the size of the store? An SVG and a table, from `layer_pilots.py --sizes`.

    .venv/bin/python scripts/studies/layer_sizes.py study/smol.* --out docs/images/layer-sizes.svg

A panel for each case: perplexity with keys from `ffn_input` of each block, relative to that of the last one, a line for
each size of the store.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from knnlm.layer_names import network_order
from knnlm.statistics import spearman

COLOURS = ("#9ecae1", "#4292c6", "#08306b")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 380, 230, 46, 30, 40, 18
# Perplexity above that of the last layer at which a panel ends, percent: early blocks lie beyond.
HIGHEST = 6


@dataclass(frozen=True)
class Sizes:
    """One model on one text: mean losses of `ffn_input` by block, for each size of the store."""

    name: str
    losses: dict[int, list[float]]

    def percent(self, size: int) -> list[float]:
        """Perplexity of each block relative to the last one's, minus 1, in percent."""
        found = self.losses[size]
        return [100 * math.expm1(loss - found[-1]) for loss in found]


def read_sizes(folder: Path) -> Sizes:
    """Read a case's folder and those of its smaller stores."""
    folders = [folder, *folder.glob("keys-*")]
    losses = {int(np.load(one / "common.npz")["keys"]): mean_losses(one) for one in folders}
    return Sizes(folder.name, dict(sorted(losses.items())))


def mean_losses(folder: Path) -> list[float]:
    """Cross-fitted mean loss of each block's `ffn_input`, over both halves of the text."""
    common = np.load(folder / "common.npz")
    both = common["tuning"] | common["fitting"]
    paths = {path.stem.removeprefix("layer-"): path for path in folder.glob("layer-*.ffn_input.npz")}
    return [float(np.load(paths[name])["losses"][both].mean()) for name in sorted(paths, key=network_order)]


def print_table(cases: Sequence[Sizes]) -> None:
    """The best block by size, how its order agrees with that in the largest store, and what it costs there."""
    print("| case | keys | best block | rank correlation with the largest store | cost of that block there |")
    print("| --- | --- | --- | --- | --- |")
    for case in cases:
        largest = case.losses[max(case.losses)]
        for size, found in case.losses.items():
            best = int(np.argmin(found))
            cost = math.expm1(largest[best] - min(largest))
            print(f"| {case.name} | {size:,} | {best} | {spearman(found, largest):.2f} | {cost:+.2%} |")


def panel(case: Sizes, place: int) -> Iterator[str]:
    """The SVG elements of one case."""
    rows = {size: case.percent(size) for size in case.losses}
    bottom = math.floor(min(min(row) for row in rows.values()))
    top = min(HIGHEST, math.ceil(max(max(row) for row in rows.values())))
    blocks = len(next(iter(rows.values())))
    left = place * (WIDTH + GAP) + LEFT
    right, base = (place + 1) * (WIDTH + GAP) - GAP, TOP + HEIGHT

    def x(block: float) -> float:
        return left + (right - left) * block / (blocks - 1)

    def y(percent: float) -> float:
        return base - HEIGHT * (percent - bottom) / (top - bottom)

    yield f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{case.name}</text>'
    yield f'<clipPath id="c{place}"><rect x="{left}" y="{TOP}" width="{right - left}" height="{HEIGHT}"/></clipPath>'
    for tick in range(bottom, top + 1):
        yield f'<path d="M{left} {y(tick):.1f}H{right}" stroke="{"#ddd" if tick else "#888"}"/>'
        yield f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{f"{tick:+d}" if tick else "0"} %</text>'
    for block in range(0, blocks, 5 if blocks > 12 else 1):
        yield f'<text x="{x(block):.1f}" y="{base + 16}" text-anchor="middle">{block}</text>'
    for number, (colour, (size, row)) in enumerate(zip(COLOURS, rows.items(), strict=False)):
        points = " ".join(f"{x(block):.1f},{y(value):.1f}" for block, value in enumerate(row))
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" clip-path="url(#c{place})"/>'
        beside, best = left + 112 * number, int(np.argmin(row))
        yield f'<circle cx="{x(best):.1f}" cy="{y(row[best]):.1f}" r="4" fill="{colour}"/>'
        yield f'<path d="M{beside} {base + 32}h18" stroke="{colour}" stroke-width="3"/>'
        yield f'<text x="{beside + 22}" y="{base + 36}">{size:,} keys</text>'


def figure(cases: Sequence[Sizes]) -> str:
    """The whole SVG."""
    wide, high = len(cases) * (WIDTH + GAP), TOP + HEIGHT + BOTTOM
    elements = "\n".join(element for place, case in enumerate(cases) for element in panel(case, place))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">'
    )
    return f'{head}\n<rect width="{wide}" height="{high}" fill="#fff"/>\n{elements}\n</svg>\n'


def main() -> None:
    """Print the table and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    cases = [read_sizes(folder) for folder in args.folders]
    print_table(cases)
    args.out.write_text(figure(cases), encoding="utf-8")


if __name__ == "__main__":
    main()

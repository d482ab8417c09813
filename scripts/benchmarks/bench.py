"""Benchmark of every stage against its physical limit and against the alternatives: a table, and JSON.

    scripts/bench                      all of it, tens of minutes
    scripts/bench --quick              small sizes, under three minutes, without the layer table
    scripts/bench --only extraction    one group: extraction, evaluation, table, exact, building, changing, parts,
                                       scale, real or overhead
    scripts/bench --only real --model SMOLLM2 --text TEXT --held-out TEXT     the verbs on a real pretrained model

Figures are ratios of speeds, measured in turn in one process; docs/performance.md explains each line. Without --model
and --text the small model and text of the repository are used; docs/performance.md names those of its figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import building
import changing
import evaluation
import exact
import extraction
import machine
import parts
import real
import scale
from ratios import Row
from rich.console import Console
from rich.table import Table

from knnlm.cli.memory import keep_freed_memory

DEMO = Path(__file__).parent.parent / "demo_data"


@dataclass(frozen=True)
class Size:
    """Sizes of the benchmarks."""

    tokens: int
    rounds: int
    keys: tuple[int, ...]
    queries: int
    table_keys: int
    searched: int
    real: tuple[int, int]
    """Tokens that are stored and evaluated by the verbs on a real model."""


# Units that multiply 8-bit or bfloat16 numbers faster than float32.
FAST_UNITS = {"avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8", "bf16", "i8mm"}
FULL = Size(
    tokens=12_000,
    rounds=3,
    keys=(100_000, 1_000_000),
    queries=4096,
    table_keys=100_000,
    searched=1_000_000,
    real=(60_000, 3_000),
)
QUICK = Size(
    tokens=4_096, rounds=3, keys=(20_000,), queries=1024, table_keys=5_000, searched=60_000, real=(20_000, 2_000)
)


def groups(args: argparse.Namespace, size: Size, about: Mapping[str, Any]) -> Mapping[str, Callable[[], Iterator[Row]]]:
    peak, must = about["gflops"]["float32"], 2.0 if FAST_UNITS & set(about["units"]) else 1.2
    exact_size = {"keys": size.searched, "queries": size.queries, "rounds": size.rounds}
    return {
        "exact": lambda: exact.rows(args.keys, **exact_size, peak=peak, must=must),
        "building": lambda: building.rows(args.keys, keys=size.searched, rounds=size.rounds),
        "parts": lambda: parts.rows(keys=size.searched, rounds=size.rounds),
        "scale": lambda: scale.rows(keys=size.searched),
        "changing": lambda: changing.rows(args.keys, keys=size.searched, rounds=size.rounds),
        "extraction": lambda: extraction.rows(args.model, args.text, tokens=size.tokens, rounds=size.rounds),
        "evaluation": lambda: evaluation.rows(
            args.model, args.text, args.held_out, keys=size.keys, queries=size.queries, rounds=size.rounds
        ),
        "table": lambda: iter(
            [evaluation.layer_table(args.model, args.text, args.held_out, keys=size.table_keys, queries=size.queries)]
        ),
        "real": lambda: real.rows(args.model, args.text, args.held_out, sizes=size.real, rounds=size.rounds),
        "overhead": lambda: _overhead(args, size),
    }


def _overhead(args: argparse.Namespace, size: Size) -> Iterator[Row]:
    import overhead  # needs the extras `ray` and `train`

    yield from overhead.rows(args.model, str(args.text[0]), tokens=2 * size.real[0], parts=4, rounds=size.rounds)


def show(rows: list[Row], about: Mapping[str, Any], console: Console) -> None:
    speeds = ", ".join(f"{kind} {value:,} GFLOP/s" for kind, value in about["gflops"].items())
    console.print(
        f"{about['cpu']}, {about['threads']} threads of {about['cores']} cores; {', '.join(about['units'])}; {speeds}"
    )
    table = Table("stage", "against", "times as fast", "spread", "wanted", "", "")
    for row in rows:
        spread = f"{min(row.ratios):.2f} to {max(row.ratios):.2f}"
        wanted = "" if row.must is None else f"{row.must:g}"
        more = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.figures.items()
        )
        met = "" if row.must is None else "yes" if row.is_met else "no"
        table.add_row(row.stage, row.against, f"{row.median:.2f}", spread, wanted, met, more)
    console.print(table)


def document(rows: list[Row], about: Mapping[str, Any]) -> dict[str, Any]:
    lines = [
        {"stage": r.stage, "against": r.against, "ratio": r.median, "ratios": r.ratios, "wanted": r.must, **r.figures}
        for r in rows
    ]
    return {"format": "knnlm-bench", "version": 1, "machine": about, "rows": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="groups of lines")
    parser.add_argument("--model", default=str(DEMO / "model"))
    parser.add_argument("--text", nargs="+", type=Path, default=[DEMO / "rust-book.jsonl"])
    parser.add_argument("--held-out", type=Path, default=DEMO / "rust-book.jsonl", help="text to evaluate on")
    parser.add_argument("--keys", nargs="*", type=Path, default=[], help=".npy files of keys, for exact search")
    parser.add_argument("--json", type=Path, help="a file to write")
    args = parser.parse_args()
    keep_freed_memory()  # as the command line does
    about = machine.describe()
    every = groups(args, QUICK if args.quick else FULL, about)
    unknown = set(args.only or ()) - set(every)
    if unknown:
        parser.error(f"--only {' '.join(sorted(unknown))}: there are {', '.join(every)}")
    rows, begun = [], time.perf_counter()
    # A real model is not in the repository, and Ray is an extra. The table waits for a peer's k-means of 4,096 lists,
    # over a minute.
    left_out = {"real", "overhead", *(["table"] if args.quick else [])}
    for name in args.only or [group for group in every if group not in left_out]:
        for row in every[name]():
            rows.append(row)
            print(f"{time.perf_counter() - begun:.0f} s: {row.stage}: {row.median:.2f}", file=sys.stderr, flush=True)
            if args.json:  # after each line, as a benchmark that is stopped has measured something too
                args.json.write_text(json.dumps(document(rows, about), indent=1), encoding="utf-8")
    show(rows, about, Console(width=None if sys.stdout.isatty() else 160))


if __name__ == "__main__":
    main()

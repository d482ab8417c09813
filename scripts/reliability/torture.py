"""Kills, bit flips, damaged documents and odd requests against a tiny store, with a table of the outcomes.

    scripts/torture            about half an hour on two cores
    scripts/torture --quick    under a minute

docs/reliability.md has the guarantees and the table of the full campaign. Exit status 1: a fault was found.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import documents
import flips
import kills
import odd_requests
from forks import load_everything, temporary
from rich.console import Console
from rich.table import Table
from tally import Tally
from workshop import Workshop, make

PARTS: dict[str, tuple[Callable[[Workshop, int, int, Tally], None], int, int]] = {
    "kills": (kills.campaign, 200, 2),
    "flips": (flips.campaign, 1000, 16),
    "documents": (documents.campaign, 5000, 40),
    "requests": (odd_requests.campaign, 3000, 100),
}
"""Each part with its numbers: of the whole campaign, and of the quick one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of each, under a minute")
    parser.add_argument("--count", type=int, help="so many of each, in place of the whole campaign's numbers")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts here too")
    args = parser.parse_args()
    load_everything()
    tally = Tally()
    with temporary("shop") as folder:
        shop = make(Path(folder))
        try:
            for name in args.only.split(","):
                campaign, whole, quick = PARTS[name]
                started = time.perf_counter()
                campaign(shop, args.count or (quick if args.quick else whole), args.seed, tally)
                print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        finally:
            show(tally)
    if args.json:
        args.json.write_text(json.dumps({"counts": tally.counts, "faults": tally.faults}, indent=1) + "\n")
    sys.exit(bool(tally.told))


def show(tally: Tally) -> None:
    console = Console()
    table = Table("part", "tried", "came out", "faults", title="What a store and a server take")
    for part, tried, outcomes, faults in tally.rows():
        table.add_row(part, str(tried), outcomes, faults)
    console.print(table)
    for told in tally.told:
        console.print(told, style="red", markup=False, highlight=False)


if __name__ == "__main__":
    main()

"""Single bit flips in the files of a store: refused in one line, found by `verify`, or without effect."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from damages import Damage, report, try_all
from forks import fork
from kills import make_store
from tally import Tally
from workshop import Workshop

# Flips tried by one fork; a fork that dies loses at most these.
BATCH = 25


def campaign(shop: Workshop, count: int, seed: int, tally: Tally) -> None:
    """Try `count` flips, spread over all kinds of files of a store with several parts, an index, a fit and a report."""
    make_store(shop)
    rng = random.Random(seed)
    kinds: dict[str, list[Path]] = {}
    for path in sorted(path for path in shop.store.rglob("*") if path.is_file() and path.stat().st_size):
        kinds.setdefault(_kind_of(path), []).append(path)
    groups = list(kinds.values())
    paths = [rng.choice(groups[number % len(groups)]) for number in range(count)]
    places = [(path, rng.randrange(8 * path.stat().st_size)) for path in paths]
    for start in range(0, count, BATCH):
        batch = places[start : start + BATCH]
        ended = fork(partial(_try, shop, batch))
        report(ended, "flip in {}", [str(place) for place in batch], tally)


def _try(shop: Workshop, batch: Sequence[tuple[Path, int]]) -> None:
    try_all(shop, (Damage(_kind_of(path), _flipped(path, bit)) for path, bit in batch))


@contextmanager
def _flipped(path: Path, bit: int) -> Iterator[None]:
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(whole)


def _kind_of(path: Path) -> str:
    """Files of one kind as one row."""
    if path.parent.name in ("keys", "frame"):
        return {"keys": "keys", "frame": "a layer's centre"}[path.parent.name]
    return "a report" if path.stem == "report" else path.name

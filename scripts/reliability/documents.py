"""Damaged JSON in place of a store's documents: a one-line error, or a store that works and is whole."""

from __future__ import annotations

import json
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

from tests.damage import damaged_documents

BATCH = 50


def campaign(shop: Workshop, count: int, seed: int, tally: Tally) -> None:
    """Try `count` damaged documents in place of datastore.json and index.json, in turn."""
    make_store(shop)
    rng = random.Random(seed)
    files = [shop.store / "datastore.json", next(shop.store.rglob("index.json"))]
    for start in range(0, count, BATCH):
        file = files[start // BATCH % len(files)]
        texts = list(damaged_documents(json.loads(file.read_text(encoding="utf-8")), rng, min(BATCH, count - start)))
        report(fork(partial(_try, shop, file, texts)), "damaged {}", texts, tally, sealed=True)


def _try(shop: Workshop, file: Path, texts: Sequence[str]) -> None:
    try_all(shop, (Damage(file.name, _replaced(file, text)) for text in texts))


@contextmanager
def _replaced(path: Path, text: str) -> Iterator[None]:
    whole = path.read_bytes()
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        yield
    finally:
        path.write_bytes(whole)

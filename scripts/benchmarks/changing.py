"""Keys added to a datastore and removed from it, beside a build of the whole: what changes by 1 % must not cost 100 %.

The keys are given, so that the model's passes, which only new text needs, are left out on both sides: with them, the
build grows by a hundred times what the addition grows by. Both sides write parts, encode for the index and measure its
recall; the build trains and tunes the index too.

Legend: N keys, D dimension.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from exact import load, synthetic
from numpy.typing import NDArray
from ratios import Row, seconds

from knnlm.config import KNNConfig, Settings
from knnlm.knn.indexing import index_layer
from knnlm.knn.renewing import renew_indexes
from knnlm.pipeline import remove
from knnlm.store.appender import DatastoreAppender
from knnlm.store.datastore import Datastore
from knnlm.store.writer import DatastoreWriter

DIM, LAYER, DOCUMENT = 64, "0.ffn_input", 1000
SHARE = 100
"""One key in so many comes or goes."""
SETTINGS = Settings(knn=KNNConfig(max_k=64))
MODEL = {"model": "none", "config": "0", "weights": "0", "tokenizer": "0"}


def rows(files: Sequence[Path], *, keys: int, rounds: int) -> Iterator[Row]:
    """Seconds of a build over those of adding 1 % more keys, and of removing these again."""
    more = keys // SHARE
    vectors_ND = load(files[0], keys + more, 0) if files else synthetic(keys + more, DIM)
    found: dict[str, list[float]] = {"build": [], "add": [], "remove": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder, "store")
            place.mkdir()
            for name, work in _steps(place, vectors_ND, keys):
                found[name].append(seconds(work))
    for name in ("add", "remove"):
        ratios = tuple(whole / part for whole, part in zip(found["build"], found[name], strict=True))
        told: dict[str, float | str] = {f"{one}, s": float(np.median(found[one])) for one in ("build", name)}
        yield Row(f"{name} {more:,} of {keys:,} keys, D = {vectors_ND.shape[1]}", "a build of all", ratios, 20.0, told)


def _steps(place: Path, vectors_ND: NDArray[np.float32], keys: int) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "build", lambda: _build(place, vectors_ND[:keys])
    yield "add", lambda: _add(Datastore.open(place), vectors_ND[keys:])
    yield "remove", lambda: remove(place, ["later"])


def _build(place: Path, vectors_ND: NDArray[np.float32]) -> None:
    dims = {LAYER: vectors_ND.shape[1]}
    with DatastoreWriter(place, dims, fingerprint=MODEL, context=DOCUMENT, stride=DOCUMENT) as writer:
        _write(writer, vectors_ND, "first")
        writer.finish()
    index_layer(place, LAYER, SETTINGS)


def _add(store: Datastore, vectors_ND: NDArray[np.float32]) -> None:
    """As `knnlm.add`, with given keys."""
    with store.writing() as newest, DatastoreAppender(newest) as writer:
        _write(writer, vectors_ND, "later")
        writer.commit()
    renew_indexes(Datastore.open(store.folder))


def _write(writer: DatastoreWriter, vectors_ND: NDArray[np.float32], source: str) -> None:
    tokens_N = np.random.default_rng(0).integers(0, 50_000, len(vectors_ND))
    for number, start in enumerate(range(0, len(vectors_ND), DOCUMENT), start=1):
        writer.begin_document(0, source, number)
        writer.append_values(tokens_N[start : start + DOCUMENT])
        writer.append_keys(LAYER, vectors_ND[start : start + DOCUMENT])

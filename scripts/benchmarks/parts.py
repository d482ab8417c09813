"""A search over keys in many parts beside the same search over one part, and over lists in FAISS's own memory.

Legend: N keys, Q queries, D dimension.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np
from exact import synthetic
from numpy.typing import NDArray
from ratios import Row, speed_ratios, timed

from index.approximate import ApproximateIndex
from index.base import VectorIndex
from index.build import add_keys, build_index
from index.exact import ExactIndex
from index.faiss_index import FaissIndex
from index.metric import Metric
from index.source import ArraySource
from index.spec import choose_lists
from index.storage import open_index, save_index
from knnlm.store.keys import Keys

DIM, K = 256, 1024
# What a search of many parts may cost, as a share of the speed of one part.
WANTED = 0.95

Floats = NDArray[np.float32]


def rows(*, keys: int, rounds: int, parts: Sequence[int] = (8, 64)) -> Iterator[Row]:
    """Exact search of many queries, and search through an index of many and of one."""
    queries_QD = synthetic(keys + 1024, DIM)[keys:]
    with tempfile.TemporaryDirectory() as folder:
        stores = {count: _stored(synthetic(keys, DIM), Path(folder, str(count)), count) for count in (1, *parts)}
        spec = f"IVF{choose_lists(keys, DIM, 8 << 30)},PQ{DIM // 2}x4fs"
        seconds, built = timed(lambda: build_index(stores[1], spec, recall_target=None, scratch=Path(folder)))
        assert isinstance(built, ApproximateIndex)
        built.set_effort(64)
        yield _adding(built, seconds, Path(folder))
        in_memory = _over(built, stores[1], _in_memory(built.native, stores[1], built.centre_D))
        yield from _both("lists in a mapped file", "lists in FAISS's memory", built, in_memory, queries_QD, rounds)
        for count in parts:
            there, one = ExactIndex(stores[count], Metric.L2), ExactIndex(stores[1], Metric.L2)
            ratios = speed_ratios(_searching(there, queries_QD), _searching(one, queries_QD), rounds)
            yield Row(f"exact search, 1,024 queries, {keys:,} keys in {count} parts", "one part", ratios, WANTED)
            many = _over(built, stores[count], built.native)
            yield from _both(f"{keys:,} keys in {count} parts", "one part", many, built, queries_QD, rounds)


def _adding(built: ApproximateIndex, seconds: float, folder: Path) -> Row:
    """A hundredth of the keys added to the saved index, which is written anew, beside building it."""
    save_index(built, folder / "before")
    later = ArraySource(synthetic(len(built) // 100, DIM))
    index = open_index(folder / "before", built.source)
    assert isinstance(index, ApproximateIndex)
    adding, _ = timed(lambda: add_keys(index, later, scratch=folder))
    writing, _ = timed(lambda: save_index(index, folder / "after"))
    figures: dict[str, float | str] = {"encoding and merging, s": adding, "writing, s": writing}
    ratio = seconds / (adding + writing)
    return Row(f"index, {len(later):,} of {len(built):,} keys added", "building it", (ratio,), 20.0, figures)


def _both(
    stage: str, against: str, ours: VectorIndex, other: VectorIndex, queries_QD: Floats, rounds: int
) -> Iterator[Row]:
    for together in (1024, 1):
        some_QD = queries_QD if together > 1 else queries_QD[:128]
        work = (_searching(index, some_QD, together) for index in (ours, other))
        ratios = speed_ratios(*work, rounds)
        yield Row(f"index, {together:,} queries together, {stage}", against, ratios, WANTED)


def _searching(index: VectorIndex, queries_QD: Floats, together: int = 1024) -> Callable[[], object]:
    starts = range(0, len(queries_QD), together)
    return lambda: [index.search(queries_QD[start : start + together], K) for start in starts]


def _stored(keys_ND: Floats, folder: Path, parts: int) -> Keys:
    """The keys as a datastore has them: a float16 file for each part."""
    folder.mkdir()
    shards = []
    for number, part_ND in enumerate(np.array_split(keys_ND.astype(np.float16), parts)):
        np.save(folder / f"{number}.npy", part_ND)
        shards.append(np.load(folder / f"{number}.npy", mmap_mode="r"))
    return Keys(shards, np.zeros(DIM, np.float32))


def _over(index: ApproximateIndex, keys: Keys, native: FaissIndex) -> ApproximateIndex:
    """The index, over other files of the same keys."""
    native.set_effort("nprobe", 64)
    return ApproximateIndex(
        keys, index.metric, spec=index.spec, native=native, centre_D=index.centre_D, overfetch=index.overfetch
    )


def _in_memory(native: FaissIndex, keys: Keys, centre_D: Floats) -> FaissIndex:
    """The same index as FAISS itself keeps it."""
    pieces: list[bytes] = []
    native.write(pieces.append)
    copy = faiss.deserialize_index(np.frombuffer(b"".join(pieces), np.uint8))
    copy.reset()
    for start in range(0, len(keys), 1 << 17):
        copy.add(keys.read(start, start + (1 << 17)) - centre_D)
    return FaissIndex(copy)

"""Building and searching an index of tens of millions of keys in bounded memory, cold and warm, beside FAISS on disk.

    scripts/bench --only scale                                          a million keys
    .venv/bin/python scripts/benchmarks/scale.py FOLDER --keys 10000000

Keys are synthetic (`exact.synthetic`), 64 dimensions, in parts of a million. `build` goes on from the largest index in
the folder: it adds keys, as `knnlm add` does. Cold: none of the files is in the system's cache. Memory is the growth of
the process's own (RssAnon), without pages of mapped files. FAISS: IVF,PQ codes of 32 bytes in its OnDiskInvertedLists,
merged from parts with the same coarse lists.

Legend: N keys, Q queries, D dimension.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from building import Memory
from exact import synthetic
from faiss.contrib.ivf_tools import add_preassigned
from faiss.contrib.ondisk import merge_ondisk
from numpy.typing import NDArray
from ratios import Row, timed

from index.approximate import ApproximateIndex
from index.build import add_keys, build_index, tune_index
from index.exact import ExactIndex
from index.kmeans import nearest_means
from index.mapped import release
from index.metric import Metric
from index.rerank import rerank
from index.source import BLOCK_BYTES, blocks, rows_in
from index.storage import open_index, save_index
from knnlm.store.keys import Keys

DIM, PART, LISTS, K, PROBES = 64, 1_000_000, 4096, 64, 32
SPEC, FAISS_SPEC = f"IVF{LISTS},PQ{DIM // 2}x4fs", f"IVF{LISTS},PQ{DIM // 2}"
# Bytes that building may take: with the model and libraries, `--memory 2GB` leaves about as much.
WORK = 1 << 30
# Queries of a batch, and those that are searched one by one.
BATCH, SINGLE = 1024, 64
# Queries whose nearest keys are also searched exactly.
RECALLED = 256


def part(folder: Path, number: int) -> Path:
    """The file of a part, made where it is missing: the same clouds for all, with other noise."""
    path = folder / f"keys-{number:02}.npy"
    if not path.exists():
        keys_ND = synthetic(PART, DIM)
        keys_ND += np.random.default_rng([7, number]).standard_normal(keys_ND.shape, np.float32) * 0.05
        np.save(path, keys_ND.astype(np.float16))
    return path


def keys_in(folder: Path, count: int) -> Keys:
    shards = [np.load(part(folder, number), mmap_mode="r") for number in range(-(-count // PART))]
    return Keys([*shards[:-1], shards[-1][: count - PART * (len(shards) - 1)]], _zeros())


def queries() -> NDArray[np.float32]:
    noise = np.random.default_rng(11).standard_normal((BATCH, DIM)).astype(np.float32)
    return synthetic(PART, DIM)[:: PART // BATCH][:BATCH] + 0.1 * noise


def build(folder: Path, count: int) -> dict[str, float]:
    """Seconds and peak memory of building, or of growing the largest index that is there."""
    source, watch, start = keys_in(folder, count), Memory(), time.perf_counter()
    done = max((one for one in _indexed(folder) if one < count), default=0)
    if done:
        index = open_index(folder / f"index-{done}", keys_in(folder, done))
        later = Keys(
            [np.load(part(folder, n), mmap_mode="r") for n in range(done // PART, -(-count // PART))], _zeros()
        )
        index.work_bytes = WORK
        assert isinstance(index, ApproximateIndex)
        add_keys(index, later, scratch=folder)
        index = ApproximateIndex(
            source, Metric.L2, spec=SPEC, native=index.native, centre_D=index.centre_D, overfetch=index.overfetch
        )
    else:
        index = build_index(source, SPEC, recall_target=None, scratch=folder, work_bytes=WORK)
        index.set_effort(PROBES)
    save_index(index, folder / f"index-{count}")
    found = {
        "seconds": time.perf_counter() - start,
        "MB of its own": watch.stop(),
        "MB on disk": index.size_bytes / 1e6,
    }
    return found | {"keys before": done}


def _zeros() -> NDArray[np.float32]:
    return np.zeros(DIM, np.float32)


def _indexed(folder: Path) -> Iterator[int]:
    return (int(path.name.removeprefix("index-")) for path in folder.glob("index-*"))


def build_faiss(folder: Path, count: int, *, assigned: bool = False) -> dict[str, float]:
    """FAISS's way: an index of each part in memory, written, and merged on disk; training as for ours.

    :param assigned: FAISS is told each key's list, which it would find itself in five times as long: the same files.
    """
    source, watch, start = keys_in(folder, count), Memory(), time.perf_counter()
    native = faiss.index_factory(DIM, FAISS_SPEC)
    native.train(source.take(np.arange(0, count, max(1, count // (64 * LISTS)))))
    faiss.write_index(native, str(folder / "trained.faiss"))
    names, means_LD = [], native.quantizer.reconstruct_n(0, LISTS)
    for first in range(0, count, PART):
        native.reset()
        for at, keys_ND in blocks(_Slice(source, first, min(count, first + PART)), rows_in(BLOCK_BYTES, DIM)):
            ids_N = np.arange(first + at, first + at + len(keys_ND))
            if assigned:
                add_preassigned(native, keys_ND, nearest_means(keys_ND, means_LD), ids_N)
            else:
                native.add_with_ids(keys_ND, ids_N)
        names.append(str(folder / f"faiss-{first}.part"))
        faiss.write_index(native, names[-1])
    merged = faiss.read_index(str(folder / "trained.faiss"))
    merge_ondisk(merged, names, str(folder / f"faiss-{count}.lists"))
    faiss.write_index(merged, str(folder / f"faiss-{count}.index"))
    for name in names:
        os.unlink(name)
    return {"seconds": time.perf_counter() - start, "MB of its own": watch.stop()}


class _Slice:
    """Rows of a source, as a source."""

    def __init__(self, source: Keys, first: int, last: int) -> None:
        self._source, self._first, self._count, self.dim = source, first, last - first, source.dim

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        return self._source.read(self._first + start, self._first + stop)

    def take(self, ids_N: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._source.take(self._first + ids_N)


def search(folder: Path, count: int, way: str) -> dict[str, float]:
    """Milliseconds a query, cold and warm, one by one and together; and the memory that it took."""
    source, queries_QD, watch = keys_in(folder, count), queries(), Memory()
    files = [part(folder, number) for number in range(-(-count // PART))]
    opening, (look, mapped) = timed(lambda: _opened(folder, count, way, source))
    files += [path for path in folder.glob(f"*-{count}*/*")] + [*folder.glob(f"faiss-{count}.*")]

    def cold() -> None:
        source.release()
        for one in mapped:
            release(one)
        _drop(files)

    found = {"opening, s": opening}
    for name, together in (("one by one", 1), ("together", BATCH)):
        some_QD = queries_QD if together > 1 else queries_QD[:SINGLE]
        cold()
        found[f"cold, {name}"] = _milliseconds(look, some_QD, together)
        look(queries_QD)
        found[f"warm, {name}"] = statistics.median(_milliseconds(look, some_QD, together) for _ in range(3))
    found["MB of its own"] = watch.stop()
    return found | {"recall": _recall(look, source, queries_QD[:RECALLED])}


def _recall(look: Look, source: Keys, queries_QD: NDArray[np.float32]) -> float:
    """Share of the nearest keys that are found."""
    nearest_QK = ExactIndex(source, Metric.L2).search(queries_QD, K).ids_QK
    return float(np.mean([np.isin(*pair).mean() for pair in zip(nearest_QK, look(queries_QD), strict=True)]))


Look = Callable[[NDArray[np.float32]], NDArray[np.int64]]


def _opened(folder: Path, count: int, way: str, source: Keys) -> tuple[Look, Sequence[NDArray[Any]]]:
    if way.startswith("ours"):
        index = open_index(folder / f"index-{count}", source)
        assert isinstance(index, ApproximateIndex) and index.native.lists is not None
        if way == "ours, tuned":
            tune_index(index, k=K)
        return (lambda queries_QD: index.search(queries_QD, K).ids_QK), [index.native.lists]
    native = faiss.read_index(str(folder / f"faiss-{count}.index"))
    faiss.extract_index_ivf(native).nprobe = PROBES

    def look(queries_QD: NDArray[np.float32]) -> NDArray[np.int64]:
        if way == "FAISS":
            return np.asarray(native.search(queries_QD, K)[1])
        ids_QC = native.search(queries_QD, 2 * K + 16)[1]
        return rerank(queries_QD, ids_QC, source, Metric.L2, K).ids_QK

    return look, []


def _milliseconds(look: Look, queries_QD: NDArray[np.float32], together: int) -> float:
    start = time.perf_counter()
    for first in range(0, len(queries_QD), together):
        look(queries_QD[first : first + together])
    return 1000 * (time.perf_counter() - start) / len(queries_QD)


def _drop(files: Sequence[Path]) -> None:
    """Take files out of the system's cache."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


WAYS = ("ours", "ours, tuned", "FAISS", "FAISS, re-ranked")


def in_process(folder: Path, count: int, step: str) -> dict[str, float]:
    """One step in a fresh process."""
    command = [sys.executable, __file__, str(folder), "--keys", str(count), "--one", step]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rows(*, keys: int) -> Iterator[Row]:
    """Warm and cold, beside FAISS's lists on disk with the same re-ranking."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        built = {way: in_process(folder, keys, way) for way in ("build", "faiss")}
        ratio = built["faiss"]["seconds"] / built["build"]["seconds"]
        memory: dict[str, float | str] = {f"{way}, MB": one["MB of its own"] for way, one in built.items()}
        yield Row(f"build {SPEC} of {keys:,} keys in runs", "FAISS, merged on disk", (ratio,), None, memory)
        ours, theirs = (in_process(folder, keys, f"search {way}") for way in ("ours", "FAISS, re-ranked"))
        for name in (name for name in ours if name.startswith(("cold", "warm"))):
            figures: dict[str, float | str] = {"ms": ours[name], "FAISS, ms": theirs[name]}
            yield Row(
                f"search {keys:,} keys, {name}", "FAISS on disk, re-ranked", (theirs[name] / ours[name],), None, figures
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    steps = ["build", "faiss", "search"]
    parser.add_argument("--steps", nargs="+", choices=[*steps, "faiss-assigned"], default=steps)
    parser.add_argument("--keys", type=int, default=10_000_000)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, _, way = args.one.partition(" ")
        works = {
            "build": build,
            "faiss": build_faiss,
            "faiss-assigned": partial(build_faiss, assigned=True),
            "search": lambda *given: search(*given, way),
        }
        print(json.dumps(works[name](args.folder, args.keys)))
        return
    args.folder.mkdir(exist_ok=True)
    for step in args.steps:
        for one in [f"search {way}" for way in WAYS] if step == "search" else [step]:
            print(f"{args.keys:,} keys, {one}:", json.dumps(in_process(args.folder, args.keys, one)), flush=True)


if __name__ == "__main__":
    main()

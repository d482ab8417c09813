"""Index building compared with one FAISS call with the same factory string: time, and memory in separate processes.

Legend: N keys, D dimension.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np
from exact import load, synthetic
from ratios import Row, timed

from index.build import build_index
from index.source import ArraySource
from index.spec import choose_lists

DIM = 256


def rows(files: Sequence[Path], *, keys: int, rounds: int) -> Iterator[Row]:
    """Compare for a quarter of the keys, and for all."""
    with tempfile.TemporaryDirectory() as folder:
        vectors_ND = load(files[0], keys, 0) if files else synthetic(keys, DIM)
        for count in (keys // 4, keys):
            path = Path(folder, f"{count}.npy")
            np.save(path, vectors_ND[:count].astype(np.float16))
            spec = f"IVF{choose_lists(count, vectors_ND.shape[1], 8 << 30)},PQ{vectors_ND.shape[1] // 2}x4fs"
            found = {way: [_process(way, spec, path) for _ in range(rounds)] for way in ("ours", "one call")}
            pairs = zip(found["one call"], found["ours"], strict=True)
            memory: dict[str, float | str] = {
                f"{way}, MB over the index": float(np.median([one["megabytes"] for one in runs]))
                for way, runs in found.items()
            }
            ratios = tuple(theirs["seconds"] / ours["seconds"] for theirs, ours in pairs)
            yield Row(f"build {spec} of {count:,} keys", "FAISS, one call", ratios, 1.0, memory)


def _process(way: str, spec: str, path: Path) -> dict[str, float]:
    command = [sys.executable, __file__, way, spec, str(path)]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def build(way: str, spec: str, path: Path) -> dict[str, float]:
    """Seconds, and the peak growth of anonymous memory during the build, without the finished index."""
    stored_ND = np.load(path, mmap_mode="r", allow_pickle=False)
    watch = Memory()
    if way == "ours":
        seconds, index = timed(lambda: build_index(ArraySource(stored_ND), spec, recall_target=None))
        size = index.size_bytes
    else:
        seconds, native = timed(lambda: _one_call(np.asarray(stored_ND, np.float32), spec))
        size = len(faiss.serialize_index(native)) if watch.stop() else 0
    return {"seconds": seconds, "megabytes": watch.stop() - size / 2**20}


def _one_call(keys_ND: np.ndarray, spec: str) -> object:
    index = faiss.index_factory(keys_ND.shape[1], spec)
    index.train(keys_ND)
    index.add(keys_ND)
    return index


class Memory:
    """The peak of this process's anonymous memory (mapped files are the kernel's to give back), 50 times a second."""

    def __init__(self) -> None:
        self._start = self._peak = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Megabytes above the start."""
        self._ended.set()
        self._thread.join()
        return self._peak - self._start

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self._peak = max(self._peak, self._now())

    @staticmethod
    def _now() -> float:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("way", "spec"):
        parser.add_argument(name)
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(build(arguments.way, arguments.spec, arguments.path)))

"""Growth of each stage's time and memory with the number of keys, each size in a separate process.

    .venv/bin/python scripts/benchmarks/growth.py KEYS.npy --sizes 10000 100000 1000000 --json growth.json

KEYS.npy holds real keys, such as a part's (store/parts/00000-*/keys/7.ffn_input.npy). A size above their number
takes them again, each time with noise of a tenth of every dimension's deviation: the spectrum stays that of real keys.
Peak memory is that of the whole process, Python and FAISS included.

Legend: N keys, Q queries, D dimension.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from machine import describe
from numpy.typing import NDArray
from ratios import timed
from repeats import repeated

from index.build import build_index
from index.exact import ExactIndex
from index.metric import Metric
from index.source import ArraySource
from index.spec import choose_lists

QUERIES, K, ROUNDS = 1024, 1024, 3


def enlarged(keys_ND: NDArray[np.float16], size: int, file: Path) -> NDArray[np.float16]:
    """`size` keys in a memory-mapped file."""
    made_ND = np.lib.format.open_memmap(file, "w+", np.float16, (size, keys_ND.shape[1]))
    for start, rows_ND in repeated(keys_ND, size):
        made_ND[start : start + len(rows_ND)] = rows_ND
    made_ND.flush()
    return made_ND


def stages(keys_ND: NDArray[np.float16], stage: str) -> dict[str, float]:
    """Seconds of one stage, and this process's peak memory."""
    source, rng = ArraySource(keys_ND), np.random.default_rng(1)
    own = np.sort(rng.choice(len(source), QUERIES, replace=False))
    queries_QD = source.take(own) + rng.standard_normal((QUERIES, source.dim), np.float32) * 0.01
    found = {}
    if stage == "exact":
        index = ExactIndex(source, Metric.L2)
        found["exact search"], _ = timed(lambda: index.search(queries_QD, K), ROUNDS)
    else:
        spec = f"IVF{choose_lists(len(source), source.dim, 8 << 30)},{stage}"
        found["index build"], built = timed(lambda: build_index(source, spec, recall_target=None))
        built.set_effort(32)  # type: ignore[attr-defined]
        found["index search"], _ = timed(lambda: built.search(queries_QD, K), ROUNDS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found | {f"memory, MB ({'exact search' if stage == 'exact' else 'index'})": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--codes", help="codes of the index, IVF…,CODES; by default those of auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    keys_ND = np.load(args.keys, mmap_mode="r", allow_pickle=False)
    if args.one:
        print(json.dumps(stages(keys_ND, args.one)))
        return
    found: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            file = Path(folder, f"{size}.npy")
            enlarged(keys_ND, size, file)
            found[size] = {}
            for stage in ("exact", args.codes or f"PQ{keys_ND.shape[1] // 2}x4fs"):
                command = [sys.executable, __file__, str(file), "--one", stage]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[size] |= json.loads(done.stdout)
            print(size, found[size], flush=True)
            file.unlink()
    if args.json:
        args.json.write_text(json.dumps({"machine": describe(), "queries": QUERIES, "k": K, "sizes": found}, indent=1))


if __name__ == "__main__":
    main()

"""Exact search beside FAISS's IndexFlatL2: the same keys and queries in one process, in turn; ratios of medians.

    .venv/bin/python scripts/bench_exact.py --keys STORE/keys/7.ffn_input/00000.npy
    .venv/bin/python scripts/bench_exact.py --quick

Without --keys: synthetic keys of 256 and of 768 dimensions, clouds whose variance falls as measured on a language
model's keys. Queries are the last rows; the keys are the rows before. Neighbours are compared by exact distance.
Threads: OMP_NUM_THREADS. On a machine that does other work, --cpu with one thread counts processor seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from index.exact import ExactIndex
from index.metric import Metric
from index.neighbors import Neighbors
from index.rerank import rerank
from index.source import ArraySource

Floats = NDArray[np.float32]


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    return clock() - start


def peak_gflops(clock: Callable[[], float], size: int = 2048, rounds: int = 7) -> float:
    """The fastest float32 product of this process."""
    left, right, out = (np.ones((size, size), np.float32) for _ in range(3))
    return 2 * size**3 / min(seconds(lambda: np.matmul(left, right, out=out), clock) for _ in range(rounds)) / 1e9


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in values.items()}
    flags = fields.get("flags", "").split()
    units = [
        name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if name in flags
    ]
    return f"{fields.get('model name', platform.machine())} ({', '.join(units)})"


def synthetic(count: int, dim: int) -> Floats:
    """Clouds within clouds, variance falling as 1 / (i + 8): the first quarter of 256 dimensions holds 3/4 of it."""
    rng = np.random.default_rng(dim)
    scales_D = (np.arange(dim) + 8.0) ** -0.5
    centres = rng.standard_normal((2000, dim), np.float32)
    keys_ND = np.empty((count, dim), np.float32)
    for start in range(0, count, 50_000):
        block = keys_ND[start : start + 50_000]
        block[:] = centres[rng.integers(0, len(centres), len(block))] * 0.8
        block += 0.6 * rng.standard_normal(block.shape, np.float32)
        block *= scales_D.astype(np.float32)
    return keys_ND


def compare(keys_ND: Floats, queries_QD: Floats, k: int, rounds: int, clock: Callable[[], float]) -> dict[str, object]:
    """Times in turn, and whether both found the same distances."""
    ours = ExactIndex(ArraySource(keys_ND), Metric.L2)
    flat = faiss.IndexFlatL2(keys_ND.shape[1])
    flat.add(keys_ND)
    times: dict[str, list[float]] = {"IndexFlatL2": [], "ours": []}
    for _ in range(rounds):
        times["IndexFlatL2"].append(seconds(lambda: flat.search(queries_QD, k), clock))
        times["ours"].append(seconds(lambda: ours.search(queries_QD, k), clock))
    ratios = [a / b for a, b in zip(times["IndexFlatL2"], times["ours"], strict=True)]
    ids_QK = flat.search(queries_QD, k)[1]
    theirs = rerank(queries_QD, ids_QK, ours.source, Metric.L2, k)
    medians = {name: statistics.median(values) for name, values in times.items()}
    operations = 2 * len(keys_ND) * len(queries_QD) * keys_ND.shape[1]
    return {
        "keys": len(keys_ND),
        "dim": keys_ND.shape[1],
        "queries": len(queries_QD),
        "k": k,
        "seconds": medians,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "gflops": {name: operations / value / 1e9 for name, value in medians.items()},
        "worst": worst(ours.search(queries_QD, k), theirs),
    }


def worst(ours: Neighbors, theirs: Neighbors) -> float:
    """By how much our i-th distance exceeds theirs, at most, relative to it; both are exact distances of their ids."""
    return float(np.max(ours.distances_QK / np.maximum(theirs.distances_QK, 1e-30) - 1))


def show(results: list[dict[str, object]], peak: float) -> None:
    print(f"{processor()}, {faiss.omp_get_max_threads()} threads, fastest float32 product {peak:.0f} GFLOP/s")
    print("| keys | queries | k | IndexFlatL2 | ours | ratio (spread) | of the peak: FAISS, ours | worst distance |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in results:
        took, rate = row["seconds"], row["gflops"]
        print(
            f"| {row['keys']:,} × {row['dim']} | {row['queries']:,} | {row['k']} | {took['IndexFlatL2']:.1f} s "
            f"| {took['ours']:.1f} s | {row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) "
            f"| {rate['IndexFlatL2'] / peak:.2f}, {rate['ours'] / peak:.2f} | {row['worst']:+.0e} |"
        )


def load(path: Path, count: int, queries: int) -> Floats:
    stored = np.load(path, mmap_mode="r")
    return np.asarray(stored[max(0, len(stored) - count - queries) :], np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=Path, nargs="*", default=[], help=".npy files of keys")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--k", type=int, nargs="*", default=[64, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="100,000 keys, 2,048 queries, 3 rounds")
    parser.add_argument("--cpu", action="store_true", help="processor seconds instead of time that passes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.count, args.queries, args.rounds = 100_000, 2048, 3
    clock = time.process_time if args.cpu else time.perf_counter
    rows, peak = args.count + args.queries, peak_gflops(clock)
    makers: list[Callable[[], Floats]] = [lambda path=path: load(path, args.count, args.queries) for path in args.keys]
    makers = makers or [lambda dim=dim: synthetic(rows, dim) for dim in (256, 768)]
    results = []
    for make in makers:
        vectors = make()
        keys_ND, queries_QD = vectors[: -args.queries], vectors[-args.queries :]
        results += [compare(keys_ND, queries_QD, k, args.rounds, clock) for k in args.k]
    if args.json:
        document = {"processor": processor(), "threads": faiss.omp_get_max_threads(), "peak_gflops": peak}
        print(json.dumps(document | {"results": results}, indent=2))
    else:
        show(results, peak)
    return 0


if __name__ == "__main__":
    sys.exit(main())

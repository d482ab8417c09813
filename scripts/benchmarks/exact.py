"""Exact search against FAISS's IndexFlatL2, with the same keys, queries and neighbours.

Legend: N keys, Q queries, K neighbours, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray
from ratios import Row, speed_ratios, timed

from index.exact import ExactIndex
from index.metric import Metric
from index.neighbors import Neighbors
from index.rerank import rerank
from index.source import ArraySource

Floats = NDArray[np.float32]


def rows(files: Sequence[Path], *, keys: int, queries: int, rounds: int, peak: float, must: float) -> Iterator[Row]:
    """Compare for keys from .npy files, or for synthetic ones of 256 and 768 dimensions.

    :param peak: GFLOP/s of the machine's fastest float32 product.
    :param must: ratio expected from the machine's matrix units.
    """
    for number in range(len(files) or 2):
        vectors_ND = load(files[number], keys, queries) if files else synthetic(keys + queries, (256, 768)[number])
        for k in (64, 1024):
            yield compare(vectors_ND[:-queries], vectors_ND[-queries:], k, rounds, peak, must)


def compare(keys_ND: Floats, queries_QD: Floats, k: int, rounds: int, peak: float, must: float) -> Row:
    ours = ExactIndex(ArraySource(keys_ND), Metric.L2)
    flat = faiss.IndexFlatL2(keys_ND.shape[1])
    flat.add(keys_ND)
    ratios = speed_ratios(lambda: ours.search(queries_QD, k), lambda: flat.search(queries_QD, k), rounds)
    flat_seconds, (_, ids_QK) = timed(lambda: flat.search(queries_QD, k))
    own_seconds, found = timed(lambda: ours.search(queries_QD, k))
    theirs = rerank(queries_QD, ids_QK, ours.source, Metric.L2, k)
    operations = 2e-9 * len(keys_ND) * len(queries_QD) * keys_ND.shape[1]
    figures: dict[str, float | str] = {
        "of the peak, FAISS": operations / flat_seconds / peak,
        "of the peak, ours": operations / own_seconds / peak,
        "worst distance": worst(found, theirs),
    }
    stage = f"exact search, {len(keys_ND):,} x {keys_ND.shape[1]}, {len(queries_QD):,} queries, k = {k}"
    return Row(stage, "IndexFlatL2", ratios, must, figures)


def load(path: Path, count: int, queries: int) -> Floats:
    stored = np.load(path, mmap_mode="r")
    return np.asarray(stored[max(0, len(stored) - count - queries) :], np.float32)


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


def worst(ours: Neighbors, theirs: Neighbors) -> float:
    """By how much our i-th distance exceeds theirs, at most, relative to it; both are exact distances of their ids."""
    return float(np.max(ours.distances_QK / np.maximum(theirs.distances_QK, 1e-30) - 1))

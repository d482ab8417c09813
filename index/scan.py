"""Brute force: the product of every query with every key, and the nearest by it; inexact where norms are large.

The product is torch's, as only its number of threads can be set for one thread of Python. FAISS's own brute force keeps
a sorted reservoir for each query: for k = 1,024 of 17,000 keys x 576 that took five times as long as the product.

Legend: N keys, Q queries, D dimension, K nearest.
"""

# ruff: noqa: TID251
from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray

from index.faiss_index import thread_count
from index.metric import Metric
from index.neighbors import least
from index.threads import share_out
from index.torch_threads import one_thread

# Queries of one product, fewer where the scores of all threads would take more bytes than this.
QUERY_ROWS, SCORE_BYTES = 256, 128 << 20

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def scan_block(queries_QD: Floats, keys_ND: Floats, k: int, metric: Metric) -> tuple[Floats, Ids]:
    """Return distances and row numbers [Q, K] of the k <= N nearest keys of each query, in any order.

    NaN counts as farthest. A distance is |q|² + |k|² - 2 <q, k>, or -<q, k>.
    """
    import torch

    # Asked for before torch's number, which can be FAISS's, becomes one.
    threads, count = thread_count(), len(queries_QD)
    rows = max(1, min(QUERY_ROWS, SCORE_BYTES // (4 * len(keys_ND) * threads), -(-count // threads)))
    distances_QK, ids_QK = np.empty((count, k), np.float32), np.empty((count, k), np.int64)
    weight = 2 if metric is Metric.L2 else 1
    query_Q, key_N = (_norms(part_ND, metric) for part_ND in (queries_QD, keys_ND))
    queries, keys, norms = (torch.from_numpy(_writable(part)) for part in (queries_QD, keys_ND, key_N))

    def work(starts: Iterator[int]) -> None:
        buffer = torch.empty(rows, len(keys_ND))
        for start in starts:
            part = slice(start, start + rows)
            scores = buffer[: len(queries_QD[part])]
            torch.addmm(norms, queries[part], keys.T, alpha=-weight, out=scores)
            ids_QK[part], distances_QK[part] = least(scores.numpy(), k)
            distances_QK[part] += query_Q[part, None]

    starts = range(0, count, rows)
    with one_thread() if len(starts) > 1 else nullcontext():
        share_out(starts, work, threads)
    return distances_QK, ids_QK


def _norms(rows_ND: Floats, metric: Metric) -> Floats:
    """The squared norms that are part of a distance: none for inner products."""
    if metric is not Metric.L2:
        return np.zeros(len(rows_ND), np.float32)
    squares_N: Floats = np.einsum("nd,nd->n", rows_ND, rows_ND)
    return squares_N


def _writable(rows_ND: Floats) -> Floats:
    """Torch warns of read-only arrays, though it only reads them here."""
    return rows_ND if rows_ND.flags.writeable else rows_ND.copy()

"""Exact distances of a few keys to each query, and the nearest of them: the last step of every search.

Legend: Q queries, K neighbours, C candidates, D dimension, P pairs of a query and a key, U different keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.faiss_index import pair_distances, thread_count
from index.metric import Metric
from index.neighbors import Neighbors, absent, ordered
from index.source import VectorSource, rows_in
from index.threads import share_out

# Pairs that all threads work on at a time, 50 bytes each: for many more, memory would be newly allocated each time.
PAIRS = 1 << 22
# Fewer are not worth a thread.
LEAST_PAIRS = 1 << 10
# Bytes of keys that stay in cache.
KEY_BYTES = 2 << 20
# Pairs whose candidates stay in cache, with the buffers for sorting them.
SORTED_PAIRS = 1 << 16
# Pairs among which each range looks for its own.
SCANNED_PAIRS = 4 * PAIRS
# Sampled ids from which ranges of keys with about equal numbers of pairs are estimated.
SAMPLED_IDS = 1 << 14

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def rerank(queries_QD: Floats, ids_QC: Ids, source: VectorSource, metric: Metric, k: int) -> Neighbors:
    """Return the k nearest candidates (id -1: none) by exact distance, padded with absent ones.

    Equally near keys are in the order of their ids; one proposed twice, as by an NSG graph, counts once.
    """
    once_QC, found, threads = np.empty_like(ids_QC), absent(len(ids_QC), k), thread_count()
    rows = max(1, SORTED_PAIRS // max(1, ids_QC.shape[1]))
    parts = [slice(start, start + rows) for start in range(0, len(ids_QC), rows)]

    def sort(parts: Iterator[slice]) -> None:
        for part in parts:
            once_QC[part] = _once(ids_QC[part])

    def order(parts: Iterator[slice]) -> None:
        for part in parts:
            nearest = ordered(distances_QC[part], once_QC[part], k)
            found.distances_QK[part], found.ids_QK[part] = nearest.distances_QK, nearest.ids_QK

    share_out(parts, sort, threads)
    distances_QC = exact_distances(queries_QD, once_QC, source, metric)
    share_out(parts, order, threads)
    return found


def _once(ids_QC: Ids) -> Ids:
    """The ids of each row in ascending order, repeated ones replaced by -1."""
    ids_QC = np.sort(ids_QC, axis=1)
    ids_QC[:, 1:][ids_QC[:, 1:] == ids_QC[:, :-1]] = -1
    return ids_QC


def exact_distances(queries_QD: Floats, ids_QC: Ids, source: VectorSource, metric: Metric) -> Floats:
    """Return distances, float32 [Q, C], by direct differences, not |q|² + |k|² - 2<q,k>; +inf where the id is -1.

    Memory is bounded whatever Q, C and N are, and each key is read once in some 16 million pairs, in ascending order.
    """
    queries_QD = np.ascontiguousarray(queries_QD, np.float32)
    distances_QC = np.full(ids_QC.shape, np.inf, np.float32)
    rows = max(1, SCANNED_PAIRS // max(1, ids_QC.shape[1]))
    for start in range(0, len(ids_QC), rows):
        _fill(distances_QC[start : start + rows], queries_QD[start:], ids_QC[start : start + rows], source, metric)
    return distances_QC


def _fill(distances_QC: Floats, queries_QD: Floats, ids_QC: Ids, source: VectorSource, metric: Metric) -> None:
    """Fill the distances; each thread takes the next range of keys and processes all its pairs."""
    distances_P, threads = distances_QC.reshape(-1), thread_count()  # a view: whole rows

    def work(ranges: Iterator[tuple[int, int]]) -> None:
        for first, last in ranges:
            for pairs in _pairs_by_key(ids_QC, first, last, rows_in(KEY_BYTES, source.dim)):
                keys_UD = np.ascontiguousarray(source.take(pairs.keys_U), np.float32)
                found_P = pair_distances(queries_QD, pairs.rows_P, keys_UD, pairs.key_P, metric)
                distances_P[pairs.places_P] = found_P

    share_out(_ranges(ids_QC.reshape(-1), threads), work, threads)


def _ranges(ids_P: Ids, threads: int) -> list[tuple[int, int]]:
    """Ranges (first, last) of all ids from 0 on, that have about as many pairs each."""
    rounds = math.ceil(ids_P.size / PAIRS)
    ranges = max(1, min(rounds * threads, ids_P.size // LEAST_PAIRS))
    # Random, as rows are sorted: a regular stride would pick the same few ranks of each.
    sample = np.sort(np.random.default_rng(0).choice(ids_P, min(ids_P.size, SAMPLED_IDS)))
    sample = sample[sample >= 0]
    inner = sample[np.arange(1, ranges) * len(sample) // ranges] if len(sample) else sample
    edges = np.unique([0, *inner, ids_P.max(initial=-1) + 1]).tolist()
    return list(itertools.pairwise(edges))


@dataclass(frozen=True)
class _Pairs:
    """All pairs that a stretch of keys takes part in."""

    keys_U: Ids
    """Different ids, ascending."""
    key_P: Ids
    """Number in keys_U of each pair's key."""
    rows_P: Ids
    """Row of each pair's query."""
    places_P: Ids
    """Place of each pair in the flat [Q, C]."""


def _pairs_by_key(ids_QC: Ids, first: int, last: int, keys: int) -> Iterator[_Pairs]:
    """The pairs of a range of keys, sorted by key, in pieces of at most `keys` distinct keys."""
    flat_P = ids_QC.reshape(-1)
    places_P = np.flatnonzero((flat_P >= first) & (flat_P < last))
    places_P = places_P[_ascending(flat_P[places_P] - first)]
    sorted_P = flat_P[places_P]
    is_new_P = np.diff(sorted_P, prepend=-1) != 0
    keys_U, key_P = sorted_P[is_new_P], np.cumsum(is_new_P) - 1
    for start in range(0, len(keys_U), keys):
        piece = slice(*np.searchsorted(key_P, [start, start + keys]))
        places = places_P[piece]
        yield _Pairs(keys_U[start : start + keys], key_P[piece] - start, places // ids_QC.shape[1], places)


def _ascending(ids_P: Ids) -> Ids:
    """The order that sorts ids, 16 bits at a time: NumPy's radix sort for these is four times as fast."""
    order_P = np.argsort(ids_P.astype(np.uint16), kind="stable")
    for shift in range(16, int(ids_P.max(initial=0)).bit_length(), 16):
        order_P = order_P[np.argsort((ids_P >> shift).astype(np.uint16)[order_P], kind="stable")]
    return order_P

"""Exact distances of a few keys to each query, and the nearest of them: the last step of every search.

Legend: Q queries, K neighbours, C candidates, D dimension, P pairs of a query and a key, U different keys.
"""

from __future__ import annotations

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

# About 100 MB: 50 bytes a pair. The keys stay in cache, and the allocator has their memory at hand: of 64 MB, pages
# came anew each time, and a pair took 1.8 times as long.
PAIRS = 1 << 21
KEY_BYTES = 2 << 20

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def rerank(queries_QD: Floats, ids_QC: Ids, source: VectorSource, metric: Metric, k: int) -> Neighbors:
    """The k nearest of the candidates (id -1: none) by exact distance; absent ones fill up.

    Of keys that are equally near, the first comes first; one that is proposed twice, as an NSG graph does, counts once.
    """
    found, threads = absent(len(ids_QC), k), thread_count()
    rounds = max(1, math.ceil(ids_QC.size / (threads * PAIRS)))
    rows = max(1, math.ceil(len(ids_QC) / (threads * rounds)))

    def work(starts: Iterator[int]) -> None:
        for start in starts:
            part = slice(start, start + rows)
            once_QC = _once(ids_QC[part])
            distances_QC = exact_distances(queries_QD[part], once_QC, source, metric)
            nearest = ordered(distances_QC, once_QC, k)
            found.distances_QK[part], found.ids_QK[part] = nearest.distances_QK, nearest.ids_QK

    share_out(range(0, len(ids_QC), rows), work, threads)
    return found


def _once(ids_QC: Ids) -> Ids:
    """Ascending, with -1 in the place of a repeated one."""
    ids_QC = np.sort(ids_QC, axis=1)
    ids_QC[:, 1:][ids_QC[:, 1:] == ids_QC[:, :-1]] = -1
    return ids_QC


def exact_distances(queries_QD: Floats, ids_QC: Ids, source: VectorSource, metric: Metric) -> Floats:
    """float32 [Q, C]: direct differences of the stored keys, never |q|² + |k|² - 2<q,k>; +inf where the id is -1.

    Memory is bounded whatever Q, C and N are, and each key is read once in some 2 million pairs, in ascending order.
    """
    queries_QD = np.ascontiguousarray(queries_QD, np.float32)
    distances_QC = np.full(ids_QC.shape, np.inf, np.float32)
    rows = max(1, PAIRS // max(1, ids_QC.shape[1]))
    for start in range(0, len(ids_QC), rows):
        _fill(distances_QC[start : start + rows], queries_QD[start:], ids_QC[start : start + rows], source, metric)
    return distances_QC


def _fill(distances_QC: Floats, queries_QD: Floats, ids_QC: Ids, source: VectorSource, metric: Metric) -> None:
    distances_P = distances_QC.reshape(-1)  # a view: whole rows

    def work(pieces: Iterator[_Pairs]) -> None:
        for pairs in pieces:
            keys_UD = np.ascontiguousarray(source.take(pairs.keys_U), np.float32)
            found_P = pair_distances(queries_QD, pairs.rows_P, keys_UD, pairs.key_P, metric)
            distances_P[pairs.places_P] = found_P

    share_out(list(_pairs_by_key(ids_QC, rows_in(KEY_BYTES, source.dim))), work, thread_count())


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


def _pairs_by_key(ids_QC: Ids, keys: int) -> Iterator[_Pairs]:
    """The pairs, sorted by key, in pieces of at most so many different keys."""
    flat_P = ids_QC.reshape(-1)
    places_P = np.flatnonzero(flat_P >= 0)
    places_P = places_P[_ascending(flat_P[places_P])]
    sorted_P = flat_P[places_P]
    is_new_P = np.diff(sorted_P, prepend=-1) != 0
    keys_U, key_P = sorted_P[is_new_P], np.cumsum(is_new_P) - 1
    for start in range(0, len(keys_U), keys):
        first, last = np.searchsorted(key_P, [start, start + keys])
        places = places_P[first:last]
        yield _Pairs(keys_U[start : start + keys], key_P[first:last] - start, places // ids_QC.shape[1], places)


def _ascending(ids_P: Ids) -> Ids:
    """The order that sorts ids, 16 bits at a time: NumPy sorts those by counting, four times as fast as whole ids."""
    order_P = np.argsort(ids_P.astype(np.uint16), kind="stable")
    for shift in range(16, int(ids_P.max(initial=0)).bit_length(), 16):
        order_P = order_P[np.argsort((ids_P >> shift).astype(np.uint16)[order_P], kind="stable")]
    return order_P

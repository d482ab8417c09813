"""Search in several datastores as in one: each is searched, and what was found is merged by distance.

Distances from different datastores are comparable: squared L2 and cosine do not depend on what was subtracted from the
keys, and inner products are brought to one centre. A weight w of a datastore multiplies exp(-d/T) of its keys in p_kNN.
As w exp(-d/T) = exp(-(d - T log w)/T), it is an offset of the distances: the k nearest of the moved distances are the k
heaviest neighbours, and whatever follows a search need not know of weights.

Legend: Q queries, D dimension, K neighbours, C candidates from all datastores, J nearest neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from index.neighbors import Neighbors, merge, ordered
from knnlm.knn.mixing import NEAREST, Floats, Search
from knnlm.knn.searcher import QUERY_BLOCK, LayerSearcher, OpenIndex, open_searcher
from knnlm.store.joint import AnyStore, JointStore


@dataclass(frozen=True)
class JointSearcher:
    """A layer's keys in several datastores, each with its index."""

    store: JointStore
    layer: str
    searchers: tuple[LayerSearcher, ...]
    """One for each datastore."""
    offsets: tuple[float, ...]
    """What is added to each one's distances; +inf: it is not searched."""

    def at(self, temperature: float) -> JointSearcher:
        """Return the searcher with the datastores' weights, which are those of a temperature."""
        return replace(self, offsets=offsets_of(self.store.weights, temperature))

    def neighbors(self, vectors_QD: NDArray[np.float32], k: int) -> Neighbors:
        """Return the k nearest keys of raw vectors of the layer, by their moved distances."""
        found = []
        for one, start, offset in zip(self.searchers, self.store.starts, self.offsets, strict=True):
            if offset < math.inf:
                near = one.neighbors(vectors_QD, k)
                moved_QK = _moved(near.distances_QK, self._shift(one, vectors_QD) + offset)
                found.append(Neighbors(moved_QK, np.where(near.ids_QK < 0, -1, near.ids_QK + start)))
        return merge(found, k)

    def cached(self, vectors_QD: NDArray[np.float32], targets_Q: NDArray[np.int32], k: int) -> tuple[Search, ...]:
        """Search every datastore, without the offsets: for `merge_searches` with any."""
        searches = []
        for one in self.searchers:
            found = one.cached(vectors_QD, targets_Q, k)
            searches.append(replace(found, distances_QK=_moved(found.distances_QK, self._shift(one, vectors_QD))))
        return tuple(searches)

    def _shift(self, one: LayerSearcher, vectors_QD: NDArray[np.float32]) -> Floats:
        """What makes a datastore's distances those with the centre of the first, [Q]: 0 but for inner products."""
        if one.metric != "ip":
            return np.zeros(len(vectors_QD))
        ours_D, theirs_D = (store.keys(self.layer).centre.astype(np.float64) for store in (self.store.first, one.store))
        return np.asarray(vectors_QD, np.float64) @ (ours_D - theirs_D)


Searcher = LayerSearcher | JointSearcher


def open_search(
    store: AnyStore,
    layer: str,
    metric: str,
    *,
    exact: bool = False,
    offsets: Sequence[float] = (),
    memory: float | None = None,
    opening: OpenIndex | None = None,
) -> Searcher:
    """Return the layer of one datastore or of several, each with its own index, or with exact search.

    :param offsets: added to the distances of each of several; none: a plain merge. `JointSearcher.at` applies weights.
    :param memory, opening: as in `open_searcher`.
    :raises DatastoreMismatch: one of them has no keys of the layer; lists those that it has.
    :raises InputError: an index was built for another metric.
    :raises DatastoreCorrupt: a file of an index is missing, short or changed.
    """
    if not isinstance(store, JointStore):
        return open_searcher(store, layer, metric, exact=exact, memory=memory, opening=opening)
    searchers = tuple(
        open_searcher(one, layer, metric, exact=exact, memory=memory, opening=opening) for one in store.stores
    )
    return JointSearcher(store, layer, searchers, tuple(offsets) or (0.0,) * len(searchers))


def offsets_of(weights: Sequence[float], temperature: float) -> tuple[float, ...]:
    """Return -T log w of each weight: +inf for 0."""
    return tuple(math.inf if weight == 0 else 0.0 - temperature * math.log(weight) for weight in weights)


def weights_of(offsets: Sequence[float], temperature: float) -> tuple[float, ...]:
    """Return the weights that offsets are at a temperature, to ten digits."""
    return tuple(float(f"{math.exp(-offset / temperature):.10g}") for offset in offsets)


def merge_searches(searches: Sequence[Search], offsets: Sequence[float], k: int) -> Search:
    """Return the k nearest of several datastores' searches for the same queries, with offsets of their distances."""
    parts = [(one, offset) for one, offset in zip(searches, offsets, strict=True) if offset < math.inf]
    blocks = range(0, len(searches[0].hits_QK), QUERY_BLOCK)
    found = [_merged([_block(one, start, offset) for one, offset in parts], k) for start in blocks]
    return Search(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


Block = tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int32]]


def _block(one: Search, start: int, offset: float) -> Block:
    """Moved distances, hits and values [Q, K] of some queries; -1 for a value that is not known."""
    assert one.values_QJ is not None
    rows = slice(start, start + QUERY_BLOCK)
    distances_QK, values_QK = one.distances_QK[rows], np.full_like(one.hits_QK[rows], -1, np.int32)
    values_QK[:, : one.values_QJ.shape[1]] = one.values_QJ[rows]
    return _moved(distances_QK, np.full(len(distances_QK), offset)), one.hits_QK[rows], values_QK


def _merged(parts: Sequence[Block], k: int) -> Block:
    """The k nearest of all. The `NEAREST` of these are among the `NEAREST` of their own datastore."""
    distances_QC, hits_QC, values_QC = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    columns_QC = np.broadcast_to(np.arange(distances_QC.shape[1]), distances_QC.shape)
    found = ordered(distances_QC, columns_QC, k)
    there_QK, columns_QK = found.ids_QK >= 0, np.maximum(found.ids_QK, 0)
    hits_QK = np.take_along_axis(hits_QC, columns_QK, axis=1) & there_QK
    near = np.s_[:, : min(k, NEAREST)]
    values_QJ = np.where(there_QK[near], np.take_along_axis(values_QC, columns_QK[near], axis=1), -1)
    return found.distances_QK, hits_QK, values_QJ


def _moved(distances_QK: NDArray[np.float32], shift_Q: Floats) -> NDArray[np.float32]:
    return distances_QK + shift_Q[:, None].astype(np.float32)

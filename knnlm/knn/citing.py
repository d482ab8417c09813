"""What each document of the datastore gave to a token's probability, and what it would have been without the document.

Without a document its keys are masked and the nearest k of all others vote: what a datastore built without it gives.
For that a search has to be deeper than k (`deep_neighbors`).
Shapes: T positions, D dimension, K neighbours, k of which vote, M documents among these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnlm.knn.evidence import Neighborhood
from knnlm.knn.joint import Searcher
from knnlm.knn.mixing import NEAREST, Floats, Mix, mix, neighbor_weights
from knnlm.knn.searcher import QUERY_BLOCK
from knnlm.knn.trust import token_gains
from knnlm.store.stored_text import StoredText

# Neighbours found beyond k at first, as a part of k; where that is too few, the search is repeated.
_MARGIN = 8
Ids = NDArray[np.int64]


class DocumentMap:
    """Which document each row of a datastore is of; parts of a document, with one source and number, are one."""

    def __init__(self, store: StoredText) -> None:
        self._sources, self._starts = store.sources, store.documents[:, 0]
        self._named, document_of = np.unique(store.documents[:, 2:4], axis=0, return_inverse=True)
        self._document_of = document_of.ravel()
        rows = np.diff(self._starts, append=store.count)
        self.sizes_M = np.bincount(self._document_of, rows).astype(np.int64)
        """Rows of each document."""

    def of(self, rows: NDArray[np.integer[Any]]) -> Ids:
        """Return the documents' numbers here, from 0."""
        return self.of_part(np.searchsorted(self._starts, rows, side="right") - 1)

    def of_part(self, parts: NDArray[np.integer[Any]]) -> Ids:
        """Return the numbers of the documents whose parts these are: places in `Datastore.documents`."""
        found: Ids = self._document_of[parts]
        return found

    def name(self, document: int) -> tuple[str, int]:
        """Return the name of the document's source, and its number in it."""
        source, number = self._named[document].tolist()
        return self._sources[source], number


@dataclass(frozen=True, eq=False)
class Support:
    """One token's probability, and what the documents among its neighbours gave to it."""

    log_prob: float
    """log p of the mixture; -inf if it is impossible."""
    lm_share: float
    """The LM's share of p; it and the documents' shares add up to 1. 0 if p is 0."""
    documents_M: Ids
    """The documents of the neighbours that vote, ascending."""
    shares_M: Floats
    """Each one's share of p: λ times the weight of its neighbours that vote for the token, over p."""
    without_M: Floats
    """log p without each, the trust in the datastore being what it is with all: what it does at this token."""
    gain: float
    """log p at full trust minus log p_LM: what moves the trust."""


def deep_neighbors(
    searcher: Searcher, vectors_TD: NDArray[np.float32], k: int, documents: DocumentMap
) -> Iterator[Neighborhood]:
    """Yield at least the k nearest of each raw vector: so many that k remain without any one document among these.

    Where all other documents have fewer than k keys, all of these remain.
    """
    for start in range(0, len(vectors_TD), QUERY_BLOCK):
        yield from _deep_neighbors(searcher, vectors_TD[start : start + QUERY_BLOCK], k, documents)


def _deep_neighbors(
    searcher: Searcher, vectors_TD: NDArray[np.float32], k: int, documents: DocumentMap
) -> Iterator[Neighborhood]:
    depth, due = min(k + k // _MARGIN + _MARGIN, searcher.store.count), np.arange(len(vectors_TD))
    ids_TK: list[Ids] = [np.empty(0, np.int64)] * len(vectors_TD)
    distances_TK: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(vectors_TD)
    while len(due):
        found = searcher.neighbors(vectors_TD[due], depth)
        deeper = np.zeros(len(due), np.int64)
        for place, (at, rows_K) in enumerate(zip(due, found.ids_QK, strict=True)):
            there_K = rows_K >= 0
            ids_TK[at], distances_TK[at] = rows_K[there_K], found.distances_QK[place, there_K]
            deeper[place] = _missing(documents, rows_K, k, searcher.store.count)
        due, depth = due[deeper > 0], min(int(max(depth + deeper.max(), 1.5 * depth)), searcher.store.count)
    values = searcher.store.values
    for distances_K, rows_K in zip(distances_TK, ids_TK, strict=True):
        yield Neighborhood(distances_K, rows_K, values[rows_K])


def _missing(documents: DocumentMap, rows_K: Ids, k: int, count: int) -> int:
    """How many more neighbours are needed at least; 0 if an index has found no more."""
    if rows_K[-1] < 0:
        return 0
    of_K = documents.of(rows_K)
    among = np.unique(of_K[:k])
    others_M = len(rows_K) - np.bincount(of_K, minlength=len(documents.sizes_M))[among]
    return int((np.minimum(k, count - documents.sizes_M[among]) - others_M).max())


def support(
    found: Neighborhood, documents_K: Ids, token: int, lm_log_prob: float, setting: Mix, trust: float = 1.0
) -> Support:
    """Return what the documents gave to a token.

    :param found: from `deep_neighbors` with the setting's k, or a larger one.
    :param documents_K: the document of each neighbour.
    :param lm_log_prob: log p_LM of the token.
    :param trust: what λ is multiplied by, with each document and without.
    """
    documents_M, place_K = np.unique(documents_K, return_inverse=True)
    voters = slice(0, setting.k)
    mass_2K = _masses(found, token, setting.temperature)
    total_21, full_1 = mass_2K[:, voters].sum(axis=1, keepdims=True), _lambda(found, setting)
    full, (log_prob,) = (_log_prob(_share(total_21), lm_log_prob, lam_1) for lam_1 in (full_1, full_1 * trust))
    lam, (gain,) = trust * full_1[0], token_gains(full, np.array([lm_log_prob]))
    among = np.unique(place_K[voters])
    votes_M = np.bincount(place_K[voters], mass_2K[1, voters], len(documents_M))[among]
    with np.errstate(divide="ignore"):
        terms = np.append(np.log(lam * votes_M / (total_21[0] or 1)), np.log1p(-lam) + lm_log_prob)
    *shares, lm_share = np.exp(terms - log_prob) if np.isfinite(log_prob) else np.zeros(len(terms))
    lambdas_M, left_2M = _without(found, place_K, mass_2K, token, setting)
    without_M = _log_prob(_share(left_2M), lm_log_prob, trust * lambdas_M)
    among_M = documents_M[among], np.array(shares), without_M[among]
    return Support(float(log_prob), float(lm_share), *among_M, float(gain))


def _masses(found: Neighborhood, token: int, temperature: float) -> Floats:
    """Weights of the neighbours, and of those that vote for the token, [2, K]; relative to the nearest."""
    weights_K = neighbor_weights(found.distances_K[None], temperature)[0].astype(np.float64)
    return np.stack([weights_K, weights_K * (found.values_K == token)])


def _share(mass_2M: Floats) -> Floats:
    """p_kNN [M] from all weights and those of the token; 0 without any neighbour."""
    found: Floats = np.divide(mass_2M[1], mass_2M[0], out=np.zeros(mass_2M.shape[1]), where=mass_2M[0] > 0)
    return found


def _lambda(found: Neighborhood, setting: Mix) -> Floats:
    """λ [1]; 0 without any neighbour."""
    if not len(found.rows_K):
        return np.zeros(1)
    return setting.lambdas(found.distances_K[None, : setting.k], found.values_K[None, : setting.k])


def _log_prob(knn_M: Floats, lm_log_prob: float, lambdas_M: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return mix(np.full(len(knn_M), lm_log_prob), np.log(knn_M), lambdas_M)


def _without(found: Neighborhood, place_K: Ids, mass_2K: Floats, token: int, setting: Mix) -> tuple[Floats, Floats]:
    """λ [M] and sums of weights [2, M] without each document, by sums over prefixes: loops over neighbours are slow."""
    count, left_2M = int(place_K.max(initial=-1)) + 1, _left(mass_2K, place_K, setting.k)
    lambdas_M = np.full(count, _lambda(found, setting)[0])
    # Only documents among the nearest change what a gate reads.
    for at in np.unique(place_K[:NEAREST]):
        others = found.part(place_K != at)
        lambdas_M[at] = _lambda(others, setting)[0]
        left_2M[:, at] = _masses(others, token, setting.temperature)[:, : setting.k].sum(axis=1)
    return lambdas_M, left_2M


def _left(mass_2K: Floats, place_K: Ids, k: int) -> Floats:
    """Sums [2, M] over the nearest k of all others, for each document.

    Of one document's neighbours the i-th (from 0), at place q, is nearer than these end while q - i < k.
    """
    order_K = np.argsort(place_K, kind="stable")
    starts = np.flatnonzero(np.diff(place_K[order_K], prepend=-1))
    sizes_M = np.diff(starts, append=len(place_K))
    rank_K = np.empty(len(place_K), np.int64)
    rank_K[order_K] = np.arange(len(place_K)) - np.repeat(starts, sizes_M)
    gone_K = np.arange(len(place_K)) - rank_K < k
    ends_M = np.minimum(k + np.bincount(place_K[gone_K], minlength=len(starts)), len(place_K))
    upto_2K = np.concatenate([np.zeros((2, 1)), mass_2K.cumsum(axis=1)], axis=1)
    gone_2M = [np.bincount(place_K[gone_K], one_K[gone_K], len(starts)) for one_K in mass_2K]
    return np.maximum(upto_2K[:, ends_M] - gone_2M, 0)

"""Evidence about a next token: its neighbours and the LM's probabilities, independent of k, temperature and λ.

Each position is searched once; any setting is then evaluated by the arithmetic of `knnlm.knn.mixing`.
Shapes: T positions, D dimension, K neighbours, V vocabulary, M tokens that a neighbour has or the LM finds likely.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm.knn.joint import Searcher
from knnlm.knn.mixing import Floats, Mix, mix, neighbor_weights, token_shares
from knnlm.knn.trust import token_gains
from knnlm.store.stored_text import StoredText

LIKELIEST = 10
"""The evidence holds this many most likely tokens of any mixture."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The three distributions under one setting, at the M tokens of the evidence; probabilities, float64."""

    tokens_M: NDArray[np.int64]
    lm_M: Floats
    knn_M: Floats
    mixed_M: Floats
    lam: float
    """λ at this position, which a gate and the trust may vary; 0 without any neighbour."""
    full_lam: float
    """λ at full trust."""
    weights_K: Floats
    """Weights of the nearest k; their sum is 1, or 0 if there are none."""


@dataclass(frozen=True, eq=False)
class Neighborhood:
    """The neighbours found for one position, possibly fewer than requested."""

    distances_K: NDArray[np.float32]
    """Ascending."""
    rows_K: NDArray[np.int64]
    """Their rows in the datastore."""
    values_K: NDArray[np.int32]
    """The token that followed each."""

    def part(self, chosen_K: NDArray[np.bool_]) -> Neighborhood:
        """Return some of the neighbours."""
        return Neighborhood(self.distances_K[chosen_K], self.rows_K[chosen_K], self.values_K[chosen_K])

    def weights(self, setting: Mix) -> Floats:
        """Return the share of p_kNN of each of the nearest k; their sum is 1, or 0 if there are none."""
        nearest_1K = self.distances_K[None, : setting.k]
        weights_K: Floats = neighbor_weights(nearest_1K, setting.temperature)[0].astype(np.float64)
        weights_K /= weights_K.sum() or 1
        return weights_K

    def nearest(
        self, weights_K: Floats, count: int, source: Callable[[int], NeighborSource]
    ) -> tuple[SourcedNeighbor, ...]:
        """Return the `count` nearest, hence heaviest, neighbours that have a weight, with their text."""
        places = zip(self.rows_K, self.distances_K, weights_K, strict=False)
        return tuple(
            SourcedNeighbor(source(int(row)), float(distance), float(weight))
            for row, distance, weight in itertools.islice(places, count)
        )


@dataclass(frozen=True)
class NeighborSource:
    """The text around a neighbour's token, and its origin."""

    before: str
    token: str
    """The token that followed the neighbour's context."""
    after: str
    document: str
    """The file's name, or the hub set."""
    number: int
    """Line, row or part in it, from 1."""


@dataclass(frozen=True)
class SourcedNeighbor:
    """A neighbour under a setting."""

    source: NeighborSource
    distance: float
    weight: float
    """Its share of p_kNN."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """A position's neighbours, and the plain LM's log-probabilities of all tokens that can matter."""

    found: Neighborhood
    tokens_M: NDArray[np.int64]
    """Ascending: the neighbours' tokens, the LM's `LIKELIEST`, and the actual token once known. No other token is among
    the `LIKELIEST` of any mixture: no neighbour has it, and that many others are likelier for the LM."""
    lm_M: Floats
    """log p_LM of these."""

    def under(self, setting: Mix, trust: float = 1.0) -> Prediction:
        """Return the distributions with at most k neighbours, mixed as in `KNNLM`.

        :param trust: what λ is multiplied by.
        """
        distances_1K, values_1K = self.found.distances_K[None, : setting.k], self.found.values_K[None, : setting.k]
        shares = token_shares(distances_1K, values_1K, setting.temperature)
        knn_M = np.full(len(self.tokens_M), -math.inf)
        knn_M[np.searchsorted(self.tokens_M, shares.tokens_M)] = shares.log_probs_M
        full_lam = float(setting.lambdas(distances_1K, values_1K)[0]) if distances_1K.size else 0.0
        lam = trust * full_lam
        mixed_M = mix(self.lm_M, knn_M, lam)
        weights_K = self.found.weights(setting)
        return Prediction(self.tokens_M, np.exp(self.lm_M), np.exp(knn_M), np.exp(mixed_M), lam, full_lam, weights_K)

    def gain(self, under: Prediction, token: int) -> float:
        """Return log p at full trust minus log p_LM of one of the M tokens: what moves the trust.

        :param under: what `under` has returned, of this evidence before or after the token was included.
        """
        at = self.place(token)
        with np.errstate(divide="ignore"):
            knn_1, lm_1 = np.log(under.knn_M[under.tokens_M == token]), self.lm_M[at : at + 1]
        knn_1 = knn_1 if len(knn_1) else np.full(1, -math.inf)  # no neighbour has it
        return float(token_gains(mix(lm_1, knn_1, under.full_lam), lm_1)[0])

    def including(self, token: int, log_probs_V: Tensor) -> Evidence:
        """Return the evidence with the actual token among the M."""
        at = self.place(token)
        if at < len(self.tokens_M) and self.tokens_M[at] == token:
            return self
        lm_M = np.insert(self.lm_M, at, float(log_probs_V[token]))
        return Evidence(self.found, np.insert(self.tokens_M, at, token), lm_M)

    def place(self, token: int) -> int:
        """Return the place of a token among the M."""
        return int(np.searchsorted(self.tokens_M, token))


def find_neighbors(searcher: Searcher, vectors_TD: NDArray[np.float32], k: int) -> Iterator[Neighborhood]:
    """Yield the k nearest of each raw vector of the layer, from one search: an exact one reads every key."""
    found = searcher.neighbors(vectors_TD, k)
    for distances_K, rows_K in zip(found.distances_QK, found.ids_QK, strict=True):
        there_K = rows_K >= 0
        rows_K = rows_K[there_K]
        yield Neighborhood(distances_K[there_K], rows_K, searcher.store.values[rows_K])


def read_source(
    store: StoredText,
    row: int,
    decode: Callable[[Sequence[int] | NDArray[np.integer[Any]]], str],
    token_text: Callable[[int], str],
    *,
    before: int,
    after: int = 0,
) -> NeighborSource:
    """Return the text around a key's value: `before` tokens before it and `after` behind it, inside its document.

    :param token_text: gives the value's text, which may depend on the tokenizer's handling of a text's start.
    """
    value = int(store.values[row])
    behind = decode([value, *store.continuation(row, after)])[len(decode([value])) :] if after else ""
    return NeighborSource(decode(store.context(row, before)), token_text(value), behind, *store.document_of(row))


def make_evidence(found: Neighborhood, log_probs_V: Tensor) -> Evidence:
    """Return the evidence, keeping of the LM's log-probabilities those that can matter."""
    likeliest = torch.topk(log_probs_V, min(LIKELIEST, len(log_probs_V))).indices.cpu().numpy()
    tokens_M = np.union1d(found.values_K.astype(np.int64), likeliest)
    return Evidence(found, tokens_M, log_probs_V.cpu().numpy()[tokens_M].astype(np.float64))


def mixed_log_probs(under: Prediction, log_probs_V: Tensor) -> Tensor:
    """Return the log-probabilities of the mixture, float64 [V]; tokens beyond the evidence have no neighbour."""
    rest = math.log1p(-under.lam) if under.lam < 1 else -math.inf
    mixed_V = log_probs_V.cpu().double() + rest
    with np.errstate(divide="ignore"):
        mixed_V[torch.from_numpy(under.tokens_M)] = torch.from_numpy(np.log(under.mixed_M))
    return mixed_V

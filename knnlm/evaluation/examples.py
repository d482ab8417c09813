"""The tokens that retrieval helped and hurt most, with the neighbours' source text.

Legend: Q query tokens, D dimension, K neighbours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from knnlm.evaluation.outcomes import LayerOutcome
from knnlm.evaluation.queries import Queries
from knnlm.knn.mixing import neighbor_weights
from knnlm.knn.searcher import open_searcher
from knnlm.model.lm import LanguageModel
from knnlm.results import NeighborText, TokenExample
from knnlm.store.datastore import Datastore

CONTEXT_TOKENS = 24
NEIGHBOR_TOKENS = 12
NEIGHBORS_SHOWN = 5


def find_examples(
    lm: LanguageModel,
    store: Datastore,
    queries: Queries,
    shown: LayerOutcome,
    count: int,
    *,
    metric: str,
    exact: bool,
) -> tuple[tuple[TokenExample, ...], tuple[TokenExample, ...]]:
    """`count` tokens of the reporting part that gained most, and as many that lost most, under one layer's keys."""
    gain_Q = -shown.losses_Q - queries.lm_Q  # log p - log p_LM
    reporting = np.flatnonzero(queries.parts.reporting_Q)
    order = reporting[np.argsort(gain_Q[reporting], kind="stable")]
    lost, gained = order[:count], order[::-1][:count]
    gained, lost = gained[gain_Q[gained] > 0], lost[gain_Q[lost] < 0]
    rows = np.concatenate([gained, lost])
    searcher = open_searcher(store, shown.layer, metric, exact=exact)
    # One search for all: an exact one reads every key.
    found = searcher.neighbors(queries.vectors(shown.layer)[rows], shown.mix.k)
    explain = _Explainer(lm, store, queries, shown)
    examples = tuple(
        explain(int(row), *pair) for row, *pair in zip(rows, found.ids_QK, found.distances_QK, strict=True)
    )
    return examples[: len(gained)], examples[len(gained) :]


class _Explainer:
    """Puts tokens and their neighbours into words."""

    def __init__(self, lm: LanguageModel, store: Datastore, queries: Queries, shown: LayerOutcome) -> None:
        self._lm, self._store, self._queries, self._mix = lm, store, queries, shown.mix
        self._losses_Q = shown.losses_Q

    def __call__(self, row: int, ids_K: NDArray[np.int64], distances_K: NDArray[np.float32]) -> TokenExample:
        weights_K = neighbor_weights(distances_K[None], self._mix.temperature)[0]
        weights_K /= weights_K.sum() or 1  # all are 0 where there is no neighbour
        target = self._queries.targets_Q[row]
        same_K = (self._store.values[ids_K] == target) & (ids_K >= 0)
        before, after = self._around(row)
        return TokenExample(
            before=before,
            token=self._lm.decode([target]),
            after=after,
            lm_probability=float(np.exp(self._queries.lm_Q[row])),
            knn_probability=float(weights_K[same_K].sum()),
            mixed_probability=float(np.exp(-self._losses_Q[row])),
            neighbors=tuple(
                self._neighbor(int(key), float(distance), float(weight))
                for key, distance, weight in zip(ids_K, distances_K, weights_K, strict=True)
                if key >= 0
            )[:NEIGHBORS_SHOWN],
        )

    def _around(self, row: int) -> tuple[str, str]:
        """Text before and after the target, inside its document."""
        store, targets_Q = self._queries.store, self._queries.targets_Q
        documents_Q = self._queries.documents_Q
        ahead = slice(row + 1, row + 1 + CONTEXT_TOKENS)
        after: NDArray[np.int32] = targets_Q[ahead][documents_Q[ahead] == documents_Q[row]]
        return self._lm.decode(store.context(row, CONTEXT_TOKENS)), self._lm.decode(after)

    def _neighbor(self, key: int, distance: float, weight: float) -> NeighborText:
        source, number = self._store.document_of(key)
        return NeighborText(
            before=self._lm.decode(self._store.context(key, NEIGHBOR_TOKENS)),
            token=self._lm.decode([self._store.values[key]]),
            source=f"{source}:{number}",
            distance=distance,
            weight=weight,
        )

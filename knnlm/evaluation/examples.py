"""The tokens that retrieval helped and hurt most, with the neighbours' source text.

Legend: Q query tokens, D dimension, K neighbours.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from knnlm.evaluation.outcomes import LayerOutcome
from knnlm.evaluation.queries import Queries
from knnlm.knn.evidence import Neighborhood, NeighborSource, SourcedNeighbor, find_neighbors, read_source
from knnlm.knn.joint import open_search
from knnlm.knn.searcher import OpenIndex
from knnlm.model.lm import LanguageModel
from knnlm.results import NeighborText, TokenExample
from knnlm.store.joint import AnyStore

CONTEXT_TOKENS = 24
NEIGHBOR_TOKENS = 12
NEIGHBORS_SHOWN = 5
# A token whose probability changed by a smaller factor (10 %) is no example of help or harm.
LEAST_CHANGE = math.log(1.1)


def find_examples(
    lm: LanguageModel,
    store: AnyStore,
    queries: Queries,
    shown: LayerOutcome,
    count: int,
    *,
    metric: str,
    exact: bool,
    memory: float | None = None,
    opening: OpenIndex | None = None,
) -> tuple[tuple[TokenExample, ...], tuple[TokenExample, ...]]:
    """Return the `count` tokens that one layer's keys made likelier by the most, and the `count` that lost the most.

    Both are taken from the reporting part: the evaluation tokens that no setting was fitted on. Tokens that became
    likelier or less likely by less than 10 % are left out.
    """
    gain_Q = -shown.losses_Q - queries.lm_Q  # log p - log p_LM
    reporting = np.flatnonzero(queries.parts.reporting_Q)
    order = reporting[np.argsort(gain_Q[reporting], kind="stable")]
    lost, gained = order[:count], order[::-1][:count]
    gained, lost = gained[gain_Q[gained] > LEAST_CHANGE], lost[gain_Q[lost] < -LEAST_CHANGE]
    rows = np.concatenate([gained, lost])
    searcher = open_search(
        store, shown.layer, metric, exact=exact, offsets=shown.offsets, memory=memory, opening=opening
    )
    found = find_neighbors(searcher, queries.vectors(shown.layer)[rows], shown.mix.k)
    explain = _Explainer(lm, store, queries, shown)
    examples = tuple(explain(int(row), one) for row, one in zip(rows, found, strict=True))
    return examples[: len(gained)], examples[len(gained) :]


class _Explainer:
    """Describes tokens and their neighbours as text."""

    def __init__(self, lm: LanguageModel, store: AnyStore, queries: Queries, shown: LayerOutcome) -> None:
        self._lm, self._store, self._queries, self._mix = lm, store, queries, shown.mix
        self._losses_Q = shown.losses_Q

    def __call__(self, row: int, found: Neighborhood) -> TokenExample:
        target, weights_K = self._queries.targets_Q[row], found.weights(self._mix)
        before, after = self._around(row)
        return TokenExample(
            before=before,
            token=self._lm.token_text(int(target)),
            after=after,
            lm_probability=float(np.exp(self._queries.lm_Q[row])),
            knn_probability=float(weights_K[found.values_K == target].sum()),
            mixed_probability=float(np.exp(-self._losses_Q[row])),
            neighbors=tuple(map(_neighbor_text, found.nearest(weights_K, NEIGHBORS_SHOWN, self._source))),
        )

    def _around(self, row: int) -> tuple[str, str]:
        """Text before and after the target, within its document."""
        store, targets_Q = self._queries.store, self._queries.targets_Q
        documents_Q = self._queries.documents_Q
        ahead = slice(row + 1, row + 1 + CONTEXT_TOKENS)
        after: NDArray[np.int32] = targets_Q[ahead][documents_Q[ahead] == documents_Q[row]]
        return self._lm.decode(store.context(row, CONTEXT_TOKENS)), self._lm.decode(after)

    def _source(self, row: int) -> NeighborSource:
        return read_source(self._store, row, self._lm.decode, self._lm.token_text, before=NEIGHBOR_TOKENS)


def _neighbor_text(one: SourcedNeighbor) -> NeighborText:
    source = one.source
    return NeighborText(
        source.before, source.token, f"{source.document}:{source.number}", distance=one.distance, weight=one.weight
    )

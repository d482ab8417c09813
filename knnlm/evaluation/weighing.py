"""The search of a layer in one datastore or in several, with the weights of these, given or fitted.

Legend: Q query tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from knnlm.config import KNNConfig
from knnlm.evaluation.queries import Floats, Queries
from knnlm.knn.fitting import fit
from knnlm.knn.joint import JointSearcher, Searcher, merge_searches, offsets_of
from knnlm.knn.mixing import Mix, Search, knn_log_probs, mix

# Tried for each datastore but the first; the best is kept, one datastore after the other.
WEIGHTS = (0.0, *(4.0**power for power in range(-3, 4)))
# How often T is fitted again with the offsets that given weights have at the T before.
_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Weighed:
    """A layer's search with the weights of the datastores in its distances."""

    search: Search
    knn: KNNConfig
    """With the temperature for which given weights hold."""
    offsets: tuple[float, ...] = ()
    """What was added to the distances of each of several datastores."""


def weigh(searcher: Searcher, queries: Queries, k: int, knn: KNNConfig, *, fit_weights: bool = False) -> Weighed:
    """Search once for all queries, in each datastore; of several, apply their weights.

    :param fit_weights: fit the weights on the tuning part, in place of those of the `JointStore`.
    """
    vectors_QD, targets_Q = queries.vectors(searcher.layer), queries.targets_Q
    if not isinstance(searcher, JointSearcher):
        return Weighed(searcher.cached(vectors_QD, targets_Q, k), knn)
    searches, given, tuning = searcher.cached(vectors_QD, targets_Q, k), searcher.store.weights, queries.parts.tuning_Q
    trials = _Trials([one.rows(tuning) for one in searches], queries.lm_Q[tuning], k, knn)
    if fit_weights:
        offsets = trials.fitted()
    elif set(given) == {1.0}:
        offsets = (0.0,) * len(given)
    else:
        temperature = trials.temperature(given)
        knn, offsets = replace(knn, temperature=temperature), offsets_of(given, temperature)
    return Weighed(merge_searches(searches, offsets, k), knn, offsets)


@dataclass(frozen=True, eq=False)
class _Trials:
    """Fits on the tuning part, with any offsets."""

    searches: Sequence[Search]
    lm_Q: Floats
    k: int
    knn: KNNConfig

    def at(self, offsets: Sequence[float]) -> tuple[float, Mix]:
        """The mean loss, and the setting, fitted with these offsets."""
        search, knn = merge_searches(self.searches, offsets, self.k), self.knn
        setting = fit(search, self.lm_Q, k=knn.k, temperature=knn.temperature, lam=knn.lam)
        log_probs_Q = mix(self.lm_Q, knn_log_probs(search, setting.k, setting.temperature), setting.lam)
        return -float(np.mean(log_probs_Q)), setting

    def temperature(self, weights: Sequence[float]) -> float:
        """The T that is fitted with weights, which are other offsets at another T."""
        found = self.knn.temperature or self.at((0.0,) * len(weights))[1].temperature
        for _ in range(0 if self.knn.temperature else _ROUNDS):
            found = self.at(offsets_of(weights, found))[1].temperature
        return found

    def fitted(self) -> tuple[float, ...]:
        """The offsets of the lowest loss, of the tried ones: one datastore after the other, the first as it is."""
        best = (0.0,) * len(self.searches)
        least, plain = self.at(best)
        for place in range(1, len(best)):
            for offset in offsets_of(WEIGHTS, plain.temperature):
                tried = (*best[:place], offset, *best[place + 1 :])
                loss = self.at(tried)[0] if offset else math.inf
                if loss < least:
                    least, best = loss, tried
        return best

"""Perplexity of the plain LM and of the kNN-LM, for every layer of a datastore.

The evaluation text goes through the model once, into a small temporary datastore of float32 queries. Each layer is
searched once; k, temperature and lambda are fitted on one part of the text (the tuning part) and perplexity is
reported on the other, so that no number is fitted on the tokens that it is reported on.

Legend: Q query tokens, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from knnlm.config import KNNConfig
from knnlm.evaluation.parts import Parts
from knnlm.evaluation.queries import Floats, Queries
from knnlm.evaluation.weighing import weigh
from knnlm.knn.fitting import LAMBDA_CURVE, fit, fit_gate
from knnlm.knn.joint import open_search
from knnlm.knn.mixing import Mix, Search, knn_log_probs, mix
from knnlm.knn.searcher import OpenIndex, check_k, open_searcher
from knnlm.knn.trust import log_probs_by_text
from knnlm.progress import Progress, Silent
from knnlm.store.datastore import Datastore
from knnlm.store.joint import AnyStore


@dataclass(frozen=True)
class LayerOutcome:
    """Fitted setting and losses of one layer."""

    layer: str
    mix: Mix
    """Fitted on the tuning part; has a gate where lambda was fitted. Only `gated_losses_R` uses the gate."""
    losses_Q: Floats
    """-log p of every target, cross-fitted: no token is scored under a setting that was fitted on it. Tuning tokens are
    scored under the setting fitted on the reporting part, all others under `mix`."""
    tuning_loss: float
    """Mean loss on the tuning part under `mix`, in-sample; the best layer is the one with the lowest."""
    swapped_loss: float
    """The same with the two parts' roles swapped: mean loss on the reporting part under the setting fitted there."""
    lambda_curve: tuple[tuple[float, float], ...]
    gated_losses_R: Floats | None = None
    """-log p of the reporting part's targets with the gate, lambda by the text so far."""
    offsets: tuple[float, ...] = ()
    """Of the distances from each of several datastores: see `knnlm.knn.joint`."""


def evaluate_layers(
    store: AnyStore,
    queries: Queries,
    layers: Sequence[str],
    knn: KNNConfig,
    *,
    exact: bool = False,
    fit_weights: bool = False,
    memory: float | None = None,
    opening: OpenIndex | None = None,
    progress: Progress | None = None,
) -> Iterator[LayerOutcome]:
    """Search, fit and score the layers one by one.

    :param fit_weights: also fit the weights of several datastores.
    :param memory, opening: as in `open_searcher`.
    """
    check_k(knn.k, store.count)
    progress, k = progress or Silent(), min(knn.search_k, store.count)
    with progress.stage("evaluating", "layers") as advance:
        for number, layer in enumerate(layers, start=1):
            searcher = open_search(store, layer, knn.metric, exact=exact, memory=memory, opening=opening)
            found = weigh(searcher, queries, k, knn, fit_weights=fit_weights)
            yield replace(outcome(layer, found.search, queries, found.knn), offsets=found.offsets)
            advance(number, len(layers))


def outcome(layer: str, search: Search, queries: Queries, knn: KNNConfig) -> LayerOutcome:
    """Fit on each part and score the other; unless lambda is given, also fit a gate on the tuning part."""
    tuning, lm_Q = queries.parts.tuning_Q, queries.lm_Q
    first, swapped = cross_fit(search, lm_Q, queries.parts, k=knn.k, temperature=knn.temperature, lam=knn.lam)
    mine = first.mix if knn.lam is not None else _gated(search.rows(tuning), lm_Q[tuning], first.mix)
    reporting = queries.parts.reporting_Q
    reported = search.rows(reporting)
    knn_Q = knn_log_probs(reported, mine.k, mine.temperature)
    return LayerOutcome(
        layer=layer,
        mix=mine,
        losses_Q=cross_fitted_losses(first, swapped, queries.parts),
        tuning_loss=float(np.mean(first.losses_Q[tuning])),
        swapped_loss=float(np.mean(swapped.losses_Q[queries.parts.fitting_Q])),
        lambda_curve=tuple((lam, perplexity(-mix(lm_Q[reporting], knn_Q, lam))) for lam in LAMBDA_CURVE),
        # Of the whole text, as the trust at a token comes from all tokens before.
        gated_losses_R=None
        if mine.gate is None
        else -log_probs_by_text(search, lm_Q, mine, queries.documents_Q)[reporting],
    )


def _gated(search: Search, lm_log_probs: Floats, setting: Mix) -> Mix:
    return replace(fit_gate(search, lm_log_probs, setting), by_text=True)


@dataclass(frozen=True, eq=False)
class Fit:
    """A setting fitted on one part of the queries, and what every query loses under it."""

    mix: Mix
    losses_Q: Floats
    """-log p of every target."""


def cross_fit(
    search: Search,
    lm_log_probs: Floats,
    parts: Parts,
    *,
    k: int | None = None,
    temperature: float | None = None,
    lam: float | None = None,
) -> tuple[Fit, Fit]:
    """Fit on the tuning part, and on the other one; given values are kept."""

    def fitted_on(part: NDArray[np.bool_]) -> Fit:
        setting = fit(search.rows(part), lm_log_probs[part], k=k, temperature=temperature, lam=lam)
        return Fit(setting, _losses(search, lm_log_probs, setting))

    return fitted_on(parts.tuning_Q), fitted_on(parts.fitting_Q)


def cross_fitted_losses(first: Fit, swapped: Fit, parts: Parts) -> Floats:
    """Return what each query loses under the one of `cross_fit`'s settings that was not fitted on it."""
    losses_Q: Floats = np.where(parts.tuning_Q, swapped.losses_Q, first.losses_Q)
    return losses_Q


def perplexity_through_index(
    store: Datastore, queries: Queries, one: LayerOutcome, metric: str, memory: float | None = None
) -> float:
    """Perplexity of the layer on the reporting part with its index, at the setting fitted under exact search."""
    reporting = queries.parts.reporting_Q
    searcher = open_searcher(store, one.layer, metric, memory=memory)
    search = searcher.cached(queries.vectors(one.layer)[reporting], queries.targets_Q[reporting], one.mix.k)
    return perplexity(_losses(search, queries.lm_Q[reporting], one.mix))


def _losses(search: Search, lm_log_probs: Floats, setting: Mix) -> Floats:
    return -mix(lm_log_probs, knn_log_probs(search, setting.k, setting.temperature), setting.lam)


def perplexity(losses: Floats) -> float:
    """Return exp of the mean loss."""
    return exp_or_inf(float(np.mean(losses)))


def exp_or_inf(value: float) -> float:
    """Return exp, or infinity beyond float64: word perplexity of a long text without white space gets there."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))

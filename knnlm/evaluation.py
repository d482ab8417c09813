"""Perplexity of the plain LM and of the kNN-LM, for every layer of a datastore.

The evaluation text goes through the model once, into a small temporary datastore of float32 queries. Each layer is
searched once; k, temperature and lambda are fitted on one part of the text (the tuning part) and perplexity is
reported on the other, so that no number is fitted on the tokens that it is reported on.

Legend: Q query tokens, D dimension.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnlm.collect import Collected, collect
from knnlm.config import BATCH_TOKENS, EvalConfig, KNNConfig
from knnlm.datastore import Datastore, DatastoreWriter
from knnlm.errors import InputError
from knnlm.lm import LanguageModel
from knnlm.parts import Parts, split_parts
from knnlm.probability import LAMBDA_CURVE, Mix, Search, fit, knn_log_probs, mix
from knnlm.progress import Progress, Silent
from knnlm.results import Choice, Correlation, EvalResult, LayerResult, LayerScore, Perplexity, Regret, ScoreResult
from knnlm.search import check_k, open_searcher
from knnlm.statistics import PairedBootstrap, spearman
from knnlm.windows import TokenDocument, WindowConfig, count_targets

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Queries:
    """The evaluation text after its one forward pass."""

    store: Datastore
    collected: Collected
    parts: Parts

    @property
    def targets_Q(self) -> NDArray[np.int32]:
        """The token that each query has to predict."""
        assert self.collected.targets_N is not None
        return self.collected.targets_N

    @property
    def lm_Q(self) -> Floats:
        """The plain LM's log-probability of each target."""
        assert self.collected.lm_log_probs_N is not None
        return self.collected.lm_log_probs_N

    def vectors(self, layer: str) -> NDArray[np.float32]:
        """The layer's raw vectors, [Q, D]."""
        keys = self.store.keys(layer)
        return keys.read(0, len(keys)) + keys.centre


@dataclass(frozen=True)
class LayerOutcome:
    """What one layer's search gave."""

    layer: str
    mix: Mix
    """Fitted on the tuning part."""
    losses_Q: Floats
    """-log p of every target, cross-fitted: tuning tokens under the setting fitted on the reporting part, all others
    under `mix`, so that no token is scored with what was fitted on it."""
    tuning_loss: float
    """Mean, on the tuning part, with `mix`: in-sample, what the best layer is picked by."""
    swapped_loss: float
    """Mean, on the reporting part, with the setting fitted there: the same for the swapped roles."""
    lambda_curve: tuple[tuple[float, float], ...]


@contextmanager
def open_queries(
    lm: LanguageModel,
    documents: Sequence[TokenDocument],
    config: WindowConfig,
    layers: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    fitted: bool = True,
    progress: Progress | None = None,
) -> Iterator[Queries]:
    """Run the model over the evaluation text and keep its queries on disk while the block lasts."""
    progress = progress or Silent()
    total = count_targets(documents)
    with tempfile.TemporaryDirectory(prefix="knnlm-queries-") as folder:
        dims = {name: lm.dims[name] for name in layers}
        writer = DatastoreWriter(Path(folder), dims, key_dtype="float32", option="TMPDIR")
        with writer, progress.stage("evaluation text through the model", "tokens") as advance:
            collected = collect(
                lm,
                documents,
                config,
                layers,
                batch_tokens=batch_tokens,
                writer=writer,
                log_probs=True,
                advance=lambda done, _: advance(done, total),
            )
            writer.finish(context=config.context, stride=config.stride, fingerprint=lm.fingerprint)
        yield Queries(Datastore.open(Path(folder)), collected, split_parts(collected, fitted=fitted))


def evaluate_layers(
    store: Datastore,
    queries: Queries,
    layers: Sequence[str],
    knn: KNNConfig,
    *,
    exact: bool = False,
    progress: Progress | None = None,
) -> Iterator[LayerOutcome]:
    """Search, fit and score one layer after the other."""
    check_k(knn.k, store.count)
    k = min(knn.search_k, store.count)
    for layer in layers:
        searcher = open_searcher(store, layer, knn.metric, exact=exact)
        with (progress or Silent()).stage(f"searching {layer}", "queries") as advance:
            search = searcher.cached(queries.vectors(layer), queries.targets_Q, k, advance)
        yield outcome(layer, search, queries, knn)


def outcome(layer: str, search: Search, queries: Queries, knn: KNNConfig) -> LayerOutcome:
    """Fit on each part, score the other."""
    tuning, rest, lm_Q = queries.parts.tuning_Q, ~queries.parts.tuning_Q, queries.lm_Q
    mine, swapped = (
        fit(search.rows(part), lm_Q[part], k=knn.k, temperature=knn.temperature, lam=knn.lam)
        for part in (tuning, queries.parts.fitting_Q)
    )
    losses_Q, swapped_Q = _losses(search, lm_Q, mine), _losses(search, lm_Q, swapped)
    reporting = queries.parts.reporting_Q
    knn_Q = knn_log_probs(search.rows(reporting), mine.k, mine.temperature)
    return LayerOutcome(
        layer=layer,
        mix=mine,
        losses_Q=np.where(rest, losses_Q, swapped_Q),
        tuning_loss=float(np.mean(losses_Q[tuning])),
        swapped_loss=float(np.mean(swapped_Q[queries.parts.fitting_Q])),
        lambda_curve=tuple((lam, _perplexity(-mix(lm_Q[reporting], knn_Q, lam))) for lam in LAMBDA_CURVE),
    )


def perplexity_through_index(store: Datastore, queries: Queries, one: LayerOutcome, metric: str) -> float:
    """The layer's perplexity on the reporting part when its index searches, at the setting fitted exactly."""
    reporting = queries.parts.reporting_Q
    searcher = open_searcher(store, one.layer, metric)
    search = searcher.cached(queries.vectors(one.layer)[reporting], queries.targets_Q[reporting], one.mix.k)
    return _perplexity(_losses(search, queries.lm_Q[reporting], one.mix))


def _losses(search: Search, lm_log_probs: Floats, setting: Mix) -> Floats:
    return -mix(lm_log_probs, knn_log_probs(search, setting.k, setting.temperature), setting.lam)


def _perplexity(losses: Floats) -> float:
    return float(np.exp(np.mean(losses)))


def summarize(
    lm: LanguageModel,
    queries: Queries,
    outcomes: Sequence[LayerOutcome],
    config: EvalConfig,
    scored: ScoreResult | None,
    *,
    seed: int = 0,
) -> EvalResult:
    """The table: perplexity per layer with intervals, the best layer, the regret of the choice, the correlations.

    Without scores there is no choice: no layer is selected, and nothing has a regret or a correlation.
    """
    parts, choice = queries.parts, scored.choice if scored else None
    bootstrap = PairedBootstrap(parts.clusters_Q[parts.reporting_Q], replicates=config.bootstrap, seed=seed)
    measure = _Measure(lm, queries)
    by_name = {score.layer: score for score in scored.layers} if scored else {}
    best = min(outcomes, key=lambda one: one.tuning_loss)
    layers = tuple(_layer_result(one, best, measure, bootstrap, by_name.get(one.layer)) for one in outcomes)
    chosen = next((one for one in outcomes if choice and one.layer == choice.layer), None)
    return EvalResult(
        lm=measure.perplexity(measure.lm_losses_Q),
        layers=layers,
        best=best.layer,
        selected=chosen.layer if chosen else None,
        choice=choice,
        regret=regret(outcomes, chosen, parts, config, seed) if chosen else None,
        correlations=correlations(layers, choice) if choice else (),
        tuning_tokens=int(parts.tuning_Q.sum()) if parts.fitted else 0,
    )


class _Measure:
    """Turns losses on the reporting part into perplexities; knows how many bytes and words its tokens are."""

    def __init__(self, lm: LanguageModel, queries: Queries) -> None:
        self.reporting_Q = reporting = queries.parts.reporting_Q
        self.lm_losses_Q = -queries.lm_Q[reporting]
        targets, clusters = queries.targets_Q[reporting], queries.parts.clusters_Q[reporting]
        texts = [lm.decode(targets[clusters == cluster]) for cluster in np.unique(clusters)]
        self._bytes = sum(len(text.encode()) for text in texts)
        self._words = sum(len(text.split()) for text in texts)

    def perplexity(self, losses_Q: Floats) -> Perplexity:
        total = float(losses_Q.sum())
        return Perplexity(
            perplexity=_perplexity(losses_Q),
            bits_per_byte=total / math.log(2) / max(self._bytes, 1),
            word_perplexity=float(np.exp(total / max(self._words, 1))),
            tokens=len(losses_Q),
        )


def _layer_result(
    one: LayerOutcome, best: LayerOutcome, measure: _Measure, bootstrap: PairedBootstrap, score: LayerScore | None
) -> LayerResult:
    ours_Q, best_Q = one.losses_Q[measure.reporting_Q], best.losses_Q[measure.reporting_Q]
    figures = measure.perplexity(ours_Q)
    return LayerResult(
        layer=one.layer,
        perplexity=figures.perplexity,
        change=float(np.expm1(np.mean(ours_Q) - np.mean(measure.lm_losses_Q))),
        interval=bootstrap.relative_change(ours_Q, measure.lm_losses_Q),
        versus_best=float(np.expm1(np.mean(ours_Q) - np.mean(best_Q))),
        versus_best_interval=bootstrap.relative_change(ours_Q, best_Q),
        k=one.mix.k,
        lam=one.mix.lam,
        temperature=one.mix.temperature,
        bits_per_byte=figures.bits_per_byte,
        word_perplexity=figures.word_perplexity,
        lambda_curve=one.lambda_curve,
        score=score,
    )


def regret(
    outcomes: Sequence[LayerOutcome], chosen: LayerOutcome, parts: Parts, config: EvalConfig, seed: int = 0
) -> Regret:
    """Perplexity of the chosen layer over that of the best layer, minus 1, cross-fitted.

    The best is picked (and fitted) on one part and compared on the other; then the roles are swapped, and each token
    counts once. Picking the best on the very tokens that report it would flatter it by 1 to 2 % at 2,500 tokens.
    """
    best = min(outcomes, key=lambda one: one.tuning_loss)
    swapped_best = min(outcomes, key=lambda one: one.swapped_loss)
    both = parts.tuning_Q | parts.fitting_Q
    theirs_Q = np.where(parts.tuning_Q, swapped_best.losses_Q, best.losses_Q)[both]
    ours_Q = chosen.losses_Q[both]
    bootstrap = PairedBootstrap(parts.clusters_Q[both], replicates=config.bootstrap, seed=seed)
    return Regret(float(np.expm1(np.mean(ours_Q) - np.mean(theirs_Q))), bootstrap.relative_change(ours_Q, theirs_Q))


# Attributes of LayerScore that are correlated with perplexity.
SCORES = (
    "dispersion",
    "dispersion_within",
    "dispersion_segments",
    "dispersion_standardized",
    "effective_rank",
    "probe",
)


def correlations(layers: Sequence[LayerResult], choice: Choice) -> tuple[Correlation, ...]:
    """Spearman's correlation of each score with perplexity, over all layers and over the candidates."""
    scored = [layer for layer in layers if layer.score is not None]
    groups: Mapping[str, list[LayerResult]] = {
        "all": scored,
        "candidates": [layer for layer in scored if layer.layer in choice.candidates],
    }
    return tuple(
        Correlation(
            name,
            spearman([getattr(one.score, name) for one in group], [one.perplexity for one in group]),
            len(group),
            among,
        )
        for among, group in groups.items()
        for name in SCORES
        if len(group) > 2
    )


def check_evaluation(documents: Sequence[TokenDocument]) -> None:
    """:raises InputError: there are too few tokens to tune on one part and report on the other."""
    tokens = count_targets(documents)
    if tokens < 64:
        raise InputError(f"the evaluation text gives {tokens} tokens to predict, but at least 64 are needed; give more")

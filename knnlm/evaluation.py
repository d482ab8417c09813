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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnlm.collect import Collected, collect
from knnlm.config import BATCH_TOKENS, KNNConfig
from knnlm.datastore import Datastore, DatastoreWriter
from knnlm.errors import InputError
from knnlm.lm import LanguageModel
from knnlm.parts import Parts, split_parts
from knnlm.probability import LAMBDA_CURVE, Mix, Search, fit, fit_gate, knn_log_probs, mix
from knnlm.progress import Progress, Silent
from knnlm.results import (
    SCORES,
    ByQuery,
    Choice,
    Correlation,
    EvalResult,
    Interval,
    LayerResult,
    LayerScore,
    Perplexity,
    Regret,
    ScoreResult,
)
from knnlm.search import check_k, open_searcher
from knnlm.statistics import relative_change, spearman
from knnlm.windows import TokenDocument, WindowConfig, count_targets

Floats = NDArray[np.float64]

# Of each of the two parts: fewer say nothing of k, temperature and lambda.
LEAST_TOKENS = 32


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
    """Fitted on the tuning part; with a gate where lambda was. All but `gated_losses_R` is with the fixed lambda."""
    losses_Q: Floats
    """-log p of every target, cross-fitted: tuning tokens under the setting fitted on the reporting part, all others
    under `mix`, so that no token is scored with what was fitted on it."""
    tuning_loss: float
    """Mean, on the tuning part, with `mix`: in-sample, what the best layer is picked by."""
    swapped_loss: float
    """Mean, on the reporting part, with the setting fitted there: the same for the swapped roles."""
    lambda_curve: tuple[tuple[float, float], ...]
    gated_losses_R: Floats | None = None
    """-log p of the reporting part's targets under the gate."""


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
        assert collected.documents_N is not None
        yield Queries(Datastore.open(Path(folder)), collected, split_parts(collected.documents_N, fitted=fitted))


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
    progress, k = progress or Silent(), min(knn.search_k, store.count)
    for layer in layers:
        searcher = open_searcher(store, layer, knn.metric, exact=exact)
        with progress.stage(f"searching {layer}", "queries") as advance:
            search = searcher.cached(queries.vectors(layer), queries.targets_Q, k, advance)
        with progress.stage(f"fitting k, λ and T for {layer}", "settings"):
            found = outcome(layer, search, queries, knn)
        yield found


def outcome(layer: str, search: Search, queries: Queries, knn: KNNConfig) -> LayerOutcome:
    """Fit on each part, score the other; a gate, on the tuning part, unless lambda is given."""
    tuning, rest, lm_Q = queries.parts.tuning_Q, ~queries.parts.tuning_Q, queries.lm_Q
    mine, swapped = (
        fit(search.rows(part), lm_Q[part], k=knn.k, temperature=knn.temperature, lam=knn.lam)
        for part in (tuning, queries.parts.fitting_Q)
    )
    losses_Q, swapped_Q = _losses(search, lm_Q, mine), _losses(search, lm_Q, swapped)
    if knn.lam is None:
        mine = fit_gate(search.rows(tuning), lm_Q[tuning], mine)
    reporting = queries.parts.reporting_Q
    reported = search.rows(reporting)
    knn_Q = knn_log_probs(reported, mine.k, mine.temperature)
    return LayerOutcome(
        layer=layer,
        mix=mine,
        losses_Q=np.where(rest, losses_Q, swapped_Q),
        tuning_loss=float(np.mean(losses_Q[tuning])),
        swapped_loss=float(np.mean(swapped_Q[queries.parts.fitting_Q])),
        lambda_curve=tuple((lam, _perplexity(-mix(lm_Q[reporting], knn_Q, lam))) for lam in LAMBDA_CURVE),
        gated_losses_R=_gated_losses(reported, lm_Q[reporting], knn_Q, mine),
    )


def perplexity_through_index(store: Datastore, queries: Queries, one: LayerOutcome, metric: str) -> float:
    """The layer's perplexity on the reporting part when its index searches, at the setting fitted exactly."""
    reporting = queries.parts.reporting_Q
    searcher = open_searcher(store, one.layer, metric)
    search = searcher.cached(queries.vectors(one.layer)[reporting], queries.targets_Q[reporting], one.mix.k)
    return _perplexity(_losses(search, queries.lm_Q[reporting], one.mix))


def _gated_losses(search: Search, lm_log_probs: Floats, knn: Floats, setting: Mix) -> Floats | None:
    if setting.gate is None:
        return None
    return -mix(lm_log_probs, knn, setting.lambdas(search.distances_QK, search.values_QJ))


def _losses(search: Search, lm_log_probs: Floats, setting: Mix) -> Floats:
    return -mix(lm_log_probs, knn_log_probs(search, setting.k, setting.temperature), setting.lam)


def _perplexity(losses: Floats) -> float:
    return _exp(float(np.mean(losses)))


def _exp(value: float) -> float:
    """exp, infinite where float64 ends: such is the word perplexity of a long text without white space."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def summarize(
    lm: LanguageModel,
    queries: Queries,
    outcomes: Sequence[LayerOutcome],
    scored: ScoreResult | None,
) -> EvalResult:
    """The table: perplexity per layer with intervals, the best layer, the regret of the choice, the correlations.

    Without scores there is no choice: no layer is selected, and nothing has a regret or a correlation.
    """
    parts, choice = queries.parts, scored.choice if scored else None
    measure = _Measure(lm, queries)
    by_name = {score.layer: score for score in scored.layers} if scored else {}
    best = min(outcomes, key=lambda one: one.tuning_loss)
    # With --lambda 0 every layer is the plain LM.
    tied = len(outcomes) > 1 and len({one.tuning_loss for one in outcomes}) == 1
    layers = tuple(_layer_result(one, best, measure, by_name.get(one.layer)) for one in outcomes)
    chosen = next((one for one in outcomes if choice and one.layer == choice.layer), None)
    return EvalResult(
        lm=measure.perplexity(measure.lm_losses_Q),
        layers=layers,
        best=best.layer if math.isfinite(best.tuning_loss) and not tied else "",
        selected=chosen.layer if chosen else None,
        choice=choice,
        regret=regret(outcomes, chosen, parts) if chosen and len(outcomes) > 1 and not tied else None,
        correlations=correlations(layers, choice) if choice else (),
        tuning_tokens=int(parts.tuning_Q.sum()) if parts.fitted else 0,
        warnings=_impossible_tokens(outcomes, chosen),
    )


def _impossible_tokens(outcomes: Sequence[LayerOutcome], chosen: LayerOutcome | None) -> tuple[str, ...]:
    """A warning where the neighbours alone are asked and have not every target."""
    infinite = [one for one in outcomes if one.mix.lam == 1 and np.isinf(one.losses_Q).any()]
    if not infinite:
        return ()
    one = next((one for one in infinite if one is chosen), infinite[0])
    count, total = int(np.isinf(one.losses_Q).sum()), len(one.losses_Q)
    return (
        f"with --lambda 1, {count:,} of all {total:,} evaluated tokens have probability zero under the kNN "
        f"distribution of {one.layer}, which makes perplexity infinite; a --lambda below 1 mends it",
    )


class _Measure:
    """Turns losses on the reporting part into perplexities; knows how many bytes and words its tokens are."""

    def __init__(self, lm: LanguageModel, queries: Queries) -> None:
        self.reporting_Q = reporting = queries.parts.reporting_Q
        self.lm_losses_Q = -queries.lm_Q[reporting]
        self._clusters_Q = clusters = queries.parts.clusters_Q[reporting]
        targets = queries.targets_Q[reporting]
        texts = [lm.decode(targets[clusters == cluster]) for cluster in np.unique(clusters)]
        self._bytes = sum(len(text.encode()) for text in texts)
        self._words = sum(len(text.split()) for text in texts)

    def perplexity(self, losses_Q: Floats) -> Perplexity:
        total = float(losses_Q.sum())
        return Perplexity(
            perplexity=_perplexity(losses_Q),
            bits_per_byte=total / math.log(2) / max(self._bytes, 1),
            word_perplexity=_exp(total / max(self._words, 1)),
            tokens=len(losses_Q),
        )

    def change(self, losses_Q: Floats, base_Q: Floats) -> tuple[float, Interval]:
        """Relative change of perplexity, with its interval."""
        return relative_change(losses_Q, base_Q, self._clusters_Q)


def _layer_result(one: LayerOutcome, best: LayerOutcome, measure: _Measure, score: LayerScore | None) -> LayerResult:
    ours_Q, best_Q = one.losses_Q[measure.reporting_Q], best.losses_Q[measure.reporting_Q]
    figures = measure.perplexity(ours_Q)
    change, interval = measure.change(ours_Q, measure.lm_losses_Q)
    versus_best, versus_best_interval = measure.change(ours_Q, best_Q)
    return LayerResult(
        layer=one.layer,
        perplexity=figures.perplexity,
        change=change,
        interval=interval,
        versus_best=versus_best,
        versus_best_interval=versus_best_interval,
        k=one.mix.k,
        lam=one.mix.lam,
        temperature=one.mix.temperature,
        bits_per_byte=figures.bits_per_byte,
        word_perplexity=figures.word_perplexity,
        lambda_curve=one.lambda_curve,
        score=score,
        by_query=_by_query(one, measure),
    )


def _by_query(one: LayerOutcome, measure: _Measure) -> ByQuery | None:
    if one.mix.gate is None or one.gated_losses_R is None:
        return None
    change, interval = measure.change(one.gated_losses_R, one.losses_Q[measure.reporting_Q])
    return ByQuery(_perplexity(one.gated_losses_R), change, interval, **asdict(one.mix.gate))


def regret(outcomes: Sequence[LayerOutcome], chosen: LayerOutcome, parts: Parts) -> Regret | None:
    """Perplexity of the chosen layer over that of the best layer, minus 1, cross-fitted; None if one is infinite.

    The best is picked (and fitted) on one part and compared on the other; then the roles are swapped, and each token
    counts once. Picking the best on the very tokens that report it, as `against_hindsight` does, flatters it by 1 to
    2 % at 2,500 tokens; picking it on half of them by noise makes `value` too low.
    """
    best = min(outcomes, key=lambda one: one.tuning_loss)
    swapped_best = min(outcomes, key=lambda one: one.swapped_loss)
    both = parts.tuning_Q | parts.fitting_Q
    ours_Q = chosen.losses_Q[both]
    theirs_Q = np.where(parts.tuning_Q, swapped_best.losses_Q, best.losses_Q)[both]
    value, interval = relative_change(ours_Q, theirs_Q, parts.clusters_Q[both])
    if math.isnan(value):
        return None
    least = min(float(np.mean(one.losses_Q[both])) for one in outcomes)
    return Regret(value, interval, against_hindsight=math.expm1(float(np.mean(ours_Q)) - least))


def correlations(layers: Sequence[LayerResult], choice: Choice) -> tuple[Correlation, ...]:
    """Spearman's correlation of each score with perplexity, over all layers and over the candidates."""
    scored = [layer for layer in layers if layer.score is not None]
    groups: Mapping[str, list[LayerResult]] = {
        "all": scored,
        "candidates": [layer for layer in scored if layer.layer in choice.candidates],
    }
    return tuple(
        Correlation(
            kind.name,
            spearman([getattr(one.score, kind.name) for one in group], [one.perplexity for one in group]),
            len(group),
            among,
        )
        for among, group in groups.items()
        for kind in SCORES
        if len(group) > 2
    )


def check_evaluation(documents: Sequence[TokenDocument]) -> None:
    """:raises InputError: there are too few tokens to tune on one part and report on the other."""
    lengths = [count_targets([document]) for document in documents]
    parts = split_parts(np.repeat(np.arange(len(lengths)), lengths)) if any(lengths) else None
    smaller = int(min(parts.tuning_Q.sum(), parts.fitting_Q.sum())) if parts else 0
    if smaller < LEAST_TOKENS:
        raise InputError(
            f"the evaluation text gives {sum(lengths):,} tokens to predict, {smaller} of them in the smaller of its "
            f"two parts, but at least {LEAST_TOKENS} are needed in each; give more"
        )

"""The result of an evaluation: the table of layers with intervals, the best layer, the regret, the correlations.

Regret is by how much the perplexity of the chosen layer exceeds that of the best one.

Legend: Q query tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from knnlm.evaluation.outcomes import LayerOutcome, exp_or_inf, perplexity
from knnlm.evaluation.parts import Parts
from knnlm.evaluation.queries import Floats, Queries
from knnlm.knn.joint import weights_of
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
from knnlm.statistics import relative_change, spearman


def summarize(
    queries: Queries,
    outcomes: Sequence[LayerOutcome],
    scored: ScoreResult | None,
) -> EvalResult:
    """Return perplexity per layer with intervals, the best layer, the regret of the choice and the correlations.

    Without scores there is no choice, and so no selected layer, no regret and no correlations.
    """
    parts, choice = queries.parts, scored.choice if scored else None
    measure = _Measure(queries)
    by_name = {score.layer: score for score in scored.layers} if scored else {}
    best = min(outcomes, key=measure.loss)
    # With lam=0 every layer is the plain LM.
    tied = len(outcomes) > 1 and len({one.tuning_loss for one in outcomes}) == 1
    layers = tuple(_layer_result(one, best, measure, by_name.get(one.layer)) for one in outcomes)
    chosen = next((one for one in outcomes if choice and one.layer == choice.layer), None)
    return EvalResult(
        lm=measure.lm(),
        layers=layers,
        best=best.layer if math.isfinite(measure.loss(best)) and not tied else "",
        selected=chosen.layer if chosen else None,
        choice=choice,
        examined=scored.layers if scored else (),
        regret=regret(outcomes, chosen, parts) if chosen and len(outcomes) > 1 and not tied else None,
        correlations=correlations(layers, choice) if choice else (),
        tuning_tokens=int(parts.tuning_Q.sum()) if parts.fitted else 0,
        warnings=_impossible_tokens(outcomes, chosen),
    )


def _impossible_tokens(outcomes: Sequence[LayerOutcome], chosen: LayerOutcome | None) -> tuple[str, ...]:
    """Return a warning if lambda is 1 and some targets are not among the neighbours."""
    infinite = [one for one in outcomes if one.mix.lam == 1 and np.isinf(one.losses_Q).any()]
    if not infinite:
        return ()
    one = next((one for one in infinite if one is chosen), infinite[0])
    count, total = int(np.isinf(one.losses_Q).sum()), len(one.losses_Q)
    return (
        f"with `lam=1`, {count:,} of all {total:,} evaluated tokens have probability zero under the kNN "
        f"distribution of {one.layer}, which makes perplexity infinite; a `lam` below 1 mends it",
    )


class _Measure:
    """Turns losses on the reporting part into perplexities, per token, byte and word."""

    def __init__(self, queries: Queries) -> None:
        self.reporting_Q = reporting = queries.parts.reporting_Q
        self.lm_losses_Q = -queries.lm_Q[reporting]
        self._clusters_Q = clusters = queries.parts.clusters_Q[reporting]
        assert queries.sizes is not None
        sizes = queries.sizes[reporting]
        self._bytes, self._words = int(sizes.bytes_N.sum()), sizes.words(clusters)

    def loss(self, one: LayerOutcome) -> float:
        return float(np.mean(one.losses_Q[self.reporting_Q]))

    def lm(self) -> Perplexity:
        """The plain LM's, with its interval: that of a change from perplexity 1."""
        _, interval = self.change(self.lm_losses_Q, np.zeros_like(self.lm_losses_Q))
        found = self.perplexity(self.lm_losses_Q)
        return replace(found, interval=Interval(1 + interval.low, 1 + interval.high))

    def perplexity(self, losses_Q: Floats) -> Perplexity:
        total = float(losses_Q.sum())
        return Perplexity(
            perplexity=perplexity(losses_Q),
            bits_per_byte=total / math.log(2) / max(self._bytes, 1),
            word_perplexity=exp_or_inf(total / max(self._words, 1)),
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
        weights=weights_of(one.offsets, one.mix.temperature),
    )


def _by_query(one: LayerOutcome, measure: _Measure) -> ByQuery | None:
    if one.mix.gate is None or one.gated_losses_R is None:
        return None
    change, interval = measure.change(one.gated_losses_R, one.losses_Q[measure.reporting_Q])
    return ByQuery(perplexity(one.gated_losses_R), change, interval, **asdict(one.mix.gate))


def regret(outcomes: Sequence[LayerOutcome], chosen: LayerOutcome, parts: Parts) -> Regret | None:
    """Perplexity of the chosen layer over that of the best layer, minus 1; None if either is infinite.

    It is cross-fitted: the best layer is picked and fitted on one part and compared on the other, then the roles are
    swapped, and each token counts once. `against_hindsight` picks the best layer on the tokens that are compared, which
    flatters it by 1 to 2 % at 2,500 tokens. `value` is too low, as noise also decides a pick on half of the tokens.
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
    """Spearman correlation of each score with perplexity, over all layers and over the candidates."""
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

"""The result of a run in two sentences: the effect of retrieval on perplexity, and whether the choice was right."""

from __future__ import annotations

import math
from dataclasses import dataclass

from knnlm.report import numbers
from knnlm.results import EvalResult, Interval, LayerResult


@dataclass(frozen=True)
class Headline:
    """The parts of the first sentence, and the verdict on the choice."""

    layer: str
    verb: str
    """`lower`, `raise`, or `hardly change`."""
    before: str
    after: str
    change: str
    interval: str
    verdict: str
    tone: str
    """`good`, `open` (undecided) or `poor`."""
    reason: str
    disagreement: str


def make_headline(result: EvalResult) -> Headline | None:
    """The sentences about the shown layer; None if there are no layers."""
    shown = shown_layer(result)
    if shown is None:
        return None
    verdict, tone = _verdict(result, {layer.layer: layer for layer in result.layers})
    return Headline(
        layer=shown.layer,
        verb=_verb(shown),
        before=numbers.perplexity(result.lm.perplexity),
        after=numbers.perplexity(shown.perplexity),
        change=numbers.percent(shown.change, signed=True),
        interval=numbers.percent_interval(shown.interval),
        verdict=verdict,
        tone=tone,
        reason=_sentence(result.choice.reason if result.choice else None),
        disagreement=_sentence(result.choice.disagreement if result.choice else None),
    )


def shown_layer(result: EvalResult) -> LayerResult | None:
    """The chosen layer, else the best one, else the first."""
    layers = {layer.layer: layer for layer in result.layers}
    return layers.get(result.selected or "") or layers.get(result.best) or next(iter(result.layers), None)


def _sentence(text: str | None) -> str:
    """End a text with a full stop, which a reason may lack."""
    return f"{text.rstrip('.')}." if text else ""


def _verb(layer: LayerResult) -> str:
    if layer.interval.high < 0:
        return "lower"
    return "raise" if layer.interval.low > 0 or math.isinf(layer.perplexity) else "hardly change"


def _verdict(result: EvalResult, layers: dict[str, LayerResult]) -> tuple[str, str]:
    count, best = len(layers), layers.get(result.best)
    if count == 1:
        return "Only this layer was evaluated, so nothing says whether another would do better.", "open"
    if best is None:
        return f"None of {count} layers has a finite perplexity, so nothing says which is best.", "open"
    if result.selected not in layers:
        return f"No choice was made; of {count} layers, this one was the best.", "open"
    sentence, tone = _judgement(result, layers[result.selected], best, count)
    return f"{sentence}{_regret(result)}", tone


def _judgement(result: EvalResult, chosen: LayerResult, best: LayerResult, count: int) -> tuple[str, str]:
    if chosen.layer == best.layer:
        return f"The choice was right: of {count} layers, this one was also the best.", "good"
    rival = f"{best.layer}, the best layer, reaches {numbers.perplexity(best.perplexity)}."
    if _within_error(result, chosen):
        return f"The choice was right within the measurement’s error: {rival}", "good"
    return f"The choice was not the best: {rival}", "poor"


def _regret(result: EvalResult) -> str:
    if result.regret is None:
        return ""
    value, upper = (numbers.percent(end, signed=True) for end in (result.regret.value, result.regret.against_hindsight))
    return f" Regret {value}; against the best in hindsight {upper}."


def _within_error(result: EvalResult, chosen: LayerResult) -> bool:
    interval: Interval = result.regret.interval if result.regret else chosen.versus_best_interval
    return interval.low <= 0

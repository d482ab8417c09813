"""From scores to the layer that is indexed, with the reason in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from knnlm.config import LayerConfig
from knnlm.errors import InputError
from knnlm.layer_names import select_layers
from knnlm.results import Choice, Interval, LayerScore

SCORES_THAT_CHOOSE = ("dispersion", "probe")
# Candidates within this share of the most dispersed count as equally dispersed, and depth decides (docs/layers.md).
NEAR = 0.95


def candidate_layers(config: LayerConfig, looked_at: Sequence[str], all_layers: Sequence[str]) -> tuple[str, ...]:
    """The layers that may be chosen: those of the candidate set that were looked at.

    Where none of the set was looked at (`layers='2.attn_output'`), every layer looked at may be.
    """
    wanted = select_layers(config.candidates, all_layers)
    return tuple(name for name in looked_at if name in wanted) or tuple(looked_at)


def choose(
    scores: Sequence[LayerScore],
    config: LayerConfig,
    all_layers: Sequence[str],
    probe_difference: Callable[[str, str], Interval],
) -> Choice:
    """Take the named layer, the candidate with the highest probe, or by dispersion (`by_dispersion`).

    :param all_layers: the names of the model, of which the scores may be of a part.
    :param probe_difference: the interval of one layer's probe minus another's, paired (`LayerScorer.probe_difference`).
    :raises LayerError: a named layer or pattern that was not looked at.
    :raises InputError: the probe is to choose, and the text was too short for one.
    """
    names = [score.layer for score in scores]
    candidates = candidate_layers(config, names, all_layers)
    by_name = {score.layer: score for score in scores}
    if config.select not in SCORES_THAT_CHOOSE:
        layer = one_layer(config.select, names)
        return Choice(layer, "named", candidates, f"{layer} was named by the user")
    allowed = [by_name[name] for name in candidates]
    chosen = by_dispersion(allowed) if config.select == "dispersion" else by_probe(allowed)
    if chosen is None:
        raise InputError(
            "`select='probe'` compares two documents, or runs of 8,192 tokens, but the text has one; "
            "give more text, or take `select='dispersion'`"
        )
    reason = _reason(chosen, allowed, config.select)
    by_dispersion_alone = config.select == "dispersion"
    disagreement = _disagreement(chosen, scores, probe_difference) if by_dispersion_alone else None
    return Choice(chosen.layer, config.select, candidates, reason, disagreement)


def by_dispersion(candidates: Sequence[LayerScore]) -> LayerScore:
    """The deepest candidate whose dispersion comes within 5 % of the largest; candidates in the order of the network.

    Dispersion tells layers that have collapsed from those that have not. Between layers that are about equally
    dispersed it does not order perplexity, and depth does (docs/layers.md, with the cases that the 5 % were tried on).
    """
    enough = NEAR * max(score.dispersion for score in candidates)
    return [score for score in candidates if score.dispersion >= enough][-1]


def by_probe(candidates: Sequence[LayerScore]) -> LayerScore | None:
    """The candidate with the highest retrieval probe; None where the text gave no probe (NaN)."""
    probed = [score for score in candidates if not math.isnan(score.probe)]
    return max(probed, key=lambda score: score.probe, default=None)


def one_layer(name: str, names: Sequence[str], *, field: str = "select") -> str:
    """The one layer that a name or pattern, given as a field, fits.

    :raises LayerError: it fits none.
    :raises InputError: it fits several.
    """
    found = select_layers(name, names)
    if len(found) != 1:
        raise InputError(f"`{field}` {name!r} fits {len(found)} layers, but has to name one, such as {names[-1]}")
    return found[0]


def _reason(chosen: LayerScore, candidates: Sequence[LayerScore], select: str) -> str:
    count = len(candidates)
    if count == 1:
        return f"{chosen.layer} is the only candidate"
    if select == "probe":
        return f"{chosen.layer} has the highest retrieval probe ({chosen.probe:.4f}) of {count} candidates"
    leader = max(candidates, key=lambda score: score.dispersion)
    found = f"{chosen.dispersion:.4f}, 95 % interval {chosen.interval.low:.4f} to {chosen.interval.high:.4f}"
    if leader is chosen:
        return f"{chosen.layer} is the most dispersed ({found}) of {count} candidates"
    return (
        f"{chosen.layer} ({found}) is the deepest of {count} candidates whose dispersion comes within "
        f"{100 * (1 - NEAR):.0f} % of the largest, that of {leader.layer} ({leader.dispersion:.4f})"
    )


def _disagreement(
    chosen: LayerScore, looked_at: Sequence[LayerScore], probe_difference: Callable[[str, str], Interval]
) -> str | None:
    """A sentence where the probe puts another layer that was looked at, candidate or not, above the chosen one."""
    probed = by_probe(looked_at)
    if probed is None or probed is chosen:
        return None
    difference = probe_difference(probed.layer, chosen.layer)
    if difference.low <= 0:
        return None
    return (
        f"the scores disagree: the retrieval probe puts {probed.layer} ({probed.probe:.4f}) above the chosen "
        f"{chosen.layer} ({chosen.probe:.4f}), interval of the difference {difference.low:.4f} to "
        f"{difference.high:.4f}; `select={probed.layer!r}` takes it"
    )

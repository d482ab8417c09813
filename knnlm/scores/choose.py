"""The choice of the layer to index from its scores, with the reason in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from knnlm.config import LayerConfig
from knnlm.errors import InputError
from knnlm.layer_names import select_layers
from knnlm.results import Choice, Interval, LayerScore

SCORES_THAT_CHOOSE = ("dispersion", "probe")
# Candidates with at least this share of the largest dispersion count as equal, and depth decides (docs/layers.md).
NEAR = 0.95


def candidate_layers(config: LayerConfig, looked_at: Sequence[str], all_layers: Sequence[str]) -> tuple[str, ...]:
    """Return the layers that may be chosen: the examined ones of the candidate set.

    If none of the set was examined (`layers='2.attn_output'`), every examined layer is a candidate.
    """
    wanted = select_layers(config.candidates, all_layers)
    return tuple(name for name in looked_at if name in wanted) or tuple(looked_at)


def choose(
    scores: Sequence[LayerScore],
    config: LayerConfig,
    all_layers: Sequence[str],
    probe_difference: Callable[[str, str], Interval],
) -> Choice:
    """Choose the named layer, the candidate with the highest probe, or by dispersion (`by_dispersion`).

    The retrieval probe is the share of a key's nearest keys from other documents that have the same next token.

    :param all_layers: all layers of the model; `scores` may cover only some.
    :param probe_difference: paired interval of one layer's probe minus another's (`LayerScorer.probe_difference`).
    :raises LayerError: a named layer or pattern was not examined.
    :raises InputError: the probe is to choose, but the text is too short for it.
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
    """Return the deepest candidate whose dispersion is within 5 % of the largest; candidates in network order.

    Dispersion separates collapsed layers from others. Among about equally dispersed layers it does not predict
    perplexity, and depth does (docs/layers.md, with the cases on which the 5 % were tested).
    """
    enough = NEAR * max(score.dispersion for score in candidates)
    return [score for score in candidates if score.dispersion >= enough][-1]


def by_probe(candidates: Sequence[LayerScore]) -> LayerScore | None:
    """Return the candidate with the highest retrieval probe; None if all probes are NaN."""
    probed = [score for score in candidates if not math.isnan(score.probe)]
    return max(probed, key=lambda score: score.probe, default=None)


def one_layer(name: str, names: Sequence[str], *, field: str = "select") -> str:
    """Return the one layer that a name or pattern matches.

    :param field: the setting that holds the name, for errors.
    :raises LayerError: it matches none.
    :raises InputError: it matches several.
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
    """A sentence if the probe ranks any other examined layer, candidate or not, above the chosen one."""
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

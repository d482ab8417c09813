"""The choice of the layer to index from its scores, with the reason in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from knnlm.config import LayerConfig
from knnlm.errors import InputError
from knnlm.layer_names import loosely_split, select_layers
from knnlm.results import Choice, Interval, LayerScore, ScoreResult

SCORES_THAT_CHOOSE = ("auto", "dispersion", "probe", "pilot")
# Candidates with at least this share of the largest dispersion count as equal, and depth decides (docs/layers.md).
NEAR = 0.95


def candidate_layers(config: LayerConfig, looked_at: Sequence[str], all_layers: Sequence[str]) -> tuple[str, ...]:
    """Return the layers that may be chosen: the examined ones of the candidate set.

    If none of the set was examined (`layers='2.attn_output'`), every examined layer is a candidate.
    """
    wanted = select_layers(config.candidates, all_layers)
    return tuple(name for name in looked_at if name in wanted) or tuple(looked_at)


def layers_to_score(config: LayerConfig, all_layers: Sequence[str]) -> tuple[str, ...]:
    """Return the layers that `choose` looks at: the candidates and those of their kind in all blocks.

    If dispersion is to choose, these are all layers, as any of them may have a better pilot.
    """
    candidates = candidate_layers(config, all_layers, all_layers)
    if config.candidates != LayerConfig.candidates:
        return candidates
    return tuple(all_layers if config.select == "dispersion" else filter(_of_kind(candidates), all_layers))


def _of_kind(candidates: Sequence[str]) -> Callable[[str], bool]:
    """Whether a layer is the same part of its block as one of the candidates."""
    kinds = {loosely_split(name)[1] for name in candidates}
    return lambda name: loosely_split(name)[1] in kinds


# Of one layer's pilot relative to another's: the interval of the change of perplexity, among so many comparisons.
PilotChange = Callable[[str, str, int], Interval]


def choose(
    scores: Sequence[LayerScore], config: LayerConfig, all_layers: Sequence[str], pilot_change: PilotChange
) -> Choice:
    """Choose a layer: the named one, by pilots, the candidate with the best probe, or by dispersion.

    The retrieval probe is the share of a key's nearest keys from other documents that have the same next token, the
    pilot the perplexity of a small kNN-LM inside the sample. `auto` takes the deepest layer whose pilot cannot be told
    from the best one (`as_good_as_best`) among layers of the candidates' kind, in all blocks, and what dispersion
    proposes (`by_dispersion`) where pilots are unknown; docs/layers.md has the cases on which this was settled. Where
    `candidates` is not the default, only those compete.

    :param all_layers: all layers of the model; `scores` may cover only some.
    :param pilot_change: paired interval of one layer's pilot relative to another's (`LayerScorer.pilot_change`).
    :raises LayerError: a named layer or pattern was not examined.
    :raises InputError: probe or pilot is to choose, but the text is too short for it.
    """
    names = [score.layer for score in scores]
    candidates = candidate_layers(config, names, all_layers)
    if config.select not in SCORES_THAT_CHOOSE:
        layer = one_layer(config.select, names)
        return Choice(layer, "named", candidates, f"{layer} was named by the user")
    allowed = [score for score in scores if score.layer in candidates]
    # Whoever names candidates wants one of them.
    compared = scores if config.candidates == LayerConfig.candidates else allowed
    kind = _of_kind(candidates)
    alike = [score for score in compared if kind(score.layer)]
    if config.select == "auto" and (equals := as_good_as_best(alike, pilot_change)):
        reason = _pilot_reason(equals[-1], alike, by_dispersion(allowed))
        return Choice(equals[-1].layer, "auto", candidates, reason)
    chosen = _by_score(allowed, config.select)
    disagreement = _disagreement(chosen, compared, pilot_change) if config.select == "dispersion" else None
    return Choice(chosen.layer, config.select, candidates, _reason(chosen, allowed, config.select), disagreement)


def _by_score(candidates: Sequence[LayerScore], select: str) -> LayerScore:
    """:raises InputError: probe or pilot is to choose, but is unknown for all candidates."""
    by = {"probe": by_probe, "pilot": by_pilot}.get(select, by_dispersion)
    chosen = by(candidates)
    if chosen is None:
        raise InputError(
            f"`select={select!r}` compares documents, or runs of 8,192 tokens, but the text has too few; "
            "give more text, or take `select='dispersion'`"
        )
    return chosen


def by_dispersion(candidates: Sequence[LayerScore]) -> LayerScore:
    """Return the deepest candidate whose dispersion is within 5 % of the largest; candidates in network order.

    Dispersion separates collapsed layers from others. Among about equally dispersed layers it does not predict
    perplexity, and depth does (docs/layers.md, with the cases on which the 5 % were tested).
    """
    enough = NEAR * max(score.dispersion for score in candidates)
    return [score for score in candidates if score.dispersion >= enough][-1]


def by_pilot(candidates: Sequence[LayerScore]) -> LayerScore | None:
    """Return the candidate whose pilot has the lowest perplexity; None if all pilots are NaN."""
    known = [score for score in candidates if not math.isnan(score.pilot)]
    return min(known, key=lambda score: score.pilot, default=None)


def as_good_as_best(examined: Sequence[LayerScore], pilot_change: PilotChange) -> list[LayerScore]:
    """Return the layers whose pilot is not worse than the best one's beyond their paired interval; none if all are NaN.

    Pilots of 8,192 tokens differ by chance as much as trained layers do, and depth is the better guide among equals.
    """
    best = by_pilot(examined)
    if best is None:
        return []
    known = [score for score in examined if not math.isnan(score.pilot)]
    others = max(1, len(known) - 1)
    return [one for one in known if one is best or not pilot_change(one.layer, best.layer, others).low > 0]


def layers_that_matter(scored: ScoreResult, most: int) -> tuple[str, ...]:
    """Return the layers that are worth a full evaluation, at most `most`, in network order.

    They are the chosen one, the last `ffn_input`, what dispersion proposes, and then those with the best pilots, or
    without pilots the deepest candidates.
    """
    by_name = {one.layer: one for one in scored.layers}
    candidates = [by_name[name] for name in scored.choice.candidates]
    last = [name for name in by_name if name.endswith(".ffn_input")][-1:]
    ranked = sorted((one for one in scored.layers if not math.isnan(one.pilot)), key=lambda one: one.pilot)
    order = [scored.choice.layer, *last, by_dispersion(candidates).layer]
    order += [one.layer for one in (*ranked, *reversed(candidates))]
    wanted = tuple(dict.fromkeys(order))[:most]
    return tuple(name for name in by_name if name in wanted)


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
    if select == "pilot":
        return _pilot_reason(chosen, candidates, chosen)
    leader = max(candidates, key=lambda score: score.dispersion)
    found = f"{chosen.dispersion:.4f}, 95 % interval {chosen.interval.low:.4f} to {chosen.interval.high:.4f}"
    if leader is chosen:
        return f"{chosen.layer} is the most dispersed ({found}) of {count} candidates"
    return (
        f"{chosen.layer} ({found}) is the deepest of {count} candidates whose dispersion comes within "
        f"{100 * (1 - NEAR):.0f} % of the largest, that of {leader.layer} ({leader.dispersion:.4f})"
    )


def _pilot_reason(chosen: LayerScore, compared: Sequence[LayerScore], proposed: LayerScore) -> str:
    best = by_pilot(compared)
    assert best is not None
    count, found = len(compared), f"perplexity {chosen.pilot:.2f}"
    if count == 1:
        return f"{chosen.layer} is the only candidate"
    reason = f"{chosen.layer} has the best pilot ({found}) of {count} layers"
    if chosen is not best:
        reason = f"{chosen.layer} is the deepest of {count} layers whose pilot ({found}) cannot be told from the best, "
        reason += f"{best.layer} ({best.pilot:.2f})"
    return reason if proposed is chosen else f"{reason}; dispersion proposes {proposed.layer} ({proposed.pilot:.2f})"


def _disagreement(chosen: LayerScore, examined: Sequence[LayerScore], pilot_change: PilotChange) -> str | None:
    """What is told where layers have a better pilot than the chosen one, beyond their paired interval."""
    others = max(1, len(examined) - 1)
    rivals = [score for score in examined if score.pilot < chosen.pilot]
    better = by_pilot([score for score in rivals if pilot_change(score.layer, chosen.layer, others).high < 0])
    if better is None:
        return None
    change = pilot_change(better.layer, chosen.layer, others)
    return (
        f"the scores disagree: {better.layer} has a pilot (perplexity {better.pilot:.2f}) that is better by "
        f"{-change.high:.1%} to {-change.low:.1%} than that of {chosen.layer} ({chosen.pilot:.2f}); "
        f"`select={better.layer!r}` takes it"
    )

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
    """Return the layers that `choose` looks at.

    If dispersion is to choose, these are all layers, as any of them may have a better pilot.
    """
    candidates = candidate_layers(config, all_layers, all_layers)
    if config.candidates == LayerConfig.candidates and config.select == "dispersion":
        return tuple(all_layers)
    return tuple(filter(_compared(config, candidates, all_layers), all_layers))


def _compared(config: LayerConfig, candidates: Sequence[str], all_layers: Sequence[str]) -> Callable[[str], bool]:
    """Whether a layer is one of those whose pilots are compared by default.

    They are the layers of the candidates' kind in all blocks, and the first layer: the normed embedding has the best
    keys where a network has hardly learnt (docs/layers.md). Whoever names candidates wants one of them.
    """
    if config.candidates != LayerConfig.candidates:
        return set(candidates).__contains__
    kinds = {loosely_split(name)[1] for name in candidates}
    return lambda name: name == all_layers[0] or loosely_split(name)[1] in kinds


# Of one layer's pilot relative to another's: the interval of the change of perplexity, among so many comparisons.
PilotChange = Callable[[str, str, int], Interval]


def choose(
    scores: Sequence[LayerScore], config: LayerConfig, all_layers: Sequence[str], pilot_change: PilotChange
) -> Choice:
    """Choose a layer: the named one, by pilots, the candidate with the best probe, or by dispersion.

    The retrieval probe is the share of a key's nearest keys from other documents that have the same next token, the
    pilot the perplexity of a small kNN-LM inside the sample. `auto` takes the last layer of the candidates' kind unless
    another one's pilot is better beyond their interval (`better_pilot`), and what dispersion proposes (`by_dispersion`)
    where pilots are unknown; docs/layers.md has the cases on which this was settled. Where `candidates` is not the
    default, only those are compared.

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
    competes = _compared(config, candidates, all_layers)
    compared = [score for score in scores if competes(score.layer)]
    if config.select == "auto" and not math.isnan(compared[-1].pilot):
        last = compared[-1]
        chosen = better_pilot(last, compared, pilot_change) or last
        reason = _pilot_reason(chosen, last, compared, by_dispersion(allowed))
        return Choice(chosen.layer, "auto", candidates, reason)
    chosen = _by_score(allowed, config.select)
    rivals = scores if config.candidates == LayerConfig.candidates else allowed
    disagreement = _disagreement(chosen, rivals, pilot_change) if config.select == "dispersion" else None
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


def better_pilot(
    chosen: LayerScore, compared: Sequence[LayerScore], pilot_change: PilotChange, *, comparisons: int = 1
) -> LayerScore | None:
    """Return the best pilot among layers whose pilot is better than the chosen one's beyond their paired interval.

    The best pilot alone would be taken by chance: on trained models those of 8,192 tokens differ by less than noise.

    :param comparisons: number of intervals that hold simultaneously.
    """
    rivals = [score for score in compared if score.pilot < chosen.pilot]
    return by_pilot([score for score in rivals if pilot_change(score.layer, chosen.layer, comparisons).high < 0])


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
        return f"{chosen.layer} has the best pilot (perplexity {chosen.pilot:.2f}) of {count} candidates"
    leader = max(candidates, key=lambda score: score.dispersion)
    found = f"{chosen.dispersion:.4f}, 95 % interval {chosen.interval.low:.4f} to {chosen.interval.high:.4f}"
    if leader is chosen:
        return f"{chosen.layer} is the most dispersed ({found}) of {count} candidates"
    return (
        f"{chosen.layer} ({found}) is the deepest of {count} candidates whose dispersion comes within "
        f"{100 * (1 - NEAR):.0f} % of the largest, that of {leader.layer} ({leader.dispersion:.4f})"
    )


def _pilot_reason(chosen: LayerScore, last: LayerScore, compared: Sequence[LayerScore], proposed: LayerScore) -> str:
    best, found = by_pilot(compared) or last, f"perplexity {chosen.pilot:.2f}"
    if len(compared) == 1:
        return f"{chosen.layer} is the only candidate"
    if chosen is not last:
        usual = f"{last.layer} ({last.pilot:.2f})"
        reason = f"{chosen.layer} has a better pilot ({found}) than {usual}, beyond the interval"
    elif best is last:
        reason = f"{chosen.layer} has the best pilot ({found}) of {len(compared)} layers"
    else:
        reason = f"{chosen.layer} is the last of {len(compared)} layers, and no pilot is better than its own ({found}) "
        reason += f"beyond the interval; the best is that of {best.layer} ({best.pilot:.2f})"
    return reason if proposed is chosen else f"{reason}; dispersion proposes {proposed.layer} ({proposed.pilot:.2f})"


def _disagreement(chosen: LayerScore, examined: Sequence[LayerScore], pilot_change: PilotChange) -> str | None:
    """What is told where a layer has a better pilot than the chosen one, beyond an interval for all comparisons."""
    comparisons = max(1, len(examined) - 1)
    better = better_pilot(chosen, examined, pilot_change, comparisons=comparisons)
    if better is None:
        return None
    change = pilot_change(better.layer, chosen.layer, comparisons)
    return (
        f"the scores disagree: {better.layer} has a pilot (perplexity {better.pilot:.2f}) that is better by "
        f"{-change.high:.1%} to {-change.low:.1%} than that of {chosen.layer} ({chosen.pilot:.2f}); "
        f"`select={better.layer!r}` takes it"
    )

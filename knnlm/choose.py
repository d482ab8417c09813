"""From scores to the layer that is indexed, with the reason in words."""

from __future__ import annotations

from collections.abc import Sequence

from knnlm.config import LayerConfig
from knnlm.errors import InputError
from knnlm.layers import select_layers
from knnlm.results import Choice, LayerScore

SCORES_THAT_CHOOSE = ("dispersion", "probe")


def candidate_layers(config: LayerConfig, looked_at: Sequence[str], all_layers: Sequence[str]) -> tuple[str, ...]:
    """The layers that may be chosen: those of the candidate set that were looked at.

    Where none of the set was looked at (`--layers 2.attn_output`), every layer looked at may be.
    """
    wanted = select_layers(config.candidates, all_layers)
    return tuple(name for name in looked_at if name in wanted) or tuple(looked_at)


def choose(scores: Sequence[LayerScore], config: LayerConfig, all_layers: Sequence[str]) -> Choice:
    """Take the named layer, or the candidate with the highest dispersion or probe.

    `all_layers` are the names of the model, of which the scores may be of a part.

    :raises LayerError: a named layer or pattern that was not looked at.
    """
    names = [score.layer for score in scores]
    candidates = candidate_layers(config, names, all_layers)
    by_name = {score.layer: score for score in scores}
    if config.select not in SCORES_THAT_CHOOSE:
        layer = _one(config.select, names)
        return Choice(layer, "named", candidates, f"{layer} was named by the user")
    by_dispersion = max(candidates, key=lambda name: by_name[name].dispersion)
    by_probe = max(candidates, key=lambda name: by_name[name].probe)
    layer = by_dispersion if config.select == "dispersion" else by_probe
    return Choice(
        layer,
        config.select,
        candidates,
        _reason(by_name[layer], config.select, len(candidates)),
        _disagreement(by_name[by_dispersion], by_name[by_probe], config.select),
    )


def _one(name: str, names: Sequence[str]) -> str:
    found = select_layers(name, names)
    if len(found) != 1:
        raise InputError(f"--select {name!r} fits {len(found)} layers, but has to name one, such as {names[-1]}")
    return found[0]


def _reason(score: LayerScore, select: str, count: int) -> str:
    if select == "probe":
        return f"{score.layer} has the highest retrieval probe ({score.probe:.4f}) of {count} candidates"
    return (
        f"{score.layer} is the most dispersed ({score.dispersion:.4f}, 95 % interval {score.interval.low:.4f} to "
        f"{score.interval.high:.4f}) of {count} candidates"
    )


def _disagreement(dispersed: LayerScore, probed: LayerScore, select: str) -> str | None:
    """A sentence where the probe ranks another layer first and their probe intervals do not overlap."""
    if dispersed.layer == probed.layer or not probed.probe_interval.low > dispersed.probe_interval.high:
        return None
    other = "probe" if select == "dispersion" else "dispersion"
    return (
        f"the scores disagree: dispersion takes {dispersed.layer} (probe {dispersed.probe:.4f}), the retrieval probe "
        f"takes {probed.layer} (probe {probed.probe:.4f}); --select {other} takes the other"
    )

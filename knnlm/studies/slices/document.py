"""JSON document of `knnlm slices`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knnlm.documents import plain
from knnlm.layer_names import split
from knnlm.statistics import correlation_fields
from knnlm.studies.slices.measure import OURS, LayerSlices, SetSlices, SlicesResult
from knnlm.studies.slices.statistics import Estimate

FORMAT, VERSION = "knnlm-slices", 1


def slices_document(
    result: SlicesResult, *, model: str, settings: Mapping[str, object], versions: Mapping[str, str]
) -> dict[str, Any]:
    """Return all sets under `sets`, the hardest first, and the fields of the set given first also at the top level.

    A set's own slices, AUC and dispersion are those of its deepest layer. NaN becomes null, an interval `[low, high]`;
    fields that need labels are null without them.
    """
    document: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "version": VERSION,
            "model": model,
            **_set(result.first),
            "sets": [_set(one) for one in result.sets],
            "set_correlation": correlation_fields(result.set_correlation) if result.set_correlation else None,
            "protocol": {"ours": OURS},
            "settings": settings,
            "versions": versions,
        }
    )
    return document


def _set(one: SetSlices) -> dict[str, Any]:
    layers = [_layer(layer) for layer in one.layers]
    return {
        "set": one.name,
        "items": one.items,
        **_estimate("accuracy", one.accuracy),
        **_estimate("accuracy_normalized", one.accuracy_normalized),
        "chance": one.chance,
        **_estimate("confidence_auc", one.confidence_auc),
        **_estimate("length_auc", one.length_auc),
        **layers[-1],
        "layers": layers,
        "notes": one.notes,
    }


def _layer(one: LayerSlices) -> dict[str, Any]:
    block, part = split(one.layer)
    curve = one.curve
    return {
        "layer": one.layer,
        "block": block,
        "part": part,
        **_estimate("within", one.within),
        "between": one.between,
        "slice_size": curve.size if curve else None,
        "draws": curve.draws if curve else None,
        "slices": [
            {
                "accuracy": each.accuracy,
                "dispersion": each.dispersion,
                "interval": each.interval,
            }
            for each in (curve.slices if curve else ())
        ],
        "slice_correlation": correlation_fields(curve.correlation) if curve else None,
        **_estimate("right_minus_wrong", one.right_minus_wrong),
        "item_correlation": correlation_fields(one.item_correlation) if one.item_correlation else None,
        **_estimate("tail_auc", one.tail_auc),
    }


def _estimate(name: str, estimate: Estimate | None) -> dict[str, Any]:
    return {name: estimate and estimate.value, f"{name}_interval": estimate and estimate.interval}

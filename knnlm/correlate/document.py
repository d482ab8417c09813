"""Studies of dispersion and perplexity as the plain values of strict JSON: what `knnlm correlate --json` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from knnlm.correlate.study import OURS, RELEASED, LayerClusters, LayerCorrelation, Study
from knnlm.correlation import CorrelationEstimate
from knnlm.layers import split

FORMAT, VERSION = "knnlm-correlate", 1


def correlate_document(
    studies: Sequence[Study], *, settings: Mapping[str, object], versions: Mapping[str, str]
) -> dict[str, Any]:
    """The first study's fields, and the others under `others`. NaN becomes null, an interval `[low, high]`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        **_study(studies[0]),
        "others": [_study(study) for study in studies[1:]],
        "protocol": {"released": list(RELEASED), "ours": list(OURS)},
        "settings": dict(settings),
        "versions": dict(versions),
    }


def _study(study: Study) -> dict[str, Any]:
    layers = [_layer(one) for one in study.layers]
    by_final_token = [{"layer": row["layer"], **row["final_token"]} for row in layers]
    return {
        "model": study.model,
        "score": study.score,
        "context": study.context,
        "segments": study.segments,
        "documents": study.documents,
        "text_clusters": study.text_clusters,
        "perplexity": study.perplexity,
        "group_size": study.group_size,
        "groups": study.groups,
        "layers": layers,
        "final_token": {"segments": study.segments, "layers": by_final_token},
        "clusters": [_clusters(one) for one in study.clusters],
        "scatter": {
            "layer": study.scatter.layer,
            "segments": [list(point) for point in study.scatter.segments],
            "groups": [list(point) for point in study.scatter.groups],
        },
        "notes": list(study.notes),
    }


def _layer(one: LayerCorrelation) -> dict[str, Any]:
    block, part = split(one.layer)
    return {
        "layer": one.layer,
        "block": block,
        "part": part,
        "depth": one.depth,
        "within": one.within,
        "score": one.score,
        "ungrouped": correlation_fields(one.ungrouped),
        "grouped": correlation_fields(one.grouped),
        "across": {"grouped": correlation_fields(one.across)},
        "final_token": {
            "ungrouped": correlation_fields(one.final_ungrouped),
            "grouped": correlation_fields(one.final_grouped),
        },
    }


def correlation_fields(estimate: CorrelationEstimate) -> dict[str, Any]:
    """A correlation; `interval` is Pearson's. NaN becomes null."""
    return {
        "pearson": _number(estimate.pearson),
        "spearman": _number(estimate.spearman),
        "interval": [estimate.pearson_interval.low, estimate.pearson_interval.high],
        "spearman_interval": [estimate.spearman_interval.low, estimate.spearman_interval.high],
        "count": estimate.count,
    }


def _clusters(one: LayerClusters) -> dict[str, Any]:
    return {
        "layer": one.layer,
        "depth": one.depth,
        "kind": one.kind,
        "within": _number(one.distances.within),
        "between": _number(one.distances.between),
        "clusters": one.distances.clusters,
        "contexts": one.distances.contexts,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value

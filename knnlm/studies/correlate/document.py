"""JSON document of `knnlm correlate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from knnlm.documents import plain
from knnlm.layer_names import split
from knnlm.statistics import correlation_fields
from knnlm.studies.correlate.study import OURS, RELEASED, LayerClusters, LayerCorrelation, Study

FORMAT, VERSION = "knnlm-correlate", 1


def correlate_document(
    studies: Sequence[Study], *, settings: Mapping[str, object], versions: Mapping[str, str]
) -> dict[str, Any]:
    """Return the first study's fields, with the other studies under `others`.

    NaN becomes null, an interval `[low, high]`.
    """
    document: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "version": VERSION,
            **_study(studies[0]),
            "others": [_study(study) for study in studies[1:]],
            "protocol": {"released": RELEASED, "ours": OURS},
            "settings": settings,
            "versions": versions,
        }
    )
    return document


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
            "segments": study.scatter.segments,
            "groups": study.scatter.groups,
        },
        "notes": study.notes,
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


def _clusters(one: LayerClusters) -> dict[str, Any]:
    return {
        "layer": one.layer,
        "depth": one.depth,
        "kind": one.kind,
        "within": one.distances.within,
        "between": one.distances.between,
        "clusters": one.distances.clusters,
        "contexts": one.distances.contexts,
    }

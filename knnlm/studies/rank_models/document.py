"""JSON document of `knnlm rank-models`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from knnlm.documents import plain
from knnlm.studies.rank_models.ranking import OURS, RELEASED, Ranking

FORMAT, VERSION = "knnlm-rank-models", 1
_CORRELATION = ("spearman", "spearman_interval", "pearson", "pearson_interval")


def ranking_document(
    ranking: Ranking, *, settings: Mapping[str, object], versions: Mapping[str, str]
) -> dict[str, Any]:
    """Return the document, models in ranked order. Fields that need measured figures are null without them.

    An interval becomes `[low, high]`.
    """
    found = ranking.correlation
    known = found is not None and math.isfinite(found.spearman)
    document: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "version": VERSION,
            "models": ranking.models,
            **{name: getattr(found, name) if known else None for name in _CORRELATION},
            "regret": ranking.regret,
            "higher_is_better": ranking.higher_is_better,
            "notes": ranking.notes,
            "tokens": ranking.tokens,
            "protocol": {"released": RELEASED, "ours": OURS},
            "settings": settings,
            "versions": versions,
        }
    )
    return document

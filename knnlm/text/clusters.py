"""Pieces of a text that tell on their own: its documents, or runs of tokens where documents are few."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from knnlm.statistics import effective_number
from knnlm.text.segments import Segment

# Tokens of one document depend on one another; runs of this many are taken as independent of the next run.
CLUSTER_TOKENS = 8192
# Documents are tuning or reporting as a whole where they tell as much as this many of one size. None then has over
# 1 / sqrt(8) = 35 % of the tokens, so that the lighter part has 32 % at least.
ENOUGH_CLUSTERS = 8


def text_clusters(segments: Sequence[Segment]) -> NDArray[np.int64]:
    """Of each segment, [S], the piece of text that it depends on: its document, or its run where documents are few.

    Few as in `split_parts`: they tell less than 8 of one size.
    """
    documents_S = np.array([segment.document for segment in segments])
    if effective_number(np.unique(documents_S, return_counts=True)[1]) >= ENOUGH_CLUSTERS:
        return documents_S
    runs_S = np.array([segment.start // CLUSTER_TOKENS for segment in segments])
    return np.unique(np.stack([documents_S, runs_S]), axis=1, return_inverse=True)[1].reshape(-1)

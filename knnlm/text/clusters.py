"""Clusters of a text, taken as independent: its documents, or runs of tokens where documents are few."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from knnlm.statistics import effective_number
from knnlm.text.segments import Segment

# Tokens of one document are dependent; runs of this many are taken as independent of one another.
CLUSTER_TOKENS = 8192
# From this effective number of documents on, whole documents are clusters, and go to the tuning or the reporting part
# (half of an evaluation text each). None then has over 1 / sqrt(8) = 35 % of the tokens, so that the lighter part has
# at least 32 %.
ENOUGH_CLUSTERS = 8


def text_clusters(segments: Sequence[Segment]) -> NDArray[np.int64]:
    """Return the cluster of each segment, [S]: its document, or its run of tokens where documents are few.

    Few, as in `split_parts`, is an effective number below 8.
    """
    documents_S = np.array([segment.document for segment in segments])
    if effective_number(np.unique(documents_S, return_counts=True)[1]) >= ENOUGH_CLUSTERS:
        return documents_S
    runs_S = np.array([segment.start // CLUSTER_TOKENS for segment in segments])
    return np.unique(np.stack([documents_S, runs_S]), axis=1, return_inverse=True)[1].reshape(-1)

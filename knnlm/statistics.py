"""Rank correlation and the paired bootstrap: what the result tables are judged with.

Legend: Q tokens, C clusters (documents or runs of windows), R bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from knnlm.results import Interval

Floats = NDArray[np.float64]


def ranks(values: Sequence[float]) -> Floats:
    """Ranks from 1, ties sharing their mean rank."""
    array = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return np.asarray((last - (counts - 1) / 2)[inverse])


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where one side is constant or there are fewer than three pairs."""
    x, y = ranks(a), ranks(b)
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


class PairedBootstrap:
    """Resamples whole clusters, the same ones for every comparison, so that differences are paired."""

    def __init__(self, clusters_Q: NDArray[np.int64], *, replicates: int, seed: int) -> None:
        _, self._cluster_of_Q, sizes_C = np.unique(clusters_Q, return_inverse=True, return_counts=True)
        count = len(sizes_C)
        self._sizes_C = sizes_C.astype(np.float64)
        draws_RC = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=replicates)
        self._weights_RC = draws_RC.astype(np.float64)

    def relative_change(self, losses_Q: Floats, base_Q: Floats) -> Interval:
        """95 % interval of exp(mean loss - mean base loss) - 1: the relative change of perplexity."""
        sums_C = np.bincount(self._cluster_of_Q, weights=losses_Q - base_Q, minlength=len(self._sizes_C))
        means_R = (self._weights_RC @ sums_C) / (self._weights_RC @ self._sizes_C)
        low, high = np.expm1(np.quantile(means_R, [0.025, 0.975]))
        return Interval(float(low), float(high))

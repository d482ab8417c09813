"""Rank correlation, the jackknife and the paired bootstrap: what the result tables are judged with.

Legend: Q tokens, C clusters (documents or runs of windows), G groups of clusters, R bootstrap replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from knnlm.results import Interval

Floats = NDArray[np.float64]

_T_975 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}
_Z_975 = 1.959964


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


def jackknife_interval(value: float, without_G: Floats, *, bounds: tuple[float, float]) -> Interval:
    """95 % interval of `value` from the estimates `without_G` that leave out one of G groups each.

    The groups are the sampling units, whatever their sizes (the delete-one-cluster jackknife of survey sampling, Wolter
    2007, chapter 4), with Student's t at G - 1 degrees of freedom. It is centred on the bias-corrected estimate: pairs
    inside a cluster are nearer than others, which biases a pooled mean by about 1/G. It always holds `value` and stays
    within `bounds`, the range that the value can take; fewer than two groups, or NaN among the estimates, say nothing
    and give the whole range.
    """
    low, high = bounds
    groups = len(without_G)
    if groups < 2 or not np.isfinite(without_G).all():
        return Interval(low, high)
    mean = float(without_G.mean())
    error = math.sqrt((groups - 1) / groups * float(((without_G - mean) ** 2).sum()))
    centre, reach = groups * value - (groups - 1) * mean, t_quantile(groups - 1) * error
    return Interval(max(low, min(value, centre - reach)), min(high, max(value, centre + reach)))


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, right to 0.2 % (Cornish-Fisher: Abramowitz & Stegun 26.7.5)."""
    if freedom in _T_975:
        return _T_975[freedom]
    z, inverse = _Z_975, 1 / freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + inverse * (first + inverse * (second + inverse * third))


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

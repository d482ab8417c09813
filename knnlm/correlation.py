"""Pearson's and Spearman's correlation of two lists of figures, each with an interval that few pairs do not flatter.

Legend: N pairs, G groups of pairs that are left out together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knnlm.dispersion import GROUPS
from knnlm.errors import InputError
from knnlm.results import Interval
from knnlm.statistics import pearson, spearman, t_quantile

Floats = NDArray[np.float64]

_Z_975 = 1.959964
# Fisher's z is infinite at 1; this is 10.7.
_ALMOST_ONE = 1 - 1e-9


@dataclass(frozen=True)
class CorrelationEstimate:
    """Both correlations of the same pairs; NaN and -1 to 1 where a side is constant or there are fewer than three."""

    pearson: float
    spearman: float
    pearson_interval: Interval
    spearman_interval: Interval
    count: int
    """Number of pairs."""


def correlation_fields(estimate: CorrelationEstimate) -> dict[str, Any]:
    """As the documents of all verbs write it; `interval` is Pearson's."""
    return {
        "pearson": estimate.pearson,
        "spearman": estimate.spearman,
        "interval": estimate.pearson_interval,
        "spearman_interval": estimate.spearman_interval,
        "count": estimate.count,
    }


def correlate(x: ArrayLike, y: ArrayLike, *, clusters: Sequence[int] | None = None) -> CorrelationEstimate:
    """Correlate `x` with `y`; `clusters` numbers what each pair belongs to where pairs depend on one another.

    The intervals are a jackknife over clusters (over pairs without them) on Fisher's z scale with Student's t, never
    narrower than that of as many independent normal pairs (for Spearman: Bonett & Wright 2000). In simulations with 8
    to 64 pairs, light and heavy tails, they covered 92 to 99 %; a bootstrap's percentiles covered 66 to 94 % of
    Pearson's at 8. Pearson's alone is not to be trusted near 1 with skewed figures (79 % with exponentials of normals
    correlated at 0.95): Spearman's is.
    :raises InputError: lists of different lengths, or NaN or infinity among them.
    """
    x_N, y_N = np.asarray(x, np.float64), np.asarray(y, np.float64)
    group_N = np.arange(x_N.size) if clusters is None else np.asarray(clusters)
    _check(x_N, y_N, group_N)
    # At most GROUPS estimates, whatever the number of clusters.
    group_N = np.unique(group_N, return_inverse=True)[1] % GROUPS
    count = len(x_N)
    linear, by_rank = pearson(x_N, y_N), spearman(x_N, y_N)
    # The next that ranks can give below 1, by one swap of neighbours: what a perfect order may be by luck.
    one_swap = 1 - 12 / (count**3 - count) if count > 2 else 0.0
    return CorrelationEstimate(
        pearson=linear,
        spearman=by_rank,
        pearson_interval=_interval(linear, _without(pearson, x_N, y_N, group_N), count, 1.0, _ALMOST_ONE),
        spearman_interval=_interval(
            by_rank, _without(spearman, x_N, y_N, group_N), count, 1 + by_rank**2 / 2, one_swap
        ),
        count=count,
    )


def _check(x_N: Floats, y_N: Floats, group_N: NDArray[np.generic]) -> None:
    if x_N.ndim != 1 or not x_N.shape == y_N.shape == group_N.shape:
        raise InputError(
            f"a correlation needs lists of one length, got shapes {x_N.shape} and {y_N.shape}, clusters {group_N.shape}"
        )
    if not (np.isfinite(x_N).all() and np.isfinite(y_N).all()):
        raise InputError("a correlation needs finite figures, got NaN or infinity; leave those pairs out")


def _without(
    estimate: Callable[[ArrayLike, ArrayLike], float], x_N: Floats, y_N: Floats, group_N: NDArray[np.intp]
) -> Floats:
    """The estimates that leave out one group each, [G]."""
    kept = [group_N != group for group in np.unique(group_N)]
    return np.array([estimate(x_N[keep_N], y_N[keep_N]) for keep_N in kept])


def _interval(value: float, without_G: Floats, count: int, variance: float, limit: float) -> Interval:
    """95 %, from leave-out estimates on the scale of z = atanh, where |values| above `limit` count as `limit`.

    `variance` is that of z of `count` independent normal pairs, times (count - 3).
    """
    groups = len(without_G)
    if groups < 2 or count < 4 or not np.isfinite([value, *without_G]).all():
        return Interval(-1.0, 1.0)
    z, z_G = np.arctanh(np.clip(value, -limit, limit)), np.arctanh(np.clip(without_G, -limit, limit))
    error = math.sqrt((groups - 1) / groups * float(((z_G - z_G.mean()) ** 2).sum()))
    reach = max(t_quantile(groups - 1) * error, _Z_975 * math.sqrt(variance / (count - 3)))
    return Interval(min(value, math.tanh(z - reach)), max(value, math.tanh(z + reach)))

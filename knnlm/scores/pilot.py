"""A layer's pilot, a small kNN-LM inside a sample of text, and how two layers' pilots compare.

`knnlm.evaluation.piloting` measures it; this room knows neither models nor mixtures.

Legend: Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from knnlm.results import Interval
from knnlm.scores.dispersion import Float64
from knnlm.scores.sample import Int64
from knnlm.scores.sample_search import SampleSearch
from knnlm.statistics import relative_change


@dataclass(frozen=True, eq=False)
class Pilot:
    """The small kNN-LM of one layer."""

    perplexity: float
    """On the sample's queries; NaN where the sample is too small to fit settings and measure."""
    losses_Q: Float64
    """-log p of each query's next token under settings that were fitted on other clusters; empty if unknown."""
    cluster_Q: Int64
    """The queries' clusters; the same for all layers of a sample."""


# Measures the pilot of one layer from its search.
MeasurePilot = Callable[[SampleSearch], Pilot]


def no_pilot(search: SampleSearch) -> Pilot:
    """Return an unknown pilot: for vectors without a language model."""
    return Pilot(math.nan, search.distances_QK[:0, 0].astype(float), search.cluster_Q[:0])


def pilot_change(one: Pilot, other: Pilot, *, comparisons: int = 1) -> Interval:
    """Return the 95 % interval of the perplexity of one layer's pilot relative to another's, minus 1.

    Paired query by query, by a jackknife over clusters, given the keys. NaN where a pilot is unknown.

    :param comparisons: number of intervals that hold simultaneously (Bonferroni).
    """
    if not (len(one.losses_Q) and len(other.losses_Q)):
        return Interval(math.nan, math.nan)
    return relative_change(one.losses_Q, other.losses_Q, one.cluster_Q, comparisons=comparisons)[1]

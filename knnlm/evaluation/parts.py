"""The two parts of an evaluation text, and the clusters that the jackknife intervals leave out.

k, temperature and lambda are fitted on the tuning part; perplexity is reported on the reporting part.

Legend: Q query tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knnlm.statistics import effective_number
from knnlm.text.clusters import ENOUGH_CLUSTERS

# Runs of tokens that serve as clusters where documents are too few.
RUNS = 24
# Share of a run's tokens dropped at its start: their context is in the previous run, which may be in the other part.
GAP = 1 / 8


@dataclass(frozen=True)
class Parts:
    """Which query tokens tune, which report, and the document or run of each."""

    tuning_Q: NDArray[np.bool_]
    fitting_Q: NDArray[np.bool_]
    """The other part, which is fitted on when the roles are swapped."""
    reporting_Q: NDArray[np.bool_]
    """The tokens that the table reports: the other part, or the whole text if nothing is fitted."""
    clusters_Q: NDArray[np.int64]
    fitted: bool


def split_parts(documents_Q: NDArray[np.int64], *, fitted: bool = True) -> Parts:
    """Halve the text: by whole documents if there are enough, else by runs of tokens with gaps between them.

    :param documents_Q: the document of each query token; at least one token.
    """
    clusters_Q, kept_Q = documents_Q, np.ones(len(documents_Q), np.bool_)
    if effective_number(np.unique(documents_Q, return_counts=True)[1]) < ENOUGH_CLUSTERS:
        clusters_Q, kept_Q = _runs(documents_Q)
    tuning_Q = np.isin(clusters_Q, _lighter_half(clusters_Q[kept_Q])) & kept_Q
    fitting_Q = ~tuning_Q & kept_Q
    reporting_Q = fitting_Q if fitted else np.ones(len(documents_Q), np.bool_)
    return Parts(tuning_Q, fitting_Q, reporting_Q, clusters_Q, fitted)


def _runs(documents_Q: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """About `RUNS` runs of equal length, none across a document boundary, and which tokens are kept.

    The start of a run is dropped, except at the start of a document, which has no context before it.
    """
    length = max(len(documents_Q) // RUNS, 8)
    starts = np.flatnonzero(np.diff(documents_Q, prepend=documents_Q[0] - 1))
    position_Q = np.arange(len(documents_Q)) - np.repeat(starts, np.diff([*starts, len(documents_Q)]))
    changes_Q = np.diff(documents_Q * len(documents_Q) + position_Q // length, prepend=-1) != 0
    return changes_Q.cumsum() - 1, (position_Q < length) | (position_Q % length >= int(length * GAP))


def _lighter_half(clusters_Q: NDArray[np.int64]) -> NDArray[np.int64]:
    """Clusters with about half of the tokens: the largest first, each to the lighter side."""
    names, sizes = np.unique(clusters_Q, return_counts=True)
    sides: tuple[list[int], list[int]] = ([], [])
    weights = [0, 0]
    for place in np.argsort(-sizes, kind="stable"):
        side = int(weights[1] < weights[0])
        sides[side].append(int(names[place]))
        weights[side] += int(sizes[place])
    return np.array(sides[0], np.int64)

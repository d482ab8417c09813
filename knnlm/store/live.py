"""Which stored rows count: all but those of removed documents. What reads a datastore sees only these, numbered anew.

Legend: N rows, R runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class LiveRows:
    """Live rows as ascending runs of stored ones."""

    def __init__(self, runs_R2: Ids) -> None:
        """:param runs_R2: first stored row of each run, and the row after its last, [R, 2]."""
        self._runs_R2 = runs_R2[runs_R2[:, 0] < runs_R2[:, 1]].reshape(-1, 2)
        self._ends_R = np.cumsum(self._runs_R2[:, 1] - self._runs_R2[:, 0])
        # What makes a stored row of a live one.
        self._shift_R = self._runs_R2[:, 1] - self._ends_R

    def __len__(self) -> int:
        return int(self._ends_R[-1]) if len(self._ends_R) else 0

    def stored(self, ids_N: Ids) -> Ids:
        """Return the stored rows of live ones."""
        shifted: Ids = ids_N + self._shift_R[np.searchsorted(self._ends_R, ids_N, side="right")]
        return shifted

    def live(self, rows_N: Ids) -> Ids:
        """Return how many live rows come before each stored one: its number, if it is live."""
        run_N = np.searchsorted(self._runs_R2[:, 1], rows_N, side="right")
        before_R = np.concatenate([[0], self._ends_R])
        firsts_R = np.append(self._runs_R2[:, 0], np.iinfo(np.int64).max)
        counted: Ids = before_R[run_N] + np.maximum(rows_N - firsts_R[run_N], 0)
        return counted

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Stored rows (first, after the last) of live rows start to stop."""
        number = int(np.searchsorted(self._ends_R, start, side="right"))
        while start < stop:
            shift, last = int(self._shift_R[number]), min(stop, int(self._ends_R[number]))
            yield start + shift, last + shift
            start, number = last, number + 1

    def pick(self, rows_N: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        """Return the live ones of an array over all stored rows, as the pieces that follow one another."""
        return [rows_N[:0], *(rows_N[first:last] for first, last in self._runs_R2.tolist())]


def kept_runs(removed: Iterable[tuple[int, int]], count: int) -> Iterator[tuple[int, int]]:
    """The runs of 0 to count that are not removed; removed runs ascend."""
    edges = [0, *(edge for run in removed for edge in run), count]
    yield from (run for run in list(pairwise(edges))[::2] if run[0] < run[1])

"""Make an approximate index look as far as a recall asks for, and no farther."""

from __future__ import annotations

from index.approximate import ApproximateIndex
from index.recall import Trial, run_trial

# A doubling that brings less than this has reached what it can bring, and the other dial is turned.
PLATEAU = 0.002
# More candidates than this many times the spec's own: brute force would be cheaper.
MAX_WIDENING = 16


def tune(index: ApproximateIndex, trial: Trial, target: float) -> float:
    """Double `nprobe` or `efSearch`, and where that brings nothing `overfetch`, until recall@k reaches the target.

    :returns: the recall reached on the trial's queries, which is below the target where no dial helps.
    """
    dials = [dial for dial in (_Effort(index), _Overfetch(index)) if not dial.is_spent]
    recall, turned = run_trial(index, trial).recall, False
    while recall < target and dials:
        before, recall = recall, dials[0].turn(trial)
        turned = True
        dials = [dial for dial in dials if not dial.is_spent]
        if recall - before < PLATEAU and len(dials) > 1:
            dials.reverse()
    return _narrowed(index, trial, target, recall) if turned and recall >= target else recall


class _Effort:
    def __init__(self, index: ApproximateIndex) -> None:
        self._index = index

    @property
    def is_spent(self) -> bool:
        effort = self._index.effort
        return effort is None or effort.value >= effort.limit

    def turn(self, trial: Trial) -> float:
        if (effort := self._index.effort) is not None:
            self._index.set_effort(min(effort.limit, 2 * effort.value))
        return run_trial(self._index, trial).recall


class _Overfetch:
    def __init__(self, index: ApproximateIndex) -> None:
        self._index, self._limit = index, MAX_WIDENING * index.overfetch

    @property
    def is_spent(self) -> bool:
        return self._index.overfetch >= self._limit

    def turn(self, trial: Trial) -> float:
        self._index.overfetch *= 2
        return run_trial(self._index, trial).recall


def _narrowed(index: ApproximateIndex, trial: Trial, target: float, recall: float) -> float:
    """Two halvings between the effort that failed and the one that reached the target."""
    if (effort := index.effort) is None or effort.value < 4:
        return recall
    low, high = effort.value // 2, effort.value
    for _ in range(2):
        index.set_effort(middle := (low + high) // 2)
        if (reached := run_trial(index, trial).recall) >= target:
            high, recall = middle, reached
        else:
            low = middle
    index.set_effort(high)
    return recall

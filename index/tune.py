"""Tuning of an approximate index: the least search effort that reaches a recall."""

from __future__ import annotations

from abc import ABC, abstractmethod

from index.approximate import ApproximateIndex
from index.recall import Trial, run_trial

# If a doubling raises recall by less than this, the other parameter is doubled instead.
PLATEAU = 0.002
# With more candidates than this many times the spec's own, brute force would be cheaper.
MAX_WIDENING = 16
# Halvings of the gap between a value that failed and one that sufficed.
HALVINGS = 2


def tune(index: ApproximateIndex, trial: Trial, target: float) -> float:
    """Double `nprobe` or `efSearch`, and if that does not help `overfetch`, until recall@k reaches the target.

    Then the doubled parameters are reduced by up to a half, in quarters, as far as the target allows: `overfetch`
    first, as candidates cost most.
    :returns: the recall on the trial's queries, below the target if no parameter helps.
    """
    effort, overfetch = _Effort(index), _Overfetch(index)
    dials: list[_Dial] = [dial for dial in (effort, overfetch) if not dial.is_spent]
    recall, turned = run_trial(index, trial).recall, set[_Dial]()
    while recall < target and dials:
        turned.add(dials[0])
        dials[0].double()
        before, recall = recall, run_trial(index, trial).recall
        dials = [dial for dial in dials if not dial.is_spent]
        if recall - before < PLATEAU and len(dials) > 1:
            dials.reverse()
    if recall < target:
        return recall
    for dial in (overfetch, effort):
        if dial in turned:
            recall = _taken_back(dial, trial, target, recall)
    return recall


class _Dial(ABC):
    """A parameter that increases an index's search effort."""

    def __init__(self, index: ApproximateIndex) -> None:
        self.index = index

    @property
    @abstractmethod
    def value(self) -> float: ...

    @abstractmethod
    def set(self, value: float) -> None: ...

    @property
    @abstractmethod
    def limit(self) -> float: ...

    @property
    def is_spent(self) -> bool:
        return self.value >= self.limit

    def double(self) -> None:
        self.set(min(self.limit, 2 * self.value))


class _Effort(_Dial):
    @property
    def value(self) -> float:
        return self.index.effort.value if self.index.effort else 0

    def set(self, value: float) -> None:
        self.index.set_effort(int(value))

    @property
    def limit(self) -> float:
        return self.index.effort.limit if self.index.effort else 0


class _Overfetch(_Dial):
    def __init__(self, index: ApproximateIndex) -> None:
        super().__init__(index)
        self._limit = MAX_WIDENING * index.overfetch

    @property
    def value(self) -> float:
        return self.index.overfetch

    def set(self, value: float) -> None:
        self.index.overfetch = value

    @property
    def limit(self) -> float:
        return self._limit


def _taken_back(dial: _Dial, trial: Trial, target: float, recall: float) -> float:
    """Reduce a value that reached the target, by bisection down to its half, and return the recall then reached."""
    low, high = dial.value / 2, dial.value
    for _ in range(HALVINGS):
        dial.set((low + high) / 2)
        if (reached := run_trial(dial.index, trial).recall) >= target:
            high, recall = dial.value, reached
        else:
            low = dial.value
    dial.set(high)
    return recall

"""Make an approximate index look as far as a recall asks for, and hardly farther."""

from __future__ import annotations

from abc import ABC, abstractmethod

from index.approximate import ApproximateIndex
from index.recall import Trial, run_trial

# A doubling that brings less than this has reached what it can bring, and the other dial is turned.
PLATEAU = 0.002
# More candidates than this many times the spec's own: brute force would be cheaper.
MAX_WIDENING = 16
# How often the gap between what failed and what sufficed is halved.
HALVINGS = 2


def tune(index: ApproximateIndex, trial: Trial, target: float) -> float:
    """Double `nprobe` or `efSearch`, and where that brings nothing `overfetch`, until recall@k reaches the target.

    Then what was doubled is taken back by up to a half, in quarters, where the target allows: candidates first, as they
    cost most.
    :returns: the recall reached on the trial's queries, which is below the target where no dial helps.
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
    """A number that makes an index look further."""

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
    """Halvings between half of a value that reached the target, and the value; the half itself is not tried."""
    low, high = dial.value / 2, dial.value
    for _ in range(HALVINGS):
        dial.set((low + high) / 2)
        if (reached := run_trial(dial.index, trial).recall) >= target:
            high, recall = dial.value, reached
        else:
            low = dial.value
    dial.set(high)
    return recall

"""Two ways to the same result, timed in turn in one process: ratios of speeds, so that a busy machine cancels out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table: how many times as fast as the yardstick."""

    stage: str
    against: str
    ratios: tuple[float, ...]
    """The yardstick's seconds over ours, a round each."""
    must: float | None = None
    """What the median should reach; None where nothing was promised."""
    figures: dict[str, float | str] = field(default_factory=dict)
    """Whatever else was measured, by name."""

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def is_met(self) -> bool:
        return self.must is None or self.median >= self.must


def seconds(work: Work) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def speed_ratios(ours: Work, yardstick: Work, rounds: int) -> tuple[float, ...]:
    """The yardstick's time over ours in each round; each goes first in every other round, after one that warms up."""
    ours()
    yardstick()
    ratios = []
    for number in range(rounds):
        if number % 2:
            theirs, own = seconds(yardstick), seconds(ours)
        else:
            own, theirs = seconds(ours), seconds(yardstick)
        ratios.append(theirs / own)
    return tuple(ratios)

"""Two ways to the same result, timed in turn in one process: ratios of speeds, so that a busy machine cancels out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

Work = Callable[[], object]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """One line of the table: a speed relative to a yardstick."""

    stage: str
    against: str
    ratios: tuple[float, ...]
    """The yardstick's seconds over ours, for each round."""
    must: float | None = None
    """Target for the median; None if there is none."""
    figures: dict[str, float | str] = field(default_factory=dict)
    """Other measurements, by name."""

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def is_met(self) -> bool:
        return self.must is None or self.median >= self.must


def seconds(work: Work) -> float:
    """Seconds of one call."""
    return timed(work)[0]


def timed(work: Callable[[], Result], rounds: int = 1) -> tuple[float, Result]:
    """Median seconds of some calls, and the result of the last."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


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

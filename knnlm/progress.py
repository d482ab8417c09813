"""Progress of long work: a plan of its stages, and how long it will still take; the library itself never prints.

A verb declares its stages once (`Progress.plan`), then opens each by its name (`Progress.stage`). What a unit takes is
measured as work is done, for all stages of a kind; before that, it takes what the plan says. So a new stage needs one
line in the plan of its verb, and a stage that no plan names is a whole of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

# advance(done, total): `total` is None while unknown, and may change between calls.
Advance = Callable[[int, int | None], None]
# What a unit takes counts as measured after this many seconds.
MEASURED_SECONDS = 3.0


def ignore(done: int, total: int | None) -> None:
    """An `Advance` that does nothing."""


def toward(total: int | None, advance: Advance) -> Advance:
    """Return an `Advance` that reports the estimate `total` (None: unknown) for work that does not know its total."""
    return lambda done, _: advance(done, total and max(total, done))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage that a verb expects."""

    name: str
    """As it will be opened, such as `extracting keys`."""
    amount: float | None
    """Units of work, such as tokens; None if unknown."""
    part: str
    """The part of the whole that it belongs to, in words that follow a time: `through the model`."""
    kind: str = ""
    """Stages of one kind take the same time a unit; by default a stage is a kind of its own."""
    seconds: float = 0.0
    """What a unit takes, as far as is known before any of its kind is measured."""

    @property
    def rate_of(self) -> str:
        """Name of the kind."""
        return self.kind or self.name


class Progress(Protocol):
    """Receiver of progress reports: the plan of the whole, its stages, and notes."""

    def plan(self, stages: Sequence[Stage]) -> None:
        """Declare the stages that follow, in their order; a later plan replaces those that were not begun."""

    def stage(self, name: str, unit: str) -> AbstractContextManager[Advance]:
        """Open a stage, such as ("extracting keys", "tokens")."""

    def note(self, line: str) -> None:
        """Show one line, such as why float32 is used."""


class Silent:
    """A `Progress` that shows nothing."""

    def plan(self, stages: Sequence[Stage]) -> None:
        """Take the plan, which is not shown."""

    @contextmanager
    def stage(self, name: str, unit: str) -> Iterator[Advance]:
        """Open a stage that is not shown."""
        yield ignore

    def note(self, line: str) -> None:
        """Drop the line."""


class _Open:
    """The stage at work, measured from its first report on."""

    def __init__(self, stage: Stage, begun: float) -> None:
        self.stage, self.begun = stage, begun
        self.total, self.done, self.told, self.reports = stage.amount, 0.0, begun, 0
        self._first: tuple[float, float] | None = None

    def advance(self, done: float, total: float | None, now: float) -> None:
        self.done, self.told, self.reports = done, now, self.reports + 1
        self.total = total or self.total
        self._first = self._first or (done, now)

    def rate(self) -> float | None:
        """Seconds a unit; None until it is measured."""
        if self._first is None or self.told - self.begun < MEASURED_SECONDS:
            return None
        units, seconds = self.done - self._first[0], self.told - self._first[1]
        return seconds / units if units > 0 else (self.told - self.begun) / self.done if self.done else None


class Forecast:
    """Seconds that a plan of stages has taken and will take, by a clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._begun = clock, clock()
        self._waiting: list[Stage] = []
        self._open: _Open | None = None
        self._rates: dict[str, float] = {}
        self._spent: dict[str, float] = {}

    def plan(self, stages: Sequence[Stage]) -> None:
        """Replace the stages that were not begun; the first plan begins the whole."""
        if not self._spent and self._open is None:
            self._begun = self._clock()
        self._waiting = list(stages)

    def begin(self, name: str) -> None:
        """Open a stage; one that is not in the plan is a whole if nothing waits, else time between two others."""
        planned = next((one for one in self._waiting if one.name == name), None)
        if planned is not None:
            self._waiting.remove(planned)
        elif not self._waiting:
            self._begun = self._clock()
            self._spent.clear()
        self._open = _Open(planned or Stage(name=name, amount=None, part=name), self._clock())

    def advance(self, done: float, total: float | None) -> None:
        """Report units done, and all of them where that is known."""
        assert self._open is not None, "no stage was begun"
        self._open.advance(done, total, self._clock())
        if (rate := self._open.rate()) is not None:
            self._rates[self._open.stage.rate_of] = rate

    def end(self) -> None:
        """Close the stage."""
        assert self._open is not None, "no stage was begun"
        stage, seconds = self._open.stage, self._clock() - self._open.begun
        self._spent[stage.part] = self._spent.get(stage.part, 0.0) + seconds
        if self._open.done and stage.rate_of not in self._rates:
            self._rates[stage.rate_of] = seconds / self._open.done
        self._open = None

    @property
    def elapsed(self) -> float:
        """Seconds since the whole began."""
        return self._clock() - self._begun

    @property
    def is_measured(self) -> bool:
        """Whether the open stage has been measured on two units after its first, which may be slow."""
        one = self._open
        return one is not None and one.stage.rate_of in self._rates and one.reports > 2

    def done(self) -> tuple[float, float | None]:
        """Units of the open stage that are done, and all of them where that is known."""
        return (0.0, None) if self._open is None else (self._open.done, self._open.total)

    def left(self) -> float | None:
        """Seconds until all of the plan is done; None while the open stage's are unknown."""
        own = self._left_of_open()
        return None if own is None else own + sum(self._expected(one) for one in self._waiting)

    def parts(self) -> dict[str, float]:
        """Seconds of each part of the whole, spent and expected."""
        found = dict(self._spent)
        if self._open is not None:
            seconds = self._clock() - self._open.begun + (self._left_of_open() or 0.0)
            found[self._open.stage.part] = found.get(self._open.stage.part, 0.0) + seconds
        for one in self._waiting:
            found[one.part] = found.get(one.part, 0.0) + self._expected(one)
        return found

    def _expected(self, stage: Stage) -> float:
        return (stage.amount or 0.0) * self._rates.get(stage.rate_of, stage.seconds)

    def _left_of_open(self) -> float | None:
        if self._open is None:
            return 0.0
        one, now, rate = self._open, self._clock(), self._rates.get(self._open.stage.rate_of)
        if rate is not None and one.total:
            return max(0.0, (one.total - one.done) * rate - (now - one.told))
        expected = self._expected(one.stage)
        return max(0.0, expected - (now - one.begun)) if expected else None


def duration(seconds: float) -> str:
    """Return a time in words, as exactly as an estimate is: `25 s`, `2 min 20 s`, `14 min`, `1 h 10 min`."""
    if seconds < 57.5:
        return f"{max(5, 5 * round(seconds / 5))} s"
    if seconds < 595:
        minutes, rest = divmod(10 * round(seconds / 10), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(10 * round(minutes / 10), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"

"""What a command line says about the time that its work takes, in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from knnlm.progress import Forecast, Stage, duration

# Seconds between two lines where there is no bar.
LINE_SECONDS = 25.0
# A whole that takes less is not foretold.
LEAST_FORETOLD = 20.0
# Parts of the whole that are named take at least this share of it.
LEAST_SHARE = 0.05


class Teller:
    """Says once how long the whole will take, and where the work is."""

    def __init__(self, forecast: Forecast, say: Callable[[str], None]) -> None:
        self._forecast, self._say = forecast, say
        self._name, self._unit = "", ""
        self._foretold, self._last_line = False, 0.0

    def plan(self, stages: Sequence[Stage]) -> None:
        """Take a plan of stages."""
        self._forecast.plan(stages)

    def begin(self, name: str, unit: str) -> None:
        """A stage begins."""
        self._forecast.begin(name)
        self._name, self._unit = name, unit

    def advance(self, done: int, total: int | None) -> None:
        """The stage is so far."""
        self._forecast.advance(done, total)
        if not self._foretold and self._forecast.is_measured:
            self._foretold, whole = True, self._forecast.elapsed + (self._forecast.left() or 0)
            if whole >= LEAST_FORETOLD:
                self._say(self._foretelling(whole))

    def end(self) -> None:
        """The stage ends."""
        self._forecast.end()

    def line_if_due(self) -> None:
        """Say where the work is, if nothing was said for a while."""
        elapsed = self._forecast.elapsed
        if elapsed - self._last_line >= LINE_SECONDS:
            self._last_line = elapsed
            self._say(self.line())
        self._last_line = min(self._last_line, elapsed)  # another whole has begun

    def line(self, *, counted: bool = True) -> str:
        """The stage, how far it is, and the time left to the end of the whole.

        :param counted: with units done, such as tokens, where there is no bar; layers are always counted.
        """
        done, total = self._forecast.done()
        if self._unit == "layers" and total:
            place = f", layer {min(int(done) + 1, int(total))} of {int(total)}"
        elif done and counted:
            place = f", {int(done):,} of {int(total):,} {self._unit}" if total else f", {int(done):,} {self._unit}"
        else:
            place = ""
        left = self._forecast.left()
        spent = f"{duration(self._forecast.elapsed)} so far"
        return f"{self._name}{place}, {spent if left is None else f'about {duration(left)} left'}"

    def share(self) -> float | None:
        """The part of the whole that is done, 0 to 1; None while unknown."""
        elapsed, left = self._forecast.elapsed, self._forecast.left()
        return None if left is None else elapsed / max(elapsed + left, 1e-9)

    def _foretelling(self, whole: float) -> str:
        parts = {part: seconds for part, seconds in self._forecast.parts().items() if seconds >= LEAST_SHARE * whole}
        named = [f"{duration(seconds)} {part}" for part, seconds in sorted(parts.items(), key=lambda one: -one[1])]
        return f"about {duration(whole)}" + (f": {', '.join(named)}" if len(named) > 1 else "")

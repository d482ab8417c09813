"""Progress reports of long work; the library itself never prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

# advance(done, total): `total` is None while unknown, and may change between calls.
Advance = Callable[[int, int | None], None]


def ignore(done: int, total: int | None) -> None:
    """An `Advance` that does nothing."""


def toward(total: int | None, advance: Advance) -> Advance:
    """Return an `Advance` that reports the estimate `total` (None: unknown) for work that does not know its total."""
    return lambda done, _: advance(done, total and max(total, done))


class Progress(Protocol):
    """Receiver of progress reports: a bar for each stage, and notes."""

    def stage(self, name: str, unit: str) -> AbstractContextManager[Advance]:
        """Open a stage, such as ("extracting keys", "tokens")."""

    def note(self, line: str) -> None:
        """Show one line, such as why float32 is used."""


class Silent:
    """A `Progress` that shows nothing."""

    @contextmanager
    def stage(self, name: str, unit: str) -> Iterator[Advance]:
        """Open a stage that is not shown."""
        yield ignore

    def note(self, line: str) -> None:
        """Drop the line."""

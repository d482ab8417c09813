"""How long work tells what it is doing; the library itself never prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

# advance(done, total): `total` is None while it is unknown, and may be corrected on the way.
Advance = Callable[[int, int | None], None]


def ignore(done: int, total: int | None) -> None:
    """An `Advance` that tells nobody."""


def toward(total: int | None, advance: Advance) -> Advance:
    """An `Advance` for work that does not know its total: about so much, or, where `total` is None, no one knows."""
    return lambda done, _: advance(done, total and max(total, done))


class Progress(Protocol):
    """What a caller gives to be told: a bar for each stage, and lines worth reading."""

    def stage(self, name: str, unit: str) -> AbstractContextManager[Advance]:
        """Open a stage, such as ("extracting keys", "tokens")."""

    def note(self, line: str) -> None:
        """Say one line, such as why float32 was taken."""


class Silent:
    """Tells nobody."""

    @contextmanager
    def stage(self, name: str, unit: str) -> Iterator[Advance]:
        """Open a stage that nobody sees."""
        yield ignore

    def note(self, line: str) -> None:
        """Drop the line."""

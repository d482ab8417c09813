"""Display of results: a few lines in a console, a table in a notebook. Unknown values are a dash."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

UNKNOWN = "–"
MOST_LINES, MOST_CHARACTERS = 12, 160


def figure(value: float | None, form: str = ".4g") -> str:
    """Return a number in a Python format; a dash for None, NaN and infinity."""
    return UNKNOWN if value is None or not math.isfinite(value) else format(value, form)


def change(value: float | None) -> str:
    """Return a fraction as a signed percentage: `-12.3 %`."""
    shown = figure(None if value is None else 100 * value, "+.1f")
    return shown if shown == UNKNOWN else f"{shown} %"


def brief(names: Sequence[str]) -> str:
    """Return the names, or the first two and the last of more than four."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, …, {names[-1]}"


@dataclass(frozen=True)
class Table:
    """A table of text with column headings."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def html(self) -> str:
        """Return an HTML table, all text escaped."""
        heads = "".join(f"<th>{escape(one)}</th>" for one in self.heads)
        rows = "".join(f"<tr>{_cells(row)}</tr>" for row in self.rows)
        title = f"<caption>{escape(self.title)}</caption>"
        return f"<table>{title}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _cells(row: Iterable[str]) -> str:
    return "".join(f"<td>{escape(cell)}</td>" for cell in row)


class Shown(ABC):
    """A result whose `repr` is its name with its main figures, and which may have a table for notebooks."""

    @abstractmethod
    def _facts(self) -> Iterator[str]:
        """The main figures, one per line."""

    def _table(self) -> Table | None:
        """The table that the command line shows; None if it shows none."""
        return None

    def __repr__(self) -> str:
        lines = list(self._facts())
        if len(lines) > MOST_LINES - 1:
            lines[MOST_LINES - 2 :] = ["…"]
        cut = (one if len(one) <= MOST_CHARACTERS else f"{one[: MOST_CHARACTERS - 1]}…" for one in lines)
        return "\n  ".join([f"{type(self).__name__}:", *(" ".join(one.split()) for one in cut)])

    def _repr_html_(self) -> str | None:
        table = self._table()
        return None if table is None else table.html()

"""The plan of a text into parts of a datastore: from the windows alone, so that everybody makes the same parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from knnlm.config import LONGEST_PART
from knnlm.text.windows import Window


def in_parts(windows: Iterable[Window], rows: int | None) -> Iterator[Iterator[Window]]:
    """Group consecutive windows into parts of about `rows` counted targets; None: one part.

    A part ends with the first document that fills it. A document that would make it twice as large is cut between two
    windows: its windows, and so its vectors, are those of the whole document. Each group must be read before the next.
    """
    for _, group in itertools.groupby(_numbered(windows, rows), lambda pair: pair[0]):
        yield (window for _, window in group)


def _numbered(windows: Iterable[Window], rows: int | None) -> Iterator[tuple[int, Window]]:
    part = counted = document = 0
    for window in windows:
        full = counted >= (rows or 0) and window.document != document
        if rows is not None and (full or counted >= LONGEST_PART * rows):
            part, counted = part + 1, 0
        document = window.document
        counted += len(window.targets) - window.first
        yield part, window

"""The documents of all parts as one table, and the rows of those that are not removed.

Legend: N rows of a part, P parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from knnlm.errors import DatastoreCorrupt
from knnlm.store.live import LiveRows, kept_runs
from knnlm.store.manifest import IndexedPart, PartEntry
from knnlm.store.part import Part

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PartDocuments:
    """The documents of a part: its documents.npy, with what the manifest and part.json say about them."""

    entry: PartEntry
    part: Part
    rows: Int64
    """int64 [documents, 5]: first row, first token, number of its source, number in it, position of the first token."""

    def kept(self) -> Int64:
        """Numbers of the documents that are not removed."""
        runs = kept_runs(self.entry.removed, len(self.rows))
        return np.concatenate([np.empty(0, np.int64), *(np.arange(first, last) for first, last in runs)])

    def ends(self) -> Int64:
        """For each document, the row after its last."""
        return np.append(self.rows[1:, 0], self.entry.rows)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Runs of rows that are not removed.

        :raises DatastoreCorrupt: the manifest's removals do not fit the documents.
        """
        found = list(row_runs(self.rows, self.entry.removed, self.entry.rows))
        if sum(last - first for first, last in found) != self.entry.live:
            raise DatastoreCorrupt(f"part {self.entry.name} has not the {self.entry.live} rows that are said to count")
        yield from found

    def problem(self) -> str:
        """What does not fit the values; empty if all does."""
        first_rows, _, sources, _, starts = self.rows.T
        fits = (
            len(first_rows)
            and first_rows[0] == 0
            and first_rows[-1] <= self.entry.rows
            and not np.any(np.diff(first_rows) < 0)
            and np.all((sources >= 0) & (sources < len(self.part.sources)))
            and np.all(starts >= 0)
        )
        return "" if fits else "does not fit the values"


def row_runs(documents: Int64, removed: Sequence[tuple[int, int]], rows: int) -> Iterator[tuple[int, int]]:
    """Runs of a part's rows whose documents are not removed.

    :raises DatastoreCorrupt: more documents are removed than there are.
    """
    if removed and removed[-1][1] > len(documents):
        raise DatastoreCorrupt(f"a part has {len(documents)} documents, but more are removed")
    firsts = np.append(documents[:, 0], rows)
    yield from kept_runs([(int(firsts[a]), int(firsts[b])) for a, b in removed], rows)


def index_runs(indexed: Sequence[IndexedPart], parts: Sequence[PartDocuments], live: LiveRows | None) -> Int64:
    """Return which keys of an index are which rows that count: first id, first row, number; [R, 3].

    :param indexed: what the index was built over.
    :raises DatastoreCorrupt: that does not fit the parts.
    """
    starts = accumulate((one.entry.rows for one in parts), initial=0)
    offsets = {one.entry.name: start for one, start in zip(parts, starts, strict=False)}
    documents = {one.entry.name: one for one in parts}
    found, done = [], 0
    for then in indexed:
        if then.name in documents:
            now, at, first_id = documents[then.name], offsets[then.name], done
            for first, last in row_runs(now.rows, then.removed, now.entry.rows):
                for begin, end in now.runs():
                    low, high = max(first, begin), min(last, end)
                    if low < high:
                        row = at + low if live is None else int(live.live(np.array([at + low]))[0])
                        found.append((first_id + low - first, row, high - low))
                first_id += last - first
        done += then.rows
    return np.array(found, np.int64).reshape(-1, 3)


def rows_that_count(parts: Sequence[PartDocuments]) -> LiveRows:
    """Return which rows of all parts count. Raises as `PartDocuments.runs`."""
    offsets = accumulate((one.entry.rows for one in parts), initial=0)
    runs = [(first + at, last + at) for at, one in zip(offsets, parts, strict=False) for first, last in one.runs()]
    return LiveRows(np.array(runs, np.int64).reshape(-1, 2))


def document_table(parts: Sequence[PartDocuments], live: LiveRows | None) -> tuple[Int64, tuple[str, ...]]:
    """Return the documents that are not removed, int64 [documents, 4], and the names of their sources.

    Columns: first row among those that count, first token, number of its source, number in the source. A document that
    was cut between two parts is one again.
    """
    sources: dict[str, int] = {}
    tables, offset, before = [np.empty((0, 4), np.int64)], 0, None
    for one in parts:
        kept = one.kept()
        table = one.rows[kept]
        if len(table):
            last = (one.part.sources[table[-1, 2]], *table[-1, 3:].tolist(), int(one.ends()[kept[-1]]) - table[-1, 0])
            if before is not None and _continues(table[0], one.part.sources, before):
                last = last if len(table) > 1 else (*before[:3], before[3] + last[3])
                table = table[1:]
            before = last
        numbers = np.array([sources.setdefault(one.part.sources[i], len(sources)) for i in _in_use(one, kept)] or [0])
        table = table[:, :4].copy()
        table[:, 2] = numbers[np.searchsorted(_in_use(one, kept), table[:, 2])]
        first_rows = table[:, 0] + offset
        table[:, 0] = first_rows if live is None else live.live(first_rows)
        tables.append(table)
        offset += one.entry.rows
    return np.concatenate(tables), tuple(sources)


def _in_use(one: PartDocuments, kept: Int64) -> Int64:
    """Numbers of the sources of these documents, ascending: the order in which they came."""
    return np.unique(one.rows[kept, 2])


def _continues(row: Int64, sources: Sequence[str], before: tuple[str, int, int, int]) -> bool:
    """Whether a part's first document is the rest of the one before: source, number, start and rows of that."""
    _, _, source, number, start = row.tolist()
    return start > 0 and (sources[source], number, start) == (*before[:2], before[2] + before[3])

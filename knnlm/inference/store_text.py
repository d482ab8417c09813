"""The text of a datastore as tokens: where a run of tokens stands in it, what follows it, and the longest common runs.

Exact: tokens are compared, not hashes of them. A run never goes over the end of a document.
Shapes: P positions in the text, M documents as numbered by a `DocumentMap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnlm.knn.citing import DocumentMap
from knnlm.store.stored_text import StoredText

Positions = NDArray[np.integer[Any]]
# Between documents; no token.
_BORDER = -1


def text_bytes(store: StoredText) -> int:
    """Return the memory that the making of a `StoreText` takes, the most that it ever does."""
    return 16 * _positions(store)


def _positions(store: StoredText) -> int:
    """P: values, two for each document, and a last border."""
    return store.count + 2 * len(store.documents) + 1


@dataclass(frozen=True)
class LongestRun:
    """The longest run of some tokens that stands in a document."""

    tokens: int
    """Its length; 0 if none of them is in the document."""
    last: int
    """The place, among the tokens, of the last one."""


class StoreText:
    """All tokens of a datastore's documents, first tokens included, and where each of them stands.

    8 bytes for each token of the text, twice as many while it is made (`text_bytes`).
    """

    def __init__(self, store: StoredText, documents: DocumentMap) -> None:
        # Before each document's values a border and its first token, which is no value.
        self._documents, self._starts = documents, store.documents[:, 0] + 2 * np.arange(len(store.documents))
        self._tokens_P = np.full(_positions(store), _BORDER, np.int32)
        self._tokens_P[self._starts + 1] = store.documents[:, 1]
        is_value_P = np.ones(len(self._tokens_P), np.bool_)
        is_value_P[np.concatenate([self._starts, self._starts + 1, [-1]])] = False
        self._tokens_P[is_value_P] = store.values
        del is_value_P
        fitting = np.int32 if len(self._tokens_P) < 1 << 31 else np.int64
        self._order_P: Positions = np.argsort(self._tokens_P, kind="stable").astype(fitting)
        sorted_P = self._tokens_P[self._order_P]
        firsts = np.flatnonzero(np.append(True, sorted_P[1:] != sorted_P[:-1]))
        self._known, self._ends = sorted_P[firsts], np.append(firsts, len(sorted_P))

    def places(self, token: int) -> Positions:
        """Return where a token stands, ascending."""
        at = int(np.searchsorted(self._known, token))
        if token < 0 or at == len(self._known) or self._known[at] != token:
            return np.empty(0, np.int64)
        return self._order_P[self._ends[at] : self._ends[at + 1]]

    def followers(self, run: Sequence[int]) -> NDArray[np.int32]:
        """Return the tokens that follow a run of tokens anywhere in the text, each once."""
        places = [self.places(token) for token in run]
        rarest = min(range(len(run)), key=lambda number: len(places[number]))
        begins = places[rarest] - rarest
        begins = begins[begins > 0]
        for number, token in enumerate(run):
            # A border comes after every last token, so that no place is behind the text.
            begins = begins[self._tokens_P[begins + number] == token]
        found = np.unique(self._tokens_P[begins + len(run)])
        followers: NDArray[np.int32] = found[found != _BORDER]
        return followers

    def longest_runs(self, tokens: Sequence[int]) -> dict[int, LongestRun]:
        """Return, for each document with one of the tokens, the longest run of them that stands in it."""
        lengths_M = np.zeros(len(self._documents.sizes_M), np.int64)
        lasts_M = np.zeros_like(lengths_M)
        run_P = np.zeros(len(self._tokens_P), np.int32)
        before: Positions = np.empty(0, np.int64)
        for place, token in enumerate(tokens):
            here = self.places(token)
            length = run_P[here - 1] + 1
            run_P[before] = 0
            run_P[here] = length
            before = here
            of = self._document_of(here)
            best_M = np.zeros_like(lengths_M)
            np.maximum.at(best_M, of, length)
            lasts_M = np.where(best_M > lengths_M, place, lasts_M)
            lengths_M = np.maximum(best_M, lengths_M)
        return {int(one): LongestRun(int(lengths_M[one]), int(lasts_M[one])) for one in np.flatnonzero(lengths_M)}

    def _document_of(self, places: Positions) -> Positions:
        part = np.searchsorted(self._starts, places, side="right") - 1
        return self._documents.of_part(part)

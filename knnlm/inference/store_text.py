"""The text of a datastore as tokens: where a run of tokens stands in it, what follows it, and the longest common runs.

Exact: tokens are compared, not hashes of them. A run never goes over the end of a document.
Shapes: P positions in the text, M documents as numbered by a `DocumentMap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knnlm.knn.citing import DocumentMap
from knnlm.store.stored_text import StoredText

Positions = NDArray[np.int64]
# Between documents; no token.
_BORDER = -1


@dataclass(frozen=True)
class LongestRun:
    """The longest run of some tokens that stands in a document."""

    tokens: int
    """Its length; 0 if none of them is in the document."""
    last: int
    """The place, among the tokens, of the last one."""


class StoreText:
    """All tokens of a datastore's documents, first tokens included, and where each of them stands.

    12 bytes for each token of the text.
    """

    def __init__(self, store: StoredText, documents: DocumentMap) -> None:
        starts, first_tokens = store.documents[:, 0], store.documents[:, 1]
        # Before each document's values a border and its first token, which is no value.
        added = np.stack([np.full(len(starts), _BORDER), first_tokens], axis=1).ravel()
        self._tokens_P = np.append(np.insert(store.values, np.repeat(starts, 2), added), _BORDER).astype(np.int32)
        self._order_P = np.argsort(self._tokens_P, kind="stable")
        sorted_P = self._tokens_P[self._order_P]
        self._known, firsts = np.unique(sorted_P, return_index=True)
        self._ends = np.append(firsts, len(sorted_P))
        self._documents, self._starts = documents, starts + 2 * np.arange(len(starts))

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
        before = np.empty(0, np.int64)
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

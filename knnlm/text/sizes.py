"""Bytes and words that each token covers in its document's text, for bits per byte and word perplexity.

They are counted in the original text, not in decoded tokens: a character may be split over several tokens, and a
tokenizer may drop, lower-case or normalise characters.

Legend: N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from knnlm.utf8 import byte_places

_SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], np.uint32)


@dataclass(frozen=True, eq=False)
class Sizes:
    """Bytes and words of each token of a stretch of text."""

    bytes_N: NDArray[np.int32]
    """Bytes of the text in UTF-8."""
    words_N: NDArray[np.int32]
    """Words that begin in the token; a word is what stands between white space."""
    inside_N: NDArray[np.bool_]
    """Whether the token begins inside a word."""

    @classmethod
    def of(cls, text: str, ends_N: NDArray[np.int64]) -> Self:
        """Return the sizes of a text's tokens; `ends_N` is the end of each in the text's UTF-8 bytes, exclusive."""
        data = text.encode("utf-8", "replace")
        starts_N = np.concatenate([[0], ends_N[:-1]])[: len(ends_N)].astype(np.int64)
        first_W, last_W = _words(text)
        words_N = np.searchsorted(first_W, ends_N) - np.searchsorted(first_W, starts_N)
        before_N = np.searchsorted(first_W, starts_N) - 1  # the last word that begins before the token
        inside_N = (before_N >= 0) & (starts_N < np.append(last_W, len(data))[before_N])
        return cls((ends_N - starts_N).astype(np.int32), words_N.astype(np.int32), inside_N)

    @classmethod
    def joined(cls, parts: Sequence[Sizes]) -> Self:
        """Concatenate the sizes of several stretches."""
        return cls(
            np.concatenate([np.empty(0, np.int32), *(one.bytes_N for one in parts)]),
            np.concatenate([np.empty(0, np.int32), *(one.words_N for one in parts)]),
            np.concatenate([np.empty(0, np.bool_), *(one.inside_N for one in parts)]),
        )

    def __getitem__(self, part: slice | NDArray[np.bool_]) -> Sizes:
        """Return the sizes of some tokens, as a copy: a view would keep the whole document in memory."""
        return Sizes(self.bytes_N[part].copy(), self.words_N[part].copy(), self.inside_N[part].copy())

    def words(self, clusters_N: NDArray[np.int64]) -> int:
        """Count words, whole or partial; consecutive tokens of one cluster are a stretch of text."""
        begins_N = np.diff(clusters_N, prepend=-1 if not len(clusters_N) else clusters_N[0] - 1) != 0
        return int(self.words_N.sum() + (begins_N & self.inside_N).sum())


def _words(text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Start and end of each word, in bytes."""
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    inside = np.concatenate([[False], ~np.isin(codes, _SPACES, kind="table"), [False]])
    borders = byte_places(text)[np.flatnonzero(inside[1:] != inside[:-1])]
    return borders[::2], borders[1::2]

"""Text to tokens as the model's own tokenizer does it, with memory that does not grow with the text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# Long text is tokenised in pieces of about this many characters.
PIECE = 1 << 18
# A space between a word and a letter: byte-level BPE never joins what stands on the two sides of this place.
_CUT = re.compile(r"(?<=\S) (?=[^\W\d_])")


class Tokenizer(Protocol):
    """What is needed of a `transformers` tokenizer."""

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_attention_mask: bool, verbose: bool
    ) -> Mapping[str, Any]:
        """Tokenise a text; `input_ids` are the tokens."""
        ...


class TextEncoder:
    """Call it with a text to get its tokens, int32 [n]: what the tokenizer puts in front (BOS) once, nothing behind.

    Long text is cut into pieces between words, such that the tokens are those of the whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._prefix = self._find_prefix()
        self._gap = self._find_gap()

    def __call__(self, text: str) -> NDArray[np.int32]:
        """Return the tokens of a text."""
        parts = [np.asarray(self._ids(piece), dtype=np.int32) for piece in self._pieces(text)]
        return np.concatenate([np.asarray(self._prefix, dtype=np.int32), *parts])

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def _find_prefix(self) -> list[int]:
        bare, full = self._ids("a"), self._ids("a", special=True)
        starts = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
        return full[: next(starts, 0)]

    def _find_gap(self) -> int | None:
        """Return how many characters of the space at a cut to leave out so that pieces give the tokens of the whole.

        0 for byte-level BPE; 1 where the tokenizer puts a space before every text (SentencePiece); None: never cut.
        """
        whole, left = self._ids("the cat sat"), self._ids("the cat")
        return next((gap for gap in (0, 1) if left + self._ids(" sat"[gap:]) == whole), None)

    def _pieces(self, text: str) -> Iterator[str]:
        start = 0
        while self._gap is not None and len(text) - start > PIECE:
            cut = _CUT.search(text, start + PIECE)
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.start() + self._gap
        yield text[start:]

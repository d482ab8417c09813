"""Tokenisation of long text with a model's tokenizer, in pieces that give the tokens of the whole.

Test words come from the tokenizer's own vocabulary, which may lack any given alphabet.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from knnlm.utf8 import byte_places, check_characters

# Long text is tokenised in pieces of about this many characters.
PIECE = 1 << 18
# A space between two letters: `_never_joins` proves that no token spans it.
_CUT = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
_JOINED = re.compile(r"\S ")
# SentencePiece's space, and its names of single bytes.
_MARK = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer(Protocol):
    """The part of a `transformers` tokenizer that is needed here."""

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_attention_mask: bool, verbose: bool
    ) -> Mapping[str, Any]:
        """Tokenise a text; `input_ids` are the tokens."""
        ...


class TextEncoder:
    """Maps a text to its tokens, int32 [n]: with the tokenizer's prefix (BOS) once, and no suffix.

    Long text is cut between words, into pieces whose tokens are those of the whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._words = list(itertools.islice(own_words(tokenizer), 3))
        self._prefix = self._find_prefix()

    @property
    def word(self) -> str:
        """A short text that the tokenizer can encode, such as a letter; empty if there is none."""
        return self._words[0] if self._words else ""

    def __call__(self, text: str) -> NDArray[np.int32]:
        """Return the tokens of a text. Raises as `check_characters`."""
        check_characters(text)
        parts = [np.asarray(self._ids(text[begin:end]), dtype=np.int32) for begin, end in self._pieces(text)]
        return np.concatenate([np.asarray(self._prefix, dtype=np.int32), *parts])

    def with_ends(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the tokens, and where in the text's UTF-8 bytes each one ends, int64 [n]: ascending up to its size.

        Ends refer to the text as given: characters that the tokenizer drops or normalises away count for the token
        before, white space for the token after. The bytes of a character that spans several tokens are divided among
        them. Raises as `check_characters`.
        """
        check_characters(text)
        bytes_before = byte_places(text)
        tokens, ends = [np.asarray(self._prefix, np.int32)], [np.zeros(len(self._prefix), np.int64)]
        for begin, end in self._pieces(text):
            ids, spans_N2 = self._spans(text[begin:end])
            tokens.append(np.asarray(ids, np.int32))
            ends.append(self._ends(ids, spans_N2 + begin, text, bytes_before))
        found = np.maximum.accumulate(np.concatenate(ends))
        if len(found) > len(self._prefix):
            found[-1] = bytes_before[-1]
        return np.concatenate(tokens), found

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def _spans(self, text: str) -> tuple[list[int], NDArray[np.int64]]:
        """The tokens of a piece, and each one's first and last character (exclusive), [n, 2]."""
        if not getattr(self._tokenizer, "is_fast", False):
            ids = self._ids(text)
            # A slow tokenizer gives no offsets: estimated from the sizes of the tokens' texts.
            ends = np.cumsum([self._size(token) for token in ids]) if ids else np.empty(0)
            ends = np.round(ends / max(1, ends[-1] if ids else 1) * len(text)).astype(np.int64)
            return ids, np.stack([np.concatenate([[0], ends[:-1]])[: len(ids)], ends], axis=1).astype(np.int64)
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        encoded = self._tokenizer(text, return_offsets_mapping=True, **options)  # type: ignore[call-arg]
        return list(encoded["input_ids"]), np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)

    def _ends(
        self, ids: Sequence[int], spans_N2: NDArray[np.int64], text: str, bytes_before: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Where each token ends, in bytes."""
        if not len(ids):
            return np.empty(0, np.int64)
        # Some normalisers change the order of characters.
        ends = np.maximum.accumulate(spans_N2[:, 1])
        starts = np.minimum.accumulate(spans_N2[::-1, 0])[::-1]
        for at in np.flatnonzero(starts[1:] > ends[:-1]):
            dropped = text[ends[at] : starts[at + 1]]
            ends[at] += len(dropped.rstrip())
        found: NDArray[np.int64] = bytes_before[ends]
        for at in np.flatnonzero(starts[1:] < ends[:-1])[::-1]:
            # Two tokens share a character: the second has the character's last bytes.
            floor = bytes_before[starts[at + 1]]
            found[at] = max(floor, min(found[at], found[at + 1] - self._size(ids[at + 1])))
        return found

    def _size(self, token: int) -> int:
        """The number of bytes that a token stands for, from its name."""
        name = str(self._tokenizer.convert_ids_to_tokens(int(token)))  # type: ignore[attr-defined]
        if self._is_byte_level:
            return len(name)
        return 1 if _BYTE.fullmatch(name) else len(name.replace(_MARK, " ").encode("utf-8", "replace"))

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token of a byte-level or byte-fallback tokenizer stands for, from its name."""
        name = str(self._tokenizer.convert_ids_to_tokens(int(token)))  # type: ignore[attr-defined]
        if _BYTE.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        alphabet = _byte_alphabet()
        known = self._is_byte_level and all(map(alphabet.__contains__, name))
        return bytes(map(alphabet.__getitem__, name)) if known else name.replace(_MARK, " ").encode("utf-8", "replace")

    @cached_property
    def _is_byte_level(self) -> bool:
        return is_byte_level(self._tokenizer)

    def _find_prefix(self) -> list[int]:
        bare, full = self._ids(self.word), self._ids(self.word, special=True)
        starts = (at for at in range(len(full)) if bare and full[at : at + len(bare)] == bare)
        return full[: next(starts, 0)]

    @cached_property
    def _gap(self) -> int | None:
        """Characters to skip at a cut so that the pieces give the tokens of the whole.

        0 for byte-level BPE; 1 if the tokenizer puts a space before every text (SentencePiece); None: never cut.
        """
        if not self._words or not _never_joins(self._tokenizer, self._words):
            return None
        first, second, third = (self._words * 3)[:3]
        whole, left = self._ids(f"{first} {second} {third}"), self._ids(f"{first} {second}")
        return next((gap for gap in (0, 1) if left + self._ids(f" {third}"[gap:]) == whole), None)

    def _pieces(self, text: str) -> Iterator[tuple[int, int]]:
        """Begin and end of each piece."""
        start = 0
        while len(text) - start > PIECE and self._gap is not None:
            cut = _CUT.search(text, start + PIECE)
            if cut is None:
                break
            yield start, cut.start()
            start = cut.start() + self._gap
        yield start, len(text)


def own_words(tokenizer: Any) -> Iterator[str]:  # noqa: ANN401 - a transformers tokenizer, or what acts as one
    """Yield distinct letters and words of a tokenizer's vocabulary that it can encode without special tokens."""
    get_vocab = getattr(tokenizer, "get_vocab", None)
    vocabulary: Mapping[str, int] = get_vocab() if get_vocab is not None else {}
    special, seen = {*getattr(tokenizer, "all_special_ids", ())}, set()
    for token in sorted(set(vocabulary.values()) - special):
        text = str(tokenizer.decode([token])).strip()
        if not text.isalpha() or text in seen:
            continue
        seen.add(text)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids and not special & set(ids):
            yield text


def is_empty(tokenizer: Any) -> bool:  # noqa: ANN401
    """Return whether a tokenizer can encode nothing of its own vocabulary, as one made without files."""
    special = {*tokenizer.all_special_ids}
    texts = (tokenizer.decode([token]) for token in sorted(set(tokenizer.get_vocab().values()) - special))
    return not any(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts if text)


def _backend(tokenizer: Any) -> dict[str, Any]:  # noqa: ANN401
    """The rules of a fast tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    rules = json.loads(backend.to_str())
    return {name: rules.get(name) for name in ("decoder", "pre_tokenizer", "added_tokens")}


def is_byte_level(tokenizer: Any) -> bool:  # noqa: ANN401
    """Return whether each character of a token's name is a byte, as in GPT-2."""
    rules = _backend(tokenizer)
    return '"ByteLevel"' in json.dumps([rules.get("decoder"), rules.get("pre_tokenizer")])


def _never_joins(tokenizer: Any, words: Sequence[str]) -> bool:  # noqa: ANN401
    """Whether it is certain that no token spans the end of a word and the space after it.

    Such a token would be in the vocabulary. If the vocabulary has no space, and words are not split before tokens are
    made, the space is dropped and a token could span two words. Added tokens that absorb a neighbouring space do so
    next to a letter only if they end in one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    bytes_of = _byte_alphabet() if is_byte_level(tokenizer) else None
    texts = [_text_of(name, bytes_of) for name in backend.get_vocab(with_added_tokens=False)]
    added = [one for one in _backend(tokenizer)["added_tokens"] or ()]
    if any(map(_JOINED.search, [*texts, *(one["content"] for one in added)])):
        return False
    if any(one["rstrip"] and one["content"][-1:].isalpha() for one in added):
        return False
    if any(one["lstrip"] and one["content"][:1].isalpha() for one in added):
        return False
    apart = backend.pre_tokenizer
    pair = f"{words[0]} {words[-1]}"
    return " " in texts or (apart is not None and len(apart.pre_tokenize_str(pair)) > 1)


def _text_of(name: str, bytes_of: Mapping[str, int] | None) -> str:
    """The text of a token with this name."""
    if bytes_of is None:
        return name.replace(_MARK, " ")
    if not all(map(bytes_of.__contains__, name)):
        return name
    return bytes(map(bytes_of.__getitem__, name)).decode("utf-8", "replace")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others are U+0100 and following."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + at): byte for at, byte in enumerate(hidden)}

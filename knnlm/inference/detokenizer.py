"""Incremental decoding of tokens to text, and encoding of prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from knnlm.errors import InputError
from knnlm.model.lm import LanguageModel

# A decoder's output for bytes that are not, or not yet, a character.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Last tokens of the prompt that are decoded along with the continuation: more than any one character has.
_WINDOW = 8


class Generates(Protocol):
    """A model of `transformers` that generates."""

    generation_config: Any


class Detokenizer:
    """Decodes tokens one by one into pieces of text, none of which ends inside a character.

    The pieces add up to the text that decoding all tokens at once gives after that of `before`. Only the tokens of the
    last piece are decoded again with each new one, as some tokenizers drop the space before a first word.

    :param hidden: tokens without text, such as end tokens.
    """

    def __init__(self, lm: LanguageModel, before: Sequence[int], hidden: Collection[int]) -> None:
        self._lm, self._hidden = lm, hidden
        self._tokens = list(before[-_WINDOW:])
        self._shown = len(self._tokens)
        self._length = len(lm.decode(self._tokens))

    def put(self, token: int) -> str:
        """Add a token; return the text that it completes, which may be empty or more than its own."""
        if token in self._hidden:
            return ""
        self._tokens.append(token)
        text = self._lm.decode(self._tokens)
        return "" if text.endswith(INCOMPLETE) else self._show(text)

    def rest(self) -> str:
        """Return the text that is still incomplete."""
        return self._show(self._lm.decode(self._tokens))

    def _show(self, text: str) -> str:
        piece = text[self._length :]
        self._tokens = self._tokens[self._shown :] or self._tokens
        self._shown, self._length = len(self._tokens), len(self._lm.decode(self._tokens))
        return piece


class TokenTexts:
    """Text of single tokens as inside a sentence, where tokenizers do not drop the leading space."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._anchor = lm.encode(lm.word).tolist()[-1:]
        self._length = len(lm.decode(self._anchor))
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """Return the token's text; contains `INCOMPLETE` if the token is part of a character."""
        if token not in self._known:
            self._known[token] = self._lm.decode([*self._anchor, token])[self._length :]
        return self._known[token]


def end_tokens(model: Generates, lm: LanguageModel) -> frozenset[int]:
    """End tokens: those of the model's generation settings, else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = ends if ends is not None else lm.tokenizer.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [ends]) - {None}


def pieces_of(lm: LanguageModel, tokens: Sequence[int]) -> list[str]:
    """Each token's part of the text; a character made of several tokens belongs to the last of them."""
    text = Detokenizer(lm, (), ())
    pieces = [text.put(token) for token in tokens]
    pieces[-1] += text.rest()
    return pieces


def encode_prompt(lm: LanguageModel, prompt: str) -> list[int]:
    """Tokens of a prompt; for an empty one, the tokenizer's BOS token, or else its EOS token.

    :raises InputError: the prompt is empty, and the tokenizer has neither.
    """
    tokens, start = lm.encode(prompt).tolist(), lm.tokenizer.bos_token_id
    start = lm.tokenizer.eos_token_id if start is None else start
    if not tokens and start is None:
        raise InputError(f"the prompt is empty, and {lm.name} has no token that begins or ends a text; give some text")
    return tokens or [start]

"""Tokens to text, piece by piece, and prompts to tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from knnlm.errors import InputError
from knnlm.inference.model import KNNLM
from knnlm.model.lm import LanguageModel

# What a decoder puts in the place of bytes that are no character, or not yet.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Tokens of the prompt that its continuation is decoded with: more than those of any one character.
_WINDOW = 8


class Detokenizer:
    """From tokens to pieces of text as they come, none of which ends inside a character.

    Together the pieces are what all tokens decoded at once have after the text of those `before`, but only the tokens
    of the last piece are decoded again: some tokenizers drop the space before a first word.

    :param hidden: tokens that are no text, as those that end it.
    """

    def __init__(self, lm: LanguageModel, before: Sequence[int], hidden: Collection[int]) -> None:
        self._lm, self._hidden = lm, hidden
        self._tokens = list(before[-_WINDOW:])
        self._shown = len(self._tokens)
        self._length = len(lm.decode(self._tokens))

    def put(self, token: int) -> str:
        """The text that is complete with this token: often none, or more than its own."""
        if token in self._hidden:
            return ""
        self._tokens.append(token)
        text = self._lm.decode(self._tokens)
        return "" if text.endswith(INCOMPLETE) else self._show(text)

    def rest(self) -> str:
        """What stayed incomplete."""
        return self._show(self._lm.decode(self._tokens))

    def _show(self, text: str) -> str:
        piece = text[self._length :]
        self._tokens = self._tokens[self._shown :] or self._tokens
        self._shown, self._length = len(self._tokens), len(self._lm.decode(self._tokens))
        return piece


class TokenTexts:
    """Each token as it stands inside a text: some tokenizers drop the space before a first word."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._anchor = lm.encode(lm.word).tolist()[-1:]
        self._length = len(lm.decode(self._anchor))
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """Its text; with `INCOMPLETE` where it is a piece of a character."""
        if token not in self._known:
            self._known[token] = self._lm.decode([*self._anchor, token])[self._length :]
        return self._known[token]


def end_tokens(model: KNNLM, lm: LanguageModel) -> frozenset[int]:
    """The tokens that end a text: those of the model's generation settings, else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = ends if ends is not None else lm.tokenizer.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [ends]) - {None}


def encode_prompt(lm: LanguageModel, prompt: str) -> list[int]:
    """The prompt's tokens; of an empty one, the token that begins a text, or else the one that ended the last.

    :raises InputError: no tokens at all.
    """
    tokens, start = lm.encode(prompt).tolist(), lm.tokenizer.bos_token_id
    start = lm.tokenizer.eos_token_id if start is None else start
    if not tokens and start is None:
        raise InputError(f"the prompt is empty, and {lm.name} has no token that begins or ends a text; give some text")
    return tokens or [start]

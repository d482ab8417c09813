"""From next-token distributions to pieces of an answer. Runs on the model's thread.

Shapes: T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from knnlm.errors import InputError
from knnlm.inference.cite import Citation
from knnlm.inference.copying import CopyGuard
from knnlm.inference.detokenizer import INCOMPLETE, Detokenizer, TokenTexts
from knnlm.inference.sampling import choose
from knnlm.knn.retrieval import Retrieval
from knnlm.model.lm import LanguageModel
from knnlm.server.refusals import Refusal
from knnlm.utf8 import byte_places

Finish = Literal["stop", "length"]
LEAST = -9999.0
"""OpenAI's value in place of -inf, which JSON does not have."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """Options of a request that apply to each choice."""

    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    logprobs: int | None
    """Number of likeliest tokens reported with each token; None reports no log-probabilities."""
    echo: bool

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are wanted."""
        return self.echo and self.logprobs is not None


@dataclass(frozen=True)
class TokenScore:
    """A token of an answer, the offset of its text, and its log-probabilities under the mixed distribution."""

    token: int
    offset: int
    log_prob: float | None = None
    """None for a prompt's first token."""
    top: tuple[tuple[int, float], ...] = ()
    """The requested number of likeliest tokens, with their log-probabilities."""
    name: str | None = None
    """Text of the token in the prompt, if it differs from the text of the token alone."""


@dataclass(frozen=True)
class Piece:
    """Output added to a choice by one step."""

    choice: int
    text: str
    scores: tuple[TokenScore, ...] = ()
    finish: Finish | None = None
    tokens: int = 0
    """Number of tokens generated for the choice so far, with the end token."""
    citation: Citation | None = None
    """With the last piece, if wanted: the documents behind all generated tokens."""


Emit = Callable[[Piece | Exception], object]
Cite = Callable[[Sequence[int], int], Citation]
"""Cites the tokens from the given number on."""


class Words:
    """Text of the model's tokens."""

    def __init__(self, lm: LanguageModel, ends: frozenset[int]) -> None:
        self.lm, self.ends = lm, ends
        self._no_text = {*ends, lm.tokenizer.bos_token_id}
        self._special = frozenset(lm.tokenizer.all_special_ids)
        self._texts = TokenTexts(lm)

    def name(self, token: int) -> str:
        """Text of a token; for part of a character, or no text, the tokenizer's name for it.

        A row of the LM head without a token is `token_id:ID`, so that such rows have distinct names.
        """
        text = self._texts(token)
        if text and INCOMPLETE not in text:
            return text
        return str(self.lm.tokenizer.convert_ids_to_tokens(token) or f"token_id:{token}")

    def bytes(self, token: int) -> list[int] | None:
        """UTF-8 bytes of a token's text; None if it is part of a character."""
        text = self._texts(token)
        return None if INCOMPLETE in text else list(text.encode())

    def text(self, tokens: Sequence[int]) -> str:
        """Text of a prompt given as tokens, without BOS and end tokens."""
        return self.lm.decode([token for token in tokens if token not in self._no_text])

    def places(self, tokens: Sequence[int], text: str) -> tuple[list[int], list[str]]:
        """Return each token's offset in the text, in characters, and its name: the text there, if it differs.

        It differs for tokens that the tokenizer normalises, and for a first word before which it adds a space.
        """
        ends = self._ends(tokens, text)
        starts, names = [0, *ends][: len(tokens)], []
        for token, start, end in zip(tokens, starts, ends, strict=True):
            name = self.name(token)
            is_added = token in self._special and start == end
            stands = text.startswith(name, start) or is_added or INCOMPLETE in self._texts(token)
            names.append(name if stands else text[start:end])
        return starts, names

    def _ends(self, tokens: Sequence[int], text: str) -> list[int]:
        """Return each token's end in the text, in characters; one that ends inside a character ends before it."""
        known, bytes_N = self.lm.encode_with_ends(text)
        if known.tolist() == list(tokens):
            ends: list[int] = (np.searchsorted(byte_places(text), bytes_N, side="right") - 1).tolist()
            return ends
        pieces, length, ends = Detokenizer(self.lm, (), self._no_text), 0, []
        for token in tokens:
            piece, name = pieces.put(token), self.name(token)
            if ends and piece.endswith(name):  # the piece begins with text that earlier tokens left incomplete
                ends[-1] += len(piece) - len(name)
            length += len(piece)
            ends.append(min(length, len(text)))
        return ends

    def likeliest(
        self, log_probs_TV: Tensor, tokens: Sequence[int], top: int
    ) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
        """Return each token's log-probability, and the `top` likeliest tokens with theirs."""
        tokens_T = torch.tensor(tokens, dtype=torch.long, device=log_probs_TV.device)
        values = log_probs_TV.gather(1, tokens_T[:, None])[:, 0].tolist()
        best = log_probs_TV.topk(min(top, log_probs_TV.shape[1]), dim=1)
        return [
            (max(value, LEAST), tuple((other, max(prob, LEAST)) for other, prob in zip(others, probs, strict=True)))
            for value, probs, others in zip(values, best.values.tolist(), best.indices.tolist(), strict=True)
        ]


class AnswerChoice:
    """One continuation: its tokens, one for each distribution passed to `take`, and the text that is complete."""

    token: int
    """The last token."""
    finish: Finish | None = None
    """Why it ended: `stop` (end token or stop string) or `length`."""

    def __init__(self, words: Words, prompt: Prompt, index: int, random: np.random.Generator) -> None:
        self._words, self._wish, self._index, self._random = words, prompt.wish, index, random
        self._pieces = Detokenizer(words.lm, prompt.tokens, words.ends)
        self._base = len(prompt.text) if prompt.wish.echo else 0
        self._text, self._shown, self._cut = "", 0, False
        self._prompt, self._tokens = prompt, list[int]()
        self._scores: list[TokenScore] = []

    def begin(self, text: str, scores: Sequence[TokenScore]) -> Piece:
        """Return the first piece: the prompt, if it is echoed. The choice ends here if no tokens are wanted."""
        self.finish = None if self._wish.max_tokens else "length"
        return Piece(self._index, text, tuple(scores), self.finish)

    def take(self, log_probs_V: Tensor) -> Piece:
        """Choose the next token and return the piece that it adds. `log_probs_V` is on the CPU."""
        if self._prompt.guard is not None:
            log_probs_V = self._prompt.guard.apply(self._tokens, log_probs_V)
        self.token = choose(log_probs_V, self._wish.temperature, self._wish.top_p, self._random)
        self._tokens.append(self.token)
        piece = self._pieces.put(self.token)
        self._score(log_probs_V, piece)
        self._grow(piece)
        ended = self.token in self._words.ends
        if self.finish is None and (ended or len(self._tokens) == self._wish.max_tokens):
            self._grow(self._pieces.rest())
            if not self._cut:
                self.finish = "stop" if ended else "length"
        return self._show()

    def _score(self, log_probs_V: Tensor, piece: str) -> None:
        if self._wish.logprobs is not None:
            ((value, top),) = self._words.likeliest(log_probs_V[None], [self.token], self._wish.logprobs)
            # The piece may begin with text that earlier tokens left incomplete.
            name = self._words.name(self.token)
            late = len(piece) - len(name) if piece.endswith(name) else 0
            self._scores.append(TokenScore(self.token, self._base + len(self._text) + late, value, top))

    def _grow(self, piece: str) -> None:
        """Append text, cut off where a stop string begins."""
        known, self._text = len(self._text), self._text + piece
        starts = [self._text.find(stop, max(0, known - len(stop) + 1)) for stop in self._wish.stop]
        if found := [start for start in starts if start >= 0]:
            self._text, self._cut, self.finish = self._text[: min(found)], True, "stop"

    def _held(self) -> int:
        """Number of characters at the end that may be the beginning of a stop string."""
        ends = ((stop, min(len(stop) - 1, len(self._text))) for stop in self._wish.stop)
        sizes = (size for stop, most in ends for size in range(most, 0, -1) if self._text.endswith(stop[:size]))
        return max(sizes, default=0)

    def _show(self) -> Piece:
        shown = len(self._text) - (0 if self.finish else self._held())
        whole = self.finish and not self._cut  # then tokens without text, such as the end token, are reported too
        scores = [one for one in self._scores if whole or one.offset < self._base + shown]
        told, count, cite = self._text[self._shown : shown], len(self._tokens), self._prompt.cite
        read = self._prompt.tokens
        citation = cite([*read, *self._tokens], len(read)) if cite is not None and self.finish else None
        piece = Piece(self._index, told, tuple(scores), self.finish, count, citation)
        self._shown, self._scores = max(self._shown, shown), self._scores[len(scores) :]
        return piece


class Prompt:
    """One prompt of a request, and its `n` choices.

    :param text: the text given by the client, or that of the given tokens.
    :param retrieval: what it is answered from, whatever is served by the time of its end.
    :param first: index of its first choice in the answer.
    :param seed: the same seed gives the same choices; None is random.
    :param guard: against runs of the datastore's text in an answer.
    :param cite: finds the documents behind an answer, if they are wanted.
    """

    cancelled = False
    """Whether its request was cancelled."""
    emit: Emit
    """Called on the model's thread with each piece, or with an exception."""

    def __init__(
        self,
        words: Words,
        tokens: list[int],
        text: str,
        retrieval: Retrieval,
        wish: Wish,
        *,
        first: int,
        n: int,
        seed: int | None,
        guard: CopyGuard | None = None,
        cite: Cite | None = None,
    ) -> None:
        self.guard, self.cite = guard, cite
        self.tokens, self.text, self.retrieval, self.wish, self._words = tokens, text, retrieval, wish, words
        self._first = first
        self._offsets, self._names = words.places(tokens, text) if self.is_scored else ([], [])
        self._scores: list[TokenScore] = []
        self.choices = [AnswerChoice(words, self, first + each, _generator(seed, each)) for each in range(n)]

    @property
    def numbers(self) -> range:
        """Indices of its choices in the answer."""
        return range(self._first, self._first + len(self.choices))

    @property
    def is_scored(self) -> bool:
        """Whether the log-probabilities of its tokens are wanted."""
        return self.wish.scores_prompt

    def score(self, position: int, log_probs_TV: Tensor) -> None:
        """Score the tokens after `position` and the positions that follow it; those of padding are negative."""
        known = log_probs_TV[max(0, -position) :]
        position = max(0, position)
        if position == 0 and len(known):
            self._scores.append(TokenScore(self.tokens[0], self._offsets[0], name=self._names[0]))
        part = slice(position + 1, position + 1 + len(known))
        targets = self.tokens[part]
        found = self._words.likeliest(known[: len(targets)], targets, self.wish.logprobs or 0)
        places = zip(targets, self._offsets[part], self._names[part], found, strict=True)
        self._scores += [TokenScore(token, start, *one, name=name) for token, start, name, one in places]

    def begin(self) -> None:
        """Emit the first piece of each choice."""
        for choice in self.choices:
            self.emit(choice.begin(self.text if self.wish.echo else "", self._scores))

    def advance(self, choice: AnswerChoice, log_probs_V: Tensor) -> None:
        """Emit the next piece of a choice; if the guard leaves no token, the request ends with that, and no other."""
        try:
            self.emit(choice.take(log_probs_V))
        except InputError as error:
            self.cancelled = True
            self.emit(Refusal(400, str(error), param="knn.max_copy"))


def _generator(seed: int | None, choice: int) -> np.random.Generator:
    return np.random.default_rng(None if seed is None else [seed % (1 << 64), choice])

"""From a prompt to its continuation, as text: whole, or piece by piece while it is generated."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knnlm.errors import InputError
from knnlm.inference.detokenizer import Detokenizer, encode_prompt, end_tokens
from knnlm.inference.model import KNNLM
from knnlm.model.lm import LanguageModel

Write = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are taken from the mixed distribution: the likeliest, or drawn if one of the two is given."""

    max_new_tokens: int = 64
    temperature: float | None = None
    """Below 1 the distribution that is drawn from is sharpened, above 1 flattened."""
    top_p: float | None = None
    """Only the likeliest tokens that together have this probability are drawn."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"`max_new_tokens` is {self.max_new_tokens}, but must be at least 1")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise InputError(
                f"`decoding.temperature` is {self.temperature}, but must be above 0; leave it out for no chance"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"`top_p` is {self.top_p}, but must be above 0 and at most 1")

    @property
    def options(self) -> dict[str, Any]:
        """As arguments of `generate()`."""
        if self.temperature is None and self.top_p is None:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        temperature, top_p = self.temperature or 1.0, self.top_p or 1.0
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, **drawn}


@dataclass(frozen=True)
class Continuation:
    """What followed a prompt."""

    prompt: str
    text: str
    """Without the end token."""
    tokens: int
    """Generated, the end token among them."""
    ended: bool
    """By the end token, not by `max_new_tokens`."""


class Writer:
    """Continues prompts with a kNN-LM. Of the model's own generation settings only the special tokens count."""

    def __init__(self, model: KNNLM, lm: LanguageModel, decoding: Decoding) -> None:
        self._model, self._lm, self._decoding = model, lm, decoding
        self._ends, own = end_tokens(model, lm), model.generation_config
        padding = own.pad_token_id if own.pad_token_id is not None else min(self._ends, default=0)
        model.generation_config = type(own)(eos_token_id=sorted(self._ends) or None, pad_token_id=padding)

    def encode(self, prompt: str) -> list[int]:
        """The prompt's tokens; of an empty one, the token that begins a text.

        :raises InputError: no tokens at all, or more than the model takes with those to be generated.
        """
        tokens = encode_prompt(self._lm, prompt)
        limit, new = self._lm.context_limit, self._decoding.max_new_tokens
        if limit is not None and len(tokens) + new > limit:
            raise InputError(
                f"a prompt of {len(tokens)} tokens and `max_new_tokens={new}` are more than the {limit} that "
                f"{self._lm.name} takes; shorten one of them"
            )
        return tokens

    def __call__(self, prompt: str, write: Write | None = None) -> Continuation:
        """Continue a prompt; `write` gets each piece of text as soon as it is whole. Raises as `encode`."""
        tokens = self.encode(prompt)
        pieces = _Pieces(self._lm, tokens, self._ends, write or (lambda piece: None))
        ids = torch.tensor([tokens], device=self._lm.device)
        options = {**self._decoding.options, "attention_mask": torch.ones_like(ids)}
        new = self._model.generate(ids, streamer=pieces, **options)[0, len(tokens) :].tolist()
        return Continuation(prompt, pieces.text, len(new), new[-1] in self._ends)


class _Pieces:
    """A streamer of `generate()`: from tokens to pieces of text."""

    def __init__(self, lm: LanguageModel, prompt: list[int], ends: Collection[int], write: Write) -> None:
        self._text, self._write = Detokenizer(lm, prompt, ends), write
        self._prompt_is_due = True
        self.text = ""

    def put(self, tokens: Tensor) -> None:
        """The first call brings the prompt."""
        if self._prompt_is_due:
            self._prompt_is_due = False
            return
        for token in tokens.flatten().tolist():
            self._give(self._text.put(token))

    def end(self) -> None:
        """What is incomplete stays so."""
        self._give(self._text.rest())

    def _give(self, piece: str) -> None:
        self.text += piece
        if piece:
            self._write(piece)

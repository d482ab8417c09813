"""Text generation: a prompt's continuation as text, whole or streamed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knnlm.errors import InputError
from knnlm.inference.copying import GuardProcessor
from knnlm.inference.detokenizer import Detokenizer, encode_prompt, end_tokens
from knnlm.inference.model import KNNLM
from knnlm.model.lm import LanguageModel

Write = Callable[[str], None]
# Sampling divides float32 scores by the temperature: by 1e-37 they would be infinite.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen from the mixed distribution: the likeliest, or drawn if `temperature` or `top_p` is set."""

    max_new_tokens: int = 64
    temperature: float | None = None
    """Temperature of sampling: below 1 sharpens the distribution, above 1 flattens it."""
    top_p: float | None = None
    """Nucleus sampling: draw among the likeliest tokens that together have this probability."""
    max_copy: int | None = None
    """The longest run of generated tokens that may stand verbatim in one document of the datastore; None: any."""

    def __post_init__(self) -> None:
        if self.max_copy is not None and self.max_copy < 1:
            raise InputError(f"`max_copy` is {self.max_copy}, but must be at least 1; leave it out for no limit")
        if self.max_new_tokens < 1:
            raise InputError(f"`max_new_tokens` is {self.max_new_tokens}, but must be at least 1")
        if self.temperature is not None and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise InputError(
                f"`decoding.temperature` is {self.temperature}, but must be finite and at least {LEAST_TEMPERATURE}; "
                "leave it out for no chance"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"`top_p` is {self.top_p}, but must be above 0 and at most 1")

    @property
    def options(self) -> dict[str, Any]:
        """The same as arguments of `generate()`."""
        if self.temperature is None and self.top_p is None:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        temperature, top_p = self.temperature or 1.0, self.top_p or 1.0
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, **drawn}


@dataclass(frozen=True)
class Continuation:
    """A prompt and its continuation."""

    prompt: str
    text: str
    """Without the end token."""
    tokens: int
    """Number of generated tokens, with the end token."""
    ended: bool
    """Whether the end token ended it, not `max_new_tokens`."""


class Writer:
    """Continues prompts with a kNN-LM. Only the special tokens of the model's generation settings are used."""

    def __init__(self, model: KNNLM, lm: LanguageModel, decoding: Decoding) -> None:
        self._model, self._lm, self._decoding = model, lm, decoding
        self._ends, own = end_tokens(model, lm), model.generation_config
        padding = own.pad_token_id if own.pad_token_id is not None else min(self._ends, default=0)
        model.generation_config = type(own)(eos_token_id=sorted(self._ends) or None, pad_token_id=padding)

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a prompt; as `encode_prompt`.

        :raises InputError: no tokens, or too many for the model's context together with those to be generated.
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
        """Continue a prompt; `write` is called with each piece of text once it is complete. Raises as `encode`."""
        tokens = self.encode(prompt)
        pieces = _Pieces(self._lm, tokens, self._ends, write or (lambda piece: None))
        ids = torch.tensor([tokens], device=self._lm.device)
        options = {**self._decoding.options, "attention_mask": torch.ones_like(ids)}
        if self._decoding.max_copy is not None:
            options["logits_processor"] = [GuardProcessor(self._model.copy_guard(self._decoding.max_copy), len(tokens))]
        new = self._model.generate(ids, streamer=pieces, **options)[0, len(tokens) :].tolist()
        return Continuation(prompt, pieces.text, len(new), new[-1] in self._ends)


class _Pieces:
    """A streamer for `generate()` that turns tokens into pieces of text."""

    def __init__(self, lm: LanguageModel, prompt: list[int], ends: Collection[int], write: Write) -> None:
        self._text, self._write = Detokenizer(lm, prompt, ends), write
        self._prompt_is_due = True
        self.text = ""

    def put(self, tokens: Tensor) -> None:
        """Decode new tokens; the first call passes the prompt, which is skipped."""
        if self._prompt_is_due:
            self._prompt_is_due = False
            return
        for token in tokens.flatten().tolist():
            self._give(self._text.put(token))

    def end(self) -> None:
        """Write the remaining, incomplete text."""
        self._give(self._text.rest())

    def _give(self, piece: str) -> None:
        self.text += piece
        if piece:
            self._write(piece)

"""Continuous batching: rows are continued together, token by token, and may join or leave between steps.

Rows are padded on the left, masked, so that all end in the same column. The keys and values in the cache of
`transformers` are sliced and concatenated with the rows. A model without a cache, or with an unknown kind of cache,
computes whole rows at every step: the result is the same, but slower.

Shapes: B batch, T time, V vocabulary.
"""

# ruff: noqa: ANN401 - caches and outputs are the architecture's own
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from knnlm.inference.model import KNNLM
from knnlm.knn.retrieval import Retrieval, RowRetrieval

ReceiveLogProbs = Callable[[int, Tensor], None]
"""Called with the first position of a chunk and the chunk's log-probabilities [B, T, V]."""
# Cache layers that hold only keys and values [B, heads, T, D] of the last positions.
_KNOWN_CACHES = {"DynamicLayer", "DynamicSlidingWindowLayer"}
# Most log-probabilities of prompts computed at once (64 MB in float32).
_PROMPT_SCORES = 1 << 24


class RowModel:
    """A kNN-LM with a retrieval for each row, all of one layer. Not thread-safe: it changes the model's `retrieval`."""

    def __init__(self, model: KNNLM, vocabulary: int) -> None:
        self._model, self.vocabulary = model, vocabulary
        self._takes = set(inspect.signature(type(model).forward).parameters)
        token_BT = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        cached = "past_key_values" in self._takes
        self.keeps_cache = cached and _is_known(model(token_BT, use_cache=True).past_key_values)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        retrievals: Sequence[Retrieval],
        receive: ReceiveLogProbs | None = None,
    ) -> tuple[RunningBatch, Tensor]:
        """Read non-empty prompts; return the batch and the log-probabilities of the next token, float32 [B, V].

        :param receive: called with the log-probabilities of all positions, in chunks. Without it only the last position
            of each prompt is searched for.
        """
        length, device = max(map(len, prompts)), self._model.device
        tokens_BT = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask_BT = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        batch = RunningBatch(self, tokens_BT, mask_BT, list(retrievals))
        if receive is None:
            return batch, batch.read(0, length)
        size = max(1, _PROMPT_SCORES // (len(prompts) * self.vocabulary)) if self.keeps_cache else length
        for start in range(0, length, size):
            log_probs_BTV = batch.forward(start, min(start + size, length), keep=0)
            receive(start, log_probs_BTV)
        return batch, log_probs_BTV[:, -1]

    def run(
        self, start: int, text: tuple[Tensor, Tensor], cache: Any, retrievals: Sequence[Retrieval], keep: int
    ) -> Any:
        """Return the output for the rows' tokens from `start` on; the cache, if there is one, holds the earlier ones.

        :param text: all tokens of the rows, and their mask.
        """
        tokens_BT, mask_BT = text[0][:, start:], text[1]
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, start:]
        given = {
            "attention_mask": mask_BT,
            "position_ids": positions_BT,
            "past_key_values": cache,
            "use_cache": self.keeps_cache,
            "logits_to_keep": keep,
        }
        first = retrievals[0]
        self._model.retrieval = RowRetrieval(first.searcher, first.setting, tuple(retrievals))
        taken = {name: value for name, value in given.items() if name in self._takes}
        return self._model(tokens_BT, **taken, text_so_far=text)


@dataclass
class RunningBatch:
    """Rows continued together, with their mask, retrievals and cache."""

    model: RowModel
    tokens_BT: Tensor
    mask_BT: Tensor
    retrievals: list[Retrieval]
    cache: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.retrievals)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to each row; return the log-probabilities of the next one, float32 [B, V]."""
        new_B1 = torch.tensor(tokens, device=self.tokens_BT.device)[:, None]
        self.tokens_BT = torch.cat([self.tokens_BT, new_B1], 1)
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(new_B1)], 1)
        length = self.tokens_BT.shape[1]
        return self.read(length - 1 if self.model.keeps_cache else 0, length)

    def read(self, start: int, stop: int) -> Tensor:
        """Log-probabilities [B, V] of the token after position `stop - 1`; columns from `start` on are computed."""
        return self.forward(start, stop, keep=1)[:, -1]

    def forward(self, start: int, stop: int, *, keep: int) -> Tensor:
        """Log-probabilities [B, T, V] at the last `keep` positions, 0 for all; the cache holds those before `start`."""
        text = self.tokens_BT[:, :stop], self.mask_BT[:, :stop]
        output = self.model.run(start, text, self.cache, self.retrievals, keep)
        if self.model.keeps_cache:
            self.cache = output.past_key_values
        log_probs_BTV: Tensor = output.logits
        return log_probs_BTV

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a repeated row is duplicated."""
        self.retrievals = [self.retrievals[row] for row in rows]
        chosen = torch.tensor(rows, dtype=torch.long, device=self.tokens_BT.device)
        self.tokens_BT, self.mask_BT = self.tokens_BT[chosen], self.mask_BT[chosen]
        for layer in self._layers():
            layer.batch_select_indices(chosen)
        if rows:
            self._resize(int(self.mask_BT.sum(1).max()))

    def join(self, other: RunningBatch) -> None:
        """Append the rows of another batch, which must not be used afterwards."""
        length = max(self.tokens_BT.shape[1], other.tokens_BT.shape[1])
        for one in (self, other):
            one._resize(length)
        self.retrievals += other.retrievals
        self.tokens_BT = torch.cat([self.tokens_BT, other.tokens_BT])
        self.mask_BT = torch.cat([self.mask_BT, other.mask_BT])
        for layer, added in zip(self._layers(), other._layers(), strict=True):
            layer.keys = torch.cat([layer.keys, added.keys])
            layer.values = torch.cat([layer.values, added.values])

    def _resize(self, length: int) -> None:
        """Add or remove padding on the left, so that the rows have `length` columns."""
        more = length - self.tokens_BT.shape[1]
        self.tokens_BT, self.mask_BT = pad(self.tokens_BT, (more, 0)), pad(self.mask_BT, (more, 0))
        for layer in self._layers():
            held = length
            if hasattr(layer, "cumulative_length"):  # a sliding window holds only the last columns
                layer.cumulative_length = length
                held = min(length, layer.sliding_window - 1)
            change = (0, 0, held - layer.keys.shape[2], 0)
            layer.keys, layer.values = pad(layer.keys, change), pad(layer.values, change)

    def _layers(self) -> list[Any]:
        """Cache layers in use; models that share them between blocks leave the others empty."""
        return [layer for layer in getattr(self.cache, "layers", ()) if layer.is_initialized]


def _is_known(cache: Any) -> bool:
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    return bool(kinds) and kinds <= _KNOWN_CACHES

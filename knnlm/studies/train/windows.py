"""Training data: one long row of tokens for each domain, and windows of it in a fixed order.

Legend: N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from knnlm.errors import InputError
from knnlm.model.lm import LanguageModel
from knnlm.text.corpus import read_documents, tokenize
from knnlm.text.held_out import MIN_SECTION, hold_out
from knnlm.text.windows import Fingerprint, TokenDocument

# Tokens of held-out text to evaluate, in windows spread evenly over it: enough to distinguish losses, and quick.
VALIDATION_TOKENS = 16_384
# Enough sections to train on beside the one held out.
LEAST_TOKENS = 10 * MIN_SECTION


@dataclass(frozen=True, eq=False)
class Domain:
    """Training and validation tokens of one text; each document ends with the tokenizer's end token."""

    training_N: NDArray[np.int32]
    validation_N: NDArray[np.int32]
    fingerprint: str


def read_domain(
    lm: LanguageModel, paths: Sequence[str | Path], *, text_field: str, context: int, seed: int, field: str
) -> Domain:
    """Read a text and hold out a tenth of it, as `knnlm run` does with the same seed.

    :raises InputError: the text is missing, empty or shorter than a window; the message names `field`.
    """
    fingerprint, documents = Fingerprint(), list(tokenize(read_documents(paths, text_field=text_field), lm.encode))
    for document in documents:
        fingerprint.update(document)
    total = sum(len(document.tokens) for document in documents)
    if total < LEAST_TOKENS:
        raise InputError(f"`{field}` has {total:,} tokens, too few to train on; give at least {LEAST_TOKENS}")
    held_out = hold_out(documents, seed=seed)
    training_N = _join(list(held_out.training), lm.tokenizer.eos_token_id)
    validation_N = _join(held_out.evaluation, lm.tokenizer.eos_token_id)
    if min(len(training_N), len(validation_N)) < context:
        raise InputError(
            f"`{field}` has {len(training_N):,} tokens to train on and {len(validation_N):,} held out, but a window "
            f"takes {context}; give more text, or a smaller `context`"
        )
    return Domain(training_N, validation_N, fingerprint.hexdigest())


def _join(documents: Sequence[TokenDocument], end: int | None) -> NDArray[np.int32]:
    close = np.array([] if end is None else [end], np.int32)
    return np.concatenate([np.array([], np.int32), *(part for one in documents for part in (one.tokens, close))])


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of `context` tokens by number; domains alternate, so that a batch of even size has half of each."""

    def __init__(self, rows: Sequence[NDArray[np.int32]], starts: Sequence[NDArray[np.int64]], context: int) -> None:
        self._rows, self._starts, self._context = rows, starts, context

    def __len__(self) -> int:
        return sum(map(len, self._starts))

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return `input_ids` and `labels`, [T], and the number of the `domain`."""
        position, domain = divmod(number, len(self._rows))
        start = self._starts[domain][position]
        tokens_T = torch.from_numpy(self._rows[domain][start : start + self._context]).long()
        return {"input_ids": tokens_T, "labels": tokens_T, "domain": torch.tensor(domain)}


def training_windows(rows: Sequence[NDArray[np.int32]], context: int, count: int, seed: int) -> Windows:
    """`count` windows in random order; each epoch shuffles the whole text with another offset of the windows."""
    rngs = np.random.default_rng(seed).spawn(len(rows))
    share = count // len(rows)
    starts = [_shuffled(len(row), context, share, rng) for row, rng in zip(rows, rngs, strict=True)]
    return Windows(rows, starts, context)


def _shuffled(tokens: int, context: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    epochs: list[NDArray[np.int64]] = []
    while sum(map(len, epochs)) < count:
        offset = rng.integers(min(context, tokens - context + 1))
        epochs.append(rng.permutation(np.arange(offset, tokens - context + 1, context)))
    return np.concatenate(epochs)[:count]


def validation_windows(row: NDArray[np.int32], context: int) -> Windows:
    """Disjoint windows, at most `VALIDATION_TOKENS` tokens in all, spread evenly over the text."""
    count = min(len(row) // context, max(1, VALIDATION_TOKENS // context))
    numbers = np.linspace(0, len(row) // context - 1, count).round().astype(np.int64)
    return Windows([row], [numbers * context], context)

"""A model on many short inputs: last vectors, dispersion within an input, likelihoods of endings.

Inputs are sorted by length, so that a batch has little padding; results are in the order of the inputs.

Legend: Q prompts, B prompts of a batch, T positions of the longest of them, D dimension, N predicted tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm.config import BATCH_TOKENS
from knnlm.extraction.passes import forward, forward_to_head
from knnlm.model.lm import LanguageModel
from knnlm.progress import Advance, ignore
from knnlm.scores.dispersion import Span, span_dispersions
from knnlm.text.windows import Batch, Window, batches

Float64 = NDArray[np.float64]

# Rows of the head's output at once, when only their largest probability is wanted.
_ROWS = 64


@dataclass(frozen=True, eq=False)
class PromptVectors:
    """One layer's vectors of Q prompts, summarised."""

    last_QD: NDArray[np.float32]
    """The vector of each prompt's last token."""
    within_Q: Float64
    """Dispersion of the vectors of all of a prompt's tokens; NaN for a prompt of one token."""


def read_prompts(
    lm: LanguageModel, prompts: Sequence[Window], layers: Sequence[str], *, advance: Advance = ignore
) -> Mapping[str, PromptVectors]:
    """Run the model once over the prompts.

    :raises ModelError: a layer gives a vector that is zero or not finite; names the prompt.
    """
    count = len(prompts)
    found = {layer: PromptVectors(np.empty((count, lm.dims[layer]), np.float32), np.empty(count)) for layer in layers}
    for places_B, batch in _by_length(prompts, advance):
        forward(lm, batch, layers, partial(_keep, found, places_B, batch), unit="item")
    return found


def _keep(
    found: Mapping[str, PromptVectors], places_B: NDArray[np.intp], batch: Batch, layer: str, vectors_BTD: Tensor
) -> None:
    spans = [Span(row, 0, len(prompt.inputs), 0) for row, prompt in enumerate(batch.windows)]
    found[layer].within_Q[places_B] = span_dispersions(vectors_BTD, spans)
    rows, ends = torch.arange(len(spans)), torch.from_numpy(batch.lengths_B) - 1
    found[layer].last_QD[places_B] = vectors_BTD[rows, ends].float().cpu().numpy()


def log_likelihoods(lm: LanguageModel, prompts: Sequence[Window], *, advance: Advance = ignore) -> Float64:
    """Return the log-likelihood of each prompt's ending `targets[first:]` given what comes before, float64 [Q]."""
    sums_Q = np.empty(len(prompts))
    for places_B, batch in _by_length(prompts, advance):
        sums_Q[places_B] = _ending_sums(lm, forward_to_head(lm, batch, ()), batch)
    return sums_Q


def _ending_sums(lm: LanguageModel, final_BTD: Tensor, batch: Batch) -> Float64:
    endings = [prompt.targets[prompt.first :] for prompt in batch.windows]
    final_ND = torch.cat(
        [final_BTD[row, prompt.first : len(prompt.inputs)] for row, prompt in enumerate(batch.windows)]
    )
    targets_N = torch.from_numpy(np.concatenate(endings).astype(np.int64))
    log_probs_N = lm.target_log_probs(final_ND, targets_N).numpy()
    begins = np.cumsum([0, *map(len, endings[:-1])])
    sums_B: Float64 = np.add.reduceat(log_probs_N, begins)
    return sums_B


def most_likely_next(lm: LanguageModel, final_QD: NDArray[np.float32]) -> tuple[NDArray[np.int64], Float64]:
    """Return the most likely next token for each `final_norm` vector, and its probability; [Q] each."""
    tokens, log_probs = [np.empty(0, np.int64)], [np.empty(0)]
    for final_ND in torch.split(torch.from_numpy(final_QD), _ROWS):
        best = lm.log_probs(final_ND).max(dim=-1)
        tokens.append(best.indices.cpu().numpy())
        log_probs.append(best.values.double().cpu().numpy())
    return np.concatenate(tokens), np.exp(np.concatenate(log_probs))


def _by_length(prompts: Sequence[Window], advance: Advance) -> Iterator[tuple[NDArray[np.intp], Batch]]:
    """Batches of prompts of similar length, the longest first, each with its prompts' places in the list."""
    order_Q = np.argsort([-len(prompt.inputs) for prompt in prompts], kind="stable")
    done = 0
    for batch in batches((prompts[place] for place in order_Q), BATCH_TOKENS):
        count = len(batch.windows)
        yield order_Q[done : done + count], batch
        done += count
        advance(done, len(prompts))

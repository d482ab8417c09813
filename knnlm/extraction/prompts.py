"""What a model makes of many short inputs: the vector that each ends in, the dispersion inside, likelihoods of endings.

Inputs are sorted by length, so that a batch has little padding; results are in the order of the inputs.

Legend: Q queries, B queries of a batch, T positions of the longest of them, D dimension, N predicted tokens.
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
from knnlm.errors import ModelError
from knnlm.layer_names import FINAL
from knnlm.model.decoder import Receive
from knnlm.model.lm import LanguageModel
from knnlm.progress import Advance, ignore
from knnlm.scores.dispersion import BadVector, Span, span_dispersions
from knnlm.text.windows import Batch, Window, batches

Float64 = NDArray[np.float64]

# Rows of the head's output at once, when only their largest probability is wanted.
_ROWS = 64


@dataclass(frozen=True, eq=False)
class PromptVectors:
    """One layer's view of Q queries."""

    last_QD: NDArray[np.float32]
    """The vector of each query's last token."""
    within_Q: Float64
    """Dispersion of the vectors of all of a query's tokens; NaN for a query of one token."""


def read_prompts(
    lm: LanguageModel, queries: Sequence[Window], layers: Sequence[str], *, advance: Advance = ignore
) -> Mapping[str, PromptVectors]:
    """Run the model once over the queries' inputs.

    :raises ModelError: a layer gives a vector that is zero or not finite; names the query.
    """
    count = len(queries)
    found = {layer: PromptVectors(np.empty((count, lm.dims[layer]), np.float32), np.empty(count)) for layer in layers}
    for places_B, batch in _by_length(queries, advance):
        _forward(lm, batch, layers, partial(_keep, found, places_B, batch))
    return found


def _keep(
    found: Mapping[str, PromptVectors], places_B: NDArray[np.intp], batch: Batch, layer: str, vectors_BTD: Tensor
) -> None:
    spans = [Span(row, 0, len(query.inputs), 0) for row, query in enumerate(batch.windows)]
    try:
        found[layer].within_Q[places_B] = span_dispersions(vectors_BTD, spans)
    except BadVector as error:
        query = batch.windows[error.row]
        raise ModelError(
            f"layer {layer} gives a vector that {error.fault}, at token {query.start + error.position} of item "
            f"{query.number} of {query.source}; try `dtype='float32'`, or other `layers`"
        ) from None
    rows, ends = torch.arange(len(spans)), torch.from_numpy(batch.lengths_B) - 1
    found[layer].last_QD[places_B] = vectors_BTD[rows, ends].float().cpu().numpy()


def log_likelihoods(lm: LanguageModel, queries: Sequence[Window], *, advance: Advance = ignore) -> Float64:
    """The sum of log p over `targets[first:]` of each query, float64 [Q]: of its ending, given what comes before."""
    sums_Q = np.empty(len(queries))
    for places_B, batch in _by_length(queries, advance):
        # The head must not run inside its own hook, so the vectors are taken out first.
        final: list[Tensor] = []
        _forward(lm, batch, [FINAL], partial(_hold, final))
        sums_Q[places_B] = _ending_sums(lm, final[0], batch)
    return sums_Q


def _hold(held: list[Tensor], layer: str, vectors_BTD: Tensor) -> None:
    held.append(vectors_BTD)


def _ending_sums(lm: LanguageModel, final_BTD: Tensor, batch: Batch) -> Float64:
    endings = [query.targets[query.first :] for query in batch.windows]
    final_ND = torch.cat([final_BTD[row, query.first : len(query.inputs)] for row, query in enumerate(batch.windows)])
    targets_N = torch.from_numpy(np.concatenate(endings).astype(np.int64))
    log_probs_N = lm.target_log_probs(final_ND, targets_N).numpy()
    begins = np.cumsum([0, *map(len, endings[:-1])])
    sums_B: Float64 = np.add.reduceat(log_probs_N, begins)
    return sums_B


def most_likely_next(lm: LanguageModel, final_QD: NDArray[np.float32]) -> tuple[NDArray[np.int64], Float64]:
    """The most likely next token after each vector of the layer `final_norm`, and its probability; [Q] each."""
    tokens, log_probs = [np.empty(0, np.int64)], [np.empty(0)]
    for final_ND in torch.split(torch.from_numpy(final_QD), _ROWS):
        best = lm.log_probs(final_ND).max(dim=-1)
        tokens.append(best.indices.cpu().numpy())
        log_probs.append(best.values.double().cpu().numpy())
    return np.concatenate(tokens), np.exp(np.concatenate(log_probs))


def _forward(lm: LanguageModel, batch: Batch, layers: Sequence[str], receive: Receive) -> None:
    lm.forward(torch.from_numpy(batch.tokens_BT), torch.from_numpy(batch.lengths_B), layers, receive)


def _by_length(queries: Sequence[Window], advance: Advance) -> Iterator[tuple[NDArray[np.intp], Batch]]:
    """Batches of queries of like length, the longest first, each with its queries' places in the list."""
    order_Q = np.argsort([-len(query.inputs) for query in queries], kind="stable")
    done = 0
    for batch in batches((queries[place] for place in order_Q), BATCH_TOKENS):
        count = len(batch.windows)
        yield order_Q[done : done + count], batch
        done += count
        advance(done, len(queries))

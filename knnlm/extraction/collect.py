"""One forward pass over text: every wanted layer's vectors go to the scorer and to the datastore as they appear.

Legend: B windows of a batch, T positions, D dimension, N counted positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm.config import BATCH_TOKENS
from knnlm.errors import InputError, ModelError
from knnlm.extraction.sinks import Sink, TargetSink, make_sinks
from knnlm.layer_names import FINAL
from knnlm.model.lm import LanguageModel
from knnlm.progress import Advance, ignore
from knnlm.scores.dispersion import BadVector, Span
from knnlm.scores.layer_scorer import LayerScorer
from knnlm.store.writer import DatastoreWriter
from knnlm.text.clusters import CLUSTER_TOKENS
from knnlm.text.windows import Batch, Fingerprint, TokenDocument, Window, WindowConfig, batches, windows


@dataclass(frozen=True)
class Collected:
    """What one pass over the text counted, and for evaluation the target of every key."""

    tokens: int
    documents: int
    fingerprint: str
    targets_N: NDArray[np.int32] | None = None
    lm_log_probs_N: NDArray[np.float64] | None = None
    documents_N: NDArray[np.int64] | None = None


def collect(
    lm: LanguageModel,
    documents: Iterable[TokenDocument],
    config: WindowConfig,
    layers: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    scorer: LayerScorer | None = None,
    writer: DatastoreWriter | None = None,
    log_probs: bool = False,
    advance: Advance = ignore,
    stop: Callable[[LayerScorer], bool] | None = None,
) -> Collected:
    """Run the model over the documents' windows; each token with a predecessor in its document counts once.

    :param layers: whose vectors the scorer and the writer get.
    :param log_probs: also keep the plain LM's log-probability of every target.
    :param stop: asked after every batch whether the scores are sure enough.
    :raises ModelError: a layer gives NaN or infinite values; names the layer, the document and the position.
    :raises InputError: no document has two tokens.
    """
    fingerprint, clusters, targets = Fingerprint(), _Clusters(), TargetSink(lm) if log_probs else None
    sinks = make_sinks(layers, scorer, writer, targets)
    needed = tuple(dict.fromkeys([*layers, *([FINAL] if log_probs else [])]))
    tokens = last_document = 0
    for batch in batches(windows(_fingerprinted(documents, fingerprint), config), batch_tokens):
        spans = clusters.spans(batch)
        _pass_on(lm, batch, spans, needed, sinks)
        tokens, last_document = tokens + sum(span.last - span.first for span in spans), batch.windows[-1].document
        advance(tokens, None)
        if stop is not None and scorer is not None and stop(scorer):
            break
    if not tokens:
        raise InputError("the text has fewer than two tokens, so there is no next token to learn from; give more text")
    arrays = targets.arrays() if targets else (None, None, None)
    return Collected(tokens, last_document + 1, fingerprint.hexdigest(), *arrays)


def _fingerprinted(documents: Iterable[TokenDocument], fingerprint: Fingerprint) -> Iterator[TokenDocument]:
    for document in documents:
        fingerprint.update(document)
        yield document


class _Clusters:
    """Numbers the runs of text, in the order in which windows come."""

    def __init__(self) -> None:
        self._document, self._tokens, self._number = -1, 0, -1

    def spans(self, batch: Batch) -> list[Span]:
        """The positions of each window that count, and the run that they lie in."""
        return [
            Span(row, window.first, len(window.targets), self._of(window)) for row, window in enumerate(batch.windows)
        ]

    def _of(self, window: Window) -> int:
        if window.document != self._document or self._tokens >= CLUSTER_TOKENS:
            self._document, self._tokens, self._number = window.document, 0, self._number + 1
        self._tokens += len(window.targets) - window.first
        return self._number


def _pass_on(
    lm: LanguageModel, batch: Batch, spans: Sequence[Span], layers: Sequence[str], sinks: Sequence[Sink]
) -> None:
    """One forward pass, whose vectors go to every sink."""

    def receive(name: str, vectors_BTD: Tensor) -> None:
        try:
            for sink in sinks:
                sink.receive(name, vectors_BTD)
        except BadVector as error:
            raise _located(error, name, batch) from None

    for sink in sinks:
        sink.begin(batch, spans)
    lm.forward(torch.from_numpy(batch.tokens_BT), torch.from_numpy(batch.lengths_B), layers, receive)
    for sink in sinks:
        sink.end()


def _located(error: BadVector, layer: str, batch: Batch) -> ModelError:
    window = batch.windows[error.row]
    return ModelError(
        f"layer {layer} gives a vector that {error.fault}, at token {window.start + error.position} of "
        f"{window.source}, document {window.number}; try `dtype='float32'`, or leave the layer out with `layers`"
    )

"""Sinks for the vectors of a forward pass: a check, the scorer, the datastore, the head.

Legend: B windows of a batch, T positions, D dimension, N counted positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm.layer_names import FINAL
from knnlm.model.lm import LanguageModel
from knnlm.scores.dispersion import NonFinite, Span, first_nonfinite
from knnlm.scores.layer_scorer import LayerScorer
from knnlm.store.writer import DatastoreWriter
from knnlm.text.windows import Batch


class Sink(ABC):
    """Receives the vectors of a batch: `begin`, then `receive` for each layer."""

    spans: Sequence[Span] = ()

    def begin(self, batch: Batch, spans: Sequence[Span]) -> None:
        """Called before the forward pass of a batch; the positions in `spans` count."""
        self.spans = spans

    @abstractmethod
    def receive(self, name: str, vectors_BTD: Tensor) -> None:
        """Take one layer's vectors, which are the model's own memory."""


class _Check(Sink):
    """Raises NonFinite for NaN and infinity in layers that no scorer checks."""

    def __init__(self, but: Collection[str]) -> None:
        self._but = but

    def receive(self, name: str, vectors_BTD: Tensor) -> None:
        """Take one layer's vectors."""
        # The head's input is checked even if not a wanted layer: NaN there would make the LM's perplexity NaN.
        if name in self._but:
            return
        for span in self.spans:
            vectors_1TD = vectors_BTD[span.row : span.row + 1, span.first : span.last]
            if not torch.isfinite(vectors_1TD.sum()) and (place := first_nonfinite(vectors_1TD)):
                raise NonFinite(span.row, span.first + place[1])


class _Score(Sink):
    """Passes wanted layers on to the scorer, and what enters the head."""

    def __init__(self, layers: Collection[str], scorer: LayerScorer) -> None:
        self._layers, self._scorer = layers, scorer

    def begin(self, batch: Batch, spans: Sequence[Span]) -> None:
        """Before the forward pass."""
        self._scorer.begin_batch(spans, [window.targets[window.first :] for window in batch.windows])

    def receive(self, name: str, vectors_BTD: Tensor) -> None:
        """Take one layer's vectors."""
        if name in self._layers:
            self._scorer.receive(name, vectors_BTD)
        if name == FINAL:
            self._scorer.receive_head(vectors_BTD)


class _Store(Sink):
    """Writes values, and the keys of wanted layers."""

    def __init__(self, layers: Collection[str], writer: DatastoreWriter) -> None:
        self._layers, self._writer = layers, writer
        self._document = -1

    def begin(self, batch: Batch, spans: Sequence[Span]) -> None:
        """Before the forward pass."""
        super().begin(batch, spans)
        for window in batch.windows:
            if window.document != self._document or self._writer.needs_document:
                first, start = int(window.inputs[window.first]), window.start + window.first
                self._writer.begin_document(first, window.source, window.number, start=start)
                self._document = window.document
            self._writer.append_values(window.targets[window.first :])

    def receive(self, name: str, vectors_BTD: Tensor) -> None:
        """Take one layer's vectors."""
        if name in self._layers:
            self._writer.append_keys(name, counted_vectors(vectors_BTD, self.spans))


def counted_vectors(vectors_BTD: Tensor, spans: Sequence[Span]) -> NDArray[np.float32]:
    """Return a copy of the vectors at the positions that count, [N, D]."""
    rows = [vectors_BTD[span.row, span.first : span.last] for span in spans]
    found: NDArray[np.float32] = torch.cat(rows).float().cpu().numpy()
    return found


@dataclass(frozen=True, eq=False)
class Targets:
    """The counted targets of a text, in the order of its keys, with the plain LM's log-probabilities."""

    targets_N: NDArray[np.int32]
    log_probs_N: NDArray[np.float64]
    """The plain LM's log-probability of each."""
    documents_N: NDArray[np.int64]
    """The number of each one's document, from 0."""


class TargetScorer:
    """Keeps the plain LM's log-probability of every counted target, with its document."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._parts: list[tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int64]]] = []

    def add(self, batch: Batch, spans: Sequence[Span], final_BTD: Tensor) -> None:
        """Score the targets at the positions in `spans`; called after a forward pass."""
        for span, window in zip(spans, batch.windows, strict=True):
            targets = window.targets[span.first : span.last]
            final_ND = final_BTD[span.row, span.first : span.last]
            log_probs = self._lm.target_log_probs(final_ND, torch.from_numpy(targets.astype(np.int64)))
            self._parts.append((targets, log_probs.cpu().numpy(), np.full(len(targets), window.document)))

    def targets(self) -> Targets:
        """Return the targets of all batches."""
        return Targets(*(np.concatenate(column) for column in zip(*self._parts, strict=True)))


def make_sinks(layers: Sequence[str], scorer: LayerScorer | None, writer: DatastoreWriter | None) -> tuple[Sink, ...]:
    """Return the sinks in use; checking and scoring come first, so that no bad vector is stored."""
    wanted = frozenset(layers)
    return (
        _Check(but=wanted if scorer else ()),
        *([_Score(wanted, scorer)] if scorer else []),
        *([_Store(wanted, writer)] if writer else []),
    )

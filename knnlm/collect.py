"""One forward pass over text: every wanted layer's vectors go to the scorer and to the datastore as they appear.

Legend: B windows of a batch, T positions, D dimension, N counted positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm.config import BATCH_TOKENS
from knnlm.datastore import DatastoreWriter
from knnlm.dispersion import BadVector, NonFinite, Span, first_nonfinite
from knnlm.errors import InputError, ModelError
from knnlm.layers import FINAL
from knnlm.lm import LanguageModel
from knnlm.progress import Advance, ignore
from knnlm.scoring import LayerScorer
from knnlm.windows import Batch, Fingerprint, TokenDocument, Window, WindowConfig, batches, windows

# Tokens of one document depend on one another; runs of this many are taken as independent of the next run.
CLUSTER_TOKENS = 8192


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
    fingerprint, clusters, targets = Fingerprint(), _Clusters(), _Targets(lm) if log_probs else None
    sinks = _sinks(layers, scorer, writer, targets)
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


class _Sink(ABC):
    """Is told of a batch, is given its layers' vectors one after the other, and is told that these were all."""

    windows: Sequence[Window] = ()
    spans: Sequence[Span] = ()

    def begin(self, batch: Batch, spans: Sequence[Span]) -> None:
        self.windows, self.spans = batch.windows, spans

    @abstractmethod
    def receive(self, name: str, vectors_BTD: Tensor) -> None: ...

    def end(self) -> None:
        self.windows = self.spans = ()


class _Check(_Sink):
    """Looks for NaN and infinite values where no scorer meets them in its sums."""

    def __init__(self, but: Collection[str]) -> None:
        self._but = but

    def receive(self, name: str, vectors_BTD: Tensor) -> None:
        # What enters the head is checked though no layer asked for: NaN there would be the LM's perplexity.
        if name in self._but:
            return
        for span in self.spans:
            vectors_1TD = vectors_BTD[span.row : span.row + 1, span.first : span.last]
            if not torch.isfinite(vectors_1TD.sum()) and (place := first_nonfinite(vectors_1TD)):
                raise NonFinite(span.row, span.first + place[1])


class _Score(_Sink):
    """Passes wanted layers on to the scorer."""

    def __init__(self, layers: Collection[str], scorer: LayerScorer) -> None:
        self._layers, self._scorer = layers, scorer

    def begin(self, batch: Batch, spans: Sequence[Span]) -> None:
        self._scorer.begin_batch(spans, [window.targets[window.first :] for window in batch.windows])

    def receive(self, name: str, vectors_BTD: Tensor) -> None:
        if name in self._layers:
            self._scorer.receive(name, vectors_BTD)


class _Store(_Sink):
    """Writes values, and the keys of wanted layers."""

    def __init__(self, layers: Collection[str], writer: DatastoreWriter) -> None:
        self._layers, self._writer = layers, writer
        self._document = -1

    def begin(self, batch: Batch, spans: Sequence[Span]) -> None:
        super().begin(batch, spans)
        for window in batch.windows:
            if window.document != self._document:
                self._writer.begin_document(int(window.inputs[0]), window.source, window.number)
                self._document = window.document
            self._writer.append_values(window.targets[window.first :])

    def receive(self, name: str, vectors_BTD: Tensor) -> None:
        if name in self._layers:
            rows = [vectors_BTD[span.row, span.first : span.last] for span in self.spans]
            self._writer.append_keys(name, torch.cat(rows).float().cpu().numpy())


class _Targets(_Sink):
    """Keeps the plain LM's log-probability of every counted target, with its document."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._final_BTD = torch.empty(0)
        self._parts: list[tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int64]]] = []

    def receive(self, name: str, vectors_BTD: Tensor) -> None:
        if name == FINAL:  # held until the forward pass is over: the head must not run inside its own hook
            self._final_BTD = vectors_BTD

    def end(self) -> None:
        for span, window in zip(self.spans, self.windows, strict=True):
            targets = window.targets[span.first : span.last]
            final_ND = self._final_BTD[span.row, span.first : span.last]
            log_probs = self._lm.target_log_probs(final_ND, torch.from_numpy(targets.astype(np.int64)))
            self._parts.append((targets, log_probs.cpu().numpy(), np.full(len(targets), window.document)))

    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int64]]:
        targets, log_probs, documents = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        return targets, log_probs, documents


def _sinks(
    layers: Sequence[str], scorer: LayerScorer | None, writer: DatastoreWriter | None, targets: _Targets | None
) -> tuple[_Sink, ...]:
    """Those that are wanted; checking and scoring come first, so that no bad vector is stored."""
    wanted = frozenset(layers)
    return (
        _Check(but=wanted if scorer else ()),
        *([_Score(wanted, scorer)] if scorer else []),
        *([_Store(wanted, writer)] if writer else []),
        *([targets] if targets else []),
    )


def _pass_on(
    lm: LanguageModel, batch: Batch, spans: Sequence[Span], layers: Sequence[str], sinks: Sequence[_Sink]
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
        f"{window.source}, document {window.number}; try --dtype float32, or leave the layer out with --layers"
    )

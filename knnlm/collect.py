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


class _Clusters:
    """Numbers the runs of text, in the order in which windows come."""

    def __init__(self) -> None:
        self._document, self._tokens, self._number = -1, 0, -1

    def of(self, window: Window) -> int:
        if window.document != self._document or self._tokens >= CLUSTER_TOKENS:
            self._document, self._tokens, self._number = window.document, 0, self._number + 1
        self._tokens += len(window.targets) - window.first
        return self._number


class _Targets:
    """Keeps the plain LM's log-probability of every counted target, with its document."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._final_BTD = torch.empty(0)
        self._parts: list[tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int64]]] = []

    def hold(self, final_BTD: Tensor) -> None:
        """Keep the final vectors until the forward pass is over: the head must not run inside its own hook."""
        self._final_BTD = final_BTD

    def add(self, spans: Sequence[Span], batch: Batch) -> None:
        """Score the targets of the batch that was held."""
        for span, window in zip(spans, batch.windows, strict=True):
            targets = window.targets[span.first : span.last]
            final_ND = self._final_BTD[span.row, span.first : span.last]
            log_probs = self._lm.target_log_probs(final_ND, torch.from_numpy(targets.astype(np.int64)))
            self._parts.append((targets, log_probs.cpu().numpy(), np.full(len(targets), window.document)))

    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int64]]:
        targets, log_probs, documents = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        return targets, log_probs, documents


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
    needed = tuple(dict.fromkeys([*layers, *([FINAL] if log_probs else [])]))
    tokens, last_document = 0, -1
    for batch in batches(windows(_fingerprinted(documents, fingerprint), config), batch_tokens):
        spans = [
            Span(row, window.first, len(window.targets), clusters.of(window))
            for row, window in enumerate(batch.windows)
        ]
        if writer is not None:
            _append_values(writer, batch, last_document)
        if scorer is not None:
            scorer.begin_batch(spans, [window.targets[window.first :] for window in batch.windows])
        receive = _receiver(layers, batch, spans, scorer, writer, targets)
        _forward(lm, batch, needed, receive)
        if targets is not None:
            targets.add(spans, batch)
        last_document = batch.windows[-1].document
        tokens += sum(span.last - span.first for span in spans)
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


def _append_values(writer: DatastoreWriter, batch: Batch, last_document: int) -> None:
    for window in batch.windows:
        if window.document != last_document:
            writer.begin_document(int(window.inputs[0]), window.source, window.number)
            last_document = window.document
        writer.append_values(window.targets[window.first :])


def _receiver(
    layers: Sequence[str],
    batch: Batch,
    spans: Sequence[Span],
    scorer: LayerScorer | None,
    writer: DatastoreWriter | None,
    targets: _Targets | None,
) -> Callable[[str, Tensor], None]:
    wanted = frozenset(layers)

    def receive(name: str, vectors_BTD: Tensor) -> None:
        # What enters the head is checked though no layer asked for: NaN there would be the LM's perplexity.
        _score_or_check(name, vectors_BTD, batch, spans, scorer if name in wanted else None)
        if writer is not None and name in wanted:
            writer.append_keys(name, _counted(vectors_BTD, spans))
        if targets is not None and name == FINAL:
            targets.hold(vectors_BTD)

    return receive


def _score_or_check(
    name: str, vectors_BTD: Tensor, batch: Batch, spans: Sequence[Span], scorer: LayerScorer | None
) -> None:
    """Refuse NaN and infinite values: the scorer meets them in its sums, without one they are looked for."""
    try:
        if scorer is not None:
            scorer.receive(name, vectors_BTD)
        else:
            _check_finite(vectors_BTD, spans)
    except BadVector as error:
        window = batch.windows[error.row]
        raise ModelError(
            f"layer {name} gives a vector that {error.fault}, at token {window.start + error.position} of "
            f"{window.source}, document {window.number}; try --dtype float32, or leave the layer out with --layers"
        ) from None


def _check_finite(vectors_BTD: Tensor, spans: Sequence[Span]) -> None:
    for span in spans:
        vectors_1TD = vectors_BTD[span.row : span.row + 1, span.first : span.last]
        if not torch.isfinite(vectors_1TD.sum()) and (place := first_nonfinite(vectors_1TD)):
            raise NonFinite(span.row, span.first + place[1])


def _counted(vectors_BTD: Tensor, spans: Sequence[Span]) -> NDArray[np.float32]:
    """The counted positions' vectors in one new float32 array [N, D]."""
    rows = [vectors_BTD[span.row, span.first : span.last] for span in spans]
    keys: NDArray[np.float32] = torch.cat(rows).float().cpu().numpy()
    return keys


def _forward(lm: LanguageModel, batch: Batch, layers: Sequence[str], receive: Callable[[str, Tensor], None]) -> None:
    tokens_BT, lengths_B = torch.from_numpy(batch.tokens_BT), torch.from_numpy(batch.lengths_B)
    lm.forward(tokens_BT, lengths_B, layers, receive)

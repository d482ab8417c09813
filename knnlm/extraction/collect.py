"""One pass over text: vectors of every wanted layer go to the scorer and to the datastore as they are computed.

Legend: B windows of a batch, T positions, D dimension, N counted positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from knnlm.config import BATCH_TOKENS
from knnlm.errors import InputError
from knnlm.extraction.passes import forward, forward_to_head
from knnlm.extraction.scorer_state import ScorerState
from knnlm.extraction.sinks import TargetScorer, counted_vectors, make_sinks
from knnlm.layer_names import FINAL
from knnlm.model.decoder import Receive
from knnlm.model.lm import LanguageModel
from knnlm.progress import Advance, ignore
from knnlm.scores.dispersion import Span
from knnlm.scores.layer_scorer import LayerScorer
from knnlm.store.writer import DatastoreWriter
from knnlm.text.clusters import CLUSTER_TOKENS
from knnlm.text.part_plan import in_parts
from knnlm.text.windows import Batch, Fingerprint, TokenDocument, Window, WindowConfig, batches, windows


class Give(Protocol):
    """Gives the vectors of a batch, as far as it has the layers, to every receiver."""

    def __call__(self, batch: Batch, layers: Sequence[str], /, *receivers: Receive) -> None: ...  # noqa: D102


class Elsewhere(Protocol):
    """Has the parts of a text made by other processes, and yields each one's windows once the writer has it."""

    def __call__(self, parts: Iterator[Iterator[Window]], /) -> Iterator[Iterable[Window]]: ...  # noqa: D102


@dataclass(frozen=True)
class Collected:
    """Counts of one pass over the text."""

    tokens: int
    documents: int
    fingerprint: str


def collect(
    lm: LanguageModel,
    documents: Iterable[TokenDocument],
    config: WindowConfig,
    layers: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    scorer: LayerScorer | None = None,
    writer: DatastoreWriter | None = None,
    targets: TargetScorer | None = None,
    give: Give | None = None,
    state: ScorerState | None = None,
    elsewhere: Elsewhere | None = None,
    advance: Advance = ignore,
    stop: Callable[[LayerScorer], bool] | None = None,
) -> Collected:
    """Run the model over the documents' windows; each token with a predecessor in its document counts once.

    :param layers: layers whose vectors the scorer and the writer get.
    :param targets: gets the vectors that enter the head, and scores every target.
    :param give: gives the vectors of a batch in place of a forward pass.
    :param state: keeps the scorer between parts, so that it too goes on where the writer does.
    :param elsewhere: makes the parts that the writer lacks.
    :param stop: called after every batch; True ends the pass early.
    :raises ModelError: a layer gives NaN or infinite values; names the layer, the document and the position.
    :raises InputError: no document has two tokens.
    """
    fingerprint, clusters, sinks = Fingerprint(), _Clusters(), make_sinks(layers, scorer, writer)
    receivers = [sink.receive for sink in sinks]
    read = layers if scorer is None else tuple(dict.fromkeys((*layers, FINAL)))
    tokens = last_document = 0
    text = windows(_fingerprinted(documents, fingerprint), config)
    for is_stored, batch in _batches(text, batch_tokens, writer, state, elsewhere):
        spans = clusters.spans(batch)
        for sink in sinks:
            sink.begin(batch, spans)
        if is_stored:
            pass
        elif give is not None:
            give(batch, read, *receivers)
        elif targets is None:
            forward(lm, batch, read, *receivers)
        else:
            targets.add(batch, spans, forward_to_head(lm, batch, read, *receivers))
        tokens, last_document = tokens + sum(span.last - span.first for span in spans), batch.windows[-1].document
        advance(tokens, None)
        if stop is not None and scorer is not None and stop(scorer):
            break
    if not tokens:
        raise InputError("the text has fewer than two tokens, so there is no next token to learn from; give more text")
    return Collected(tokens, last_document + 1, fingerprint.hexdigest())


def collect_part(
    lm: LanguageModel, text: Iterable[Window], layers: Sequence[str], writer: DatastoreWriter, batch_tokens: int
) -> None:
    """Write the values and keys of one part, as `collect` does. Raises ModelError as there."""
    clusters, sinks = _Clusters(), make_sinks(layers, None, writer)
    for batch in batches(text, batch_tokens):
        spans = clusters.spans(batch)
        for sink in sinks:
            sink.begin(batch, spans)
        forward(lm, batch, layers, *(sink.receive for sink in sinks))


def first_vectors(
    lm: LanguageModel, text: Iterable[Window], layers: Sequence[str], batch_tokens: int
) -> dict[str, NDArray[np.float32]]:
    """Return the vectors [N, D] of each layer that `collect` would append first. Raises ModelError as there."""
    batch = next(batches(text, batch_tokens))
    spans = _Clusters().spans(batch)
    found: dict[str, NDArray[np.float32]] = {}

    def keep(name: str, vectors_BTD: Tensor) -> None:
        if name in layers:
            found[name] = counted_vectors(vectors_BTD, spans)

    forward(lm, batch, layers, keep)
    return found


def _batches(
    text: Iterable[Window],
    batch_tokens: int,
    writer: DatastoreWriter | None,
    state: ScorerState | None,
    elsewhere: Elsewhere | None,
) -> Iterator[tuple[bool, Batch]]:
    """All batches, none over the border of two parts, and whether the writer has the part already."""
    parts = in_parts(text, None if writer is None else writer.part_rows)
    for number, part in enumerate(parts if elsewhere is None else elsewhere(parts)):
        is_stored = writer is not None and writer.begin_part()
        if state is not None and not is_stored:
            state.between_parts(number)
        for batch in batches(part, batch_tokens):
            yield is_stored, batch


def _fingerprinted(documents: Iterable[TokenDocument], fingerprint: Fingerprint) -> Iterator[TokenDocument]:
    for document in documents:
        fingerprint.update(document)
        yield document


class _Clusters:
    """Numbers the clusters of text (documents, or runs of long ones) in the order of the windows."""

    def __init__(self) -> None:
        self._document, self._tokens, self._number = -1, 0, -1

    def spans(self, batch: Batch) -> list[Span]:
        """Return each window's counted positions, with their cluster."""
        return [
            Span(row, window.first, len(window.targets), self._of(window)) for row, window in enumerate(batch.windows)
        ]

    def _of(self, window: Window) -> int:
        if window.document != self._document or self._tokens >= CLUSTER_TOKENS:
            self._document, self._tokens, self._number = window.document, 0, self._number + 1
        self._tokens += len(window.targets) - window.first
        return self._number

"""Values of each segment of a text from one pass: its loss, and scores of every wanted layer.

Legend: S segments, B segments of a batch, T tokens of a segment, D dimension.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm.config import BATCH_TOKENS
from knnlm.errors import InputError, ModelError
from knnlm.extraction.passes import forward_to_head
from knnlm.model.lm import LanguageModel
from knnlm.progress import Advance, ignore
from knnlm.scores.dispersion import Span, span_dispersions, unit_rows
from knnlm.text.segments import Segment
from knnlm.text.windows import Batch, batches, unscored_window

Float64 = NDArray[np.float64]

# look(layer, vectors_BTD, first): vectors of the segments from number `first` on; valid only during the call.
Look = Callable[[str, Tensor, int], None]

SegmentFunction = Callable[[NDArray[np.floating]], float]


@dataclass(frozen=True, eq=False)
class SegmentValues:
    """Values of S segments, in their order."""

    loss_S: Float64
    """Mean of -log p over the T - 1 tokens that have a predecessor: the log of the sequence-level perplexity."""
    final_loss_S: Float64
    """-log p of the last token, predicted from the T - 1 before it."""
    within: Mapping[str, Float64]
    """For each layer, [S]: dispersion of the segment's T vectors."""
    scores: Mapping[str, Float64]
    """For each layer, [S]: the value of `function` for these vectors; `within` if there is no function."""
    last: Mapping[str, NDArray[np.float32]]
    """For each layer, [S, D]: the segment's last vector at unit length, in an unnamed temporary file."""


def measure_segments(
    lm: LanguageModel,
    segments: Sequence[Segment],
    layers: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    look: Look | None = None,
    function: SegmentFunction | None = None,
    advance: Advance = ignore,
) -> SegmentValues:
    """Run the model once over segments of equal length. Memory holds a batch and S numbers for each layer.

    :param look: called with every layer's vectors of every batch.
    :param function: another score of a segment's vectors [T, D], as in `knnlm.scores.layer_scorer.SEGMENT_FUNCTIONS`.
    :raises ModelError: a layer gives a vector without a direction, or the model gives no probability.
    """
    tables = _Tables(lm, len(segments), layers, look, function)
    inputs = (unscored_window(one.tokens_T, start=one.start, source=one.source, number=one.number) for one in segments)
    done = 0
    for batch in batches(inputs, batch_tokens):
        tables.add(batch, done)
        done += len(batch.windows)
        advance(done, len(segments))
    return SegmentValues(tables.loss_S, tables.final_loss_S, tables.within, tables.scores, tables.last)


class _Tables:
    """The values of all segments, filled batch by batch."""

    def __init__(
        self,
        lm: LanguageModel,
        count: int,
        layers: Sequence[str],
        look: Look | None,
        function: SegmentFunction | None,
    ) -> None:
        self._lm, self._look, self._function = lm, look, function
        _check_room(count, [lm.dims[layer] for layer in layers])
        self.loss_S, self.final_loss_S = np.empty(count), np.empty(count)
        self.within = {layer: np.empty(count) for layer in layers}
        self.scores = {layer: np.empty(count) for layer in layers} if function else self.within
        self.last = {layer: _scratch((count, lm.dims[layer])) for layer in layers}

    def add(self, batch: Batch, first: int) -> None:
        """Add a batch of segments, of which `first` is the number of the first."""
        place, tokens_BT = slice(first, first + len(batch.windows)), torch.from_numpy(batch.tokens_BT)
        final_BTD = forward_to_head(self._lm, batch, tuple(self.within), partial(self._receive, place))
        log_probs = self._lm.target_log_probs(final_BTD[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
        loss_BT = -log_probs.numpy().reshape(len(tokens_BT), -1)
        if not np.isfinite(loss_BT).all():
            raise ModelError(f"{self._lm.name} gives probabilities that are not finite; try `dtype='float32'`")
        self.loss_S[place] = loss_BT.mean(axis=1)
        self.final_loss_S[place] = loss_BT[:, -1]

    def _receive(self, place: slice, layer: str, vectors_BTD: Tensor) -> None:
        if layer not in self.within:
            return
        rows, length = vectors_BTD.shape[:2]
        self.within[layer][place] = span_dispersions(vectors_BTD, [Span(row, 0, length, 0) for row in range(rows)])
        if self._function is not None:
            self.scores[layer][place] = [self._function(vectors_TD) for vectors_TD in vectors_BTD.float().cpu().numpy()]
        self.last[layer][place] = unit_rows(vectors_BTD[:, -1])
        if self._look is not None:
            self._look(layer, vectors_BTD, place.start)


def _check_room(segments: int, dims: Iterable[int]) -> None:
    """Raise InputError, before the pass, if the disk has no room: writing to a mapped file would kill the process."""
    needed, free = 4 * segments * sum(dims), shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise InputError(
            f"the last vectors of {segments:,} segments take {needed / 1e9:.1f} GB in {tempfile.gettempdir()}, which "
            f"has {free / 1e9:.1f} GB free; set TMPDIR, or take fewer `layers` or `max_segments`"
        )


def _scratch(shape: tuple[int, int]) -> NDArray[np.float32]:
    """An array in a temporary file that is deleted with the array."""
    with tempfile.TemporaryFile(prefix="knnlm-") as file:
        return np.memmap(file, np.float32, "w+", shape=shape)

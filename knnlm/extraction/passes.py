"""The forward pass of a batch, shared by all that read text.

Legend: B windows of a batch, T positions, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knnlm.errors import ModelError
from knnlm.layer_names import FINAL
from knnlm.model.decoder import Receive
from knnlm.model.lm import LanguageModel
from knnlm.scores.dispersion import BadVector
from knnlm.text.windows import Batch


def forward(
    lm: LanguageModel, batch: Batch, layers: Sequence[str], *receivers: Receive, unit: str = "document"
) -> None:
    """Run `LanguageModel.forward` on a batch; every receiver gets all vectors.

    :param unit: name of what a window's `number` counts in its source, for errors.
    :raises ModelError: a receiver met a `BadVector`; names the layer, the source and the position.
    """
    take = located(batch, receivers, unit)
    lm.forward(torch.from_numpy(batch.tokens_BT), layers, take)


def located(batch: Batch, receivers: Sequence[Receive], unit: str = "document") -> Receive:
    """Return a receiver that gives a batch's vectors to all of them. Its errors are those of `forward`."""

    def take(layer: str, vectors_BTD: Tensor) -> None:
        try:
            for receive in receivers:
                receive(layer, vectors_BTD)
        except BadVector as error:
            raise _located(error, layer, batch, unit) from None

    return take


def forward_to_head(lm: LanguageModel, batch: Batch, layers: Sequence[str], *receivers: Receive) -> Tensor:
    """As `forward`, and return the vectors of the layer `FINAL`, [B, T, D], for the head.

    They are kept until the pass is over, because the head must not run inside its own hook.
    """
    held: list[Tensor] = []

    def hold(layer: str, vectors_BTD: Tensor) -> None:
        if layer == FINAL:
            held.append(vectors_BTD)

    forward(lm, batch, tuple(dict.fromkeys((*layers, FINAL))), *receivers, hold)
    return held[0]


def _located(error: BadVector, layer: str, batch: Batch, unit: str) -> ModelError:
    window = batch.windows[error.row]
    return ModelError(
        f"layer {layer} gives a vector that {error.fault}, at token {window.start + error.position} of "
        f"{window.source}, {unit} {window.number}; try `dtype='float32'`, or leave the layer out with `layers`"
    )

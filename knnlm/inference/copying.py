"""The copying guard: no run of more than N generated tokens stands verbatim in one document of the datastore.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm.errors import InputError
from knnlm.inference.store_text import StoreText
from knnlm.model.head import log_softmax


class CopyGuard:
    """Makes impossible each token with which more than `max_copy` generated tokens would be taken from one document.

    The prompt's tokens do not count: they are not copied by the model. Exact for the text of the datastore, also for
    documents whose keys are not neighbours.

    :raises InputError: `max_copy` is below 1.
    """

    def __init__(self, text: StoreText, max_copy: int) -> None:
        if max_copy < 1:
            raise InputError(f"`max_copy` is {max_copy}, but must be at least 1; leave it out for no limit")
        self._text, self._max_copy = text, max_copy

    def banned(self, generated: Sequence[int]) -> NDArray[np.int32]:
        """Return the tokens that must not come after these."""
        if len(generated) < self._max_copy:
            return np.empty(0, np.int32)
        return self._text.followers(generated[-self._max_copy :])

    def apply(self, generated: Sequence[int], log_probs_V: Tensor) -> Tensor:
        """Return the distribution without the banned tokens, float32, whose sum is 1 again.

        :raises InputError: no token is left.
        """
        banned = self.banned(generated)
        if not len(banned):
            return log_probs_V
        left_V = log_probs_V.clone()
        left_V[torch.from_numpy(banned).long().to(left_V.device)] = -torch.inf
        if bool(torch.isneginf(left_V).all()):
            raise InputError(
                f"each possible token would be one more than `max_copy={self._max_copy}` from a document; take a "
                "larger one"
            )
        return log_softmax(left_V[None])[0]


class GuardProcessor:
    """The guard as a logits processor of `transformers`, for one call of `generate()`.

    :param prompt: tokens of each row's prompt, with padding.
    """

    def __init__(self, guard: CopyGuard, prompt: int) -> None:
        self._guard, self._prompt = guard, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the rows' log-probabilities [B, V] with the banned tokens at -inf."""
        rows = zip(input_ids[:, self._prompt :].tolist(), scores, strict=True)
        return torch.stack([self._guard.apply(generated, log_probs_V) for generated, log_probs_V in rows])

"""One token from a distribution: the likeliest, or drawn with the caller's generator. Shapes: V vocabulary."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def choose(log_probs_V: Tensor, temperature: float, top_p: float, random: np.random.Generator) -> int:
    """Return a token. It depends only on the arguments and the state of `random`.

    :param log_probs_V: float32, on the CPU; -inf for impossible tokens.
    :param temperature: 0 takes the likeliest token; below 1 sharpens the distribution, above 1 flattens it.
    :param top_p: nucleus sampling: draw among the likeliest tokens that together have this probability.
    """
    if temperature == 0:
        return int(log_probs_V.argmax())
    scaled_V = (log_probs_V.double() - log_probs_V.max()) / temperature
    probs_V = torch.softmax(scaled_V, dim=0)
    if top_p < 1:
        probs_V = _nucleus(probs_V, top_p)
    cumulative_V = probs_V.cumsum(0).numpy()
    return int(np.searchsorted(cumulative_V, random.random() * cumulative_V[-1], side="right"))


def _nucleus(probs_V: Tensor, top_p: float) -> Tensor:
    """Set probabilities outside the nucleus to 0 (Holtzman et al. 2020, section 3.1); the likeliest token stays."""
    sorted_V, tokens_V = probs_V.sort(descending=True, stable=True)
    kept_V = sorted_V.cumsum(0) - sorted_V < top_p
    kept_V[0] = True
    return torch.zeros_like(probs_V).index_put_((tokens_V[kept_V],), sorted_V[kept_V])

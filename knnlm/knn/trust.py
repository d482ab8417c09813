"""λ by the text so far: the posterior probability that a text is of the datastore, which λ is multiplied by.

Two forecasters, the plain LM and the mixture, share the probability by fixed share (Herbster & Warmuth 1998): the trust
in the mixture is 1/2 at a text's first token, its odds are multiplied by p_mixture / p_LM of each token, and then the
text may have changed its domain, with probability `SWITCH`. As λ p_kNN + (1 - λ) p_LM is linear in λ, λ times the trust
is exactly their mixture: over T tokens no text costs more than ln 2 + T `SWITCH` nats, but for what `SILENT` cuts off.
Nothing is fitted (docs/mixing.md).

Shapes: Q queries in the order of the text, K neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnlm.knn.mixing import Floats, Mix, Search, knn_log_probs, mix

FIRST = 0.5
"""Trust at the first token of a text."""
SWITCH = 1 / 1000
"""Probability, at each token, that the text changes its domain."""
SILENT = 0.01
"""Trust below which λ is 0, so that the answer is the plain LM's to the bit."""


def updated(trust: float, gain: float) -> float:
    """Return the trust after a token; `gain` is log p of the mixture at full trust, minus log p_LM, of this token."""
    odds = math.log(trust) - math.log1p(-trust) + gain
    return SWITCH + (1 - 2 * SWITCH) * (1 + math.tanh(odds / 2)) / 2


def trusts(gains: Iterable[float], first: float = FIRST) -> Iterator[float]:
    """Yield the trust at each token of a text, before it is known, and after the last: one more than there are gains.

    Loops over Python's floats, 0.3 µs a token: each trust depends on the one before.
    """
    yield first
    for gain in gains:
        first = updated(first, gain)
        yield first


class Trust:
    """The trust along a text, token by token; 1 throughout under a setting that is not by text.

    :param gains: those of the text so far.
    """

    def __init__(self, setting: Mix, gains: Iterable[float] = ()) -> None:
        self._by_text = setting.by_text
        *_, self._value = trusts(gains)

    @property
    def factor(self) -> float:
        """What λ of the next token is multiplied by."""
        return float(heard(self._value)) if self._by_text else 1.0

    def add(self, gain: float) -> None:
        """Take in a token."""
        self._value = updated(self._value, gain)


def heard(trust: Floats | float) -> Floats:
    """Return what λ is multiplied by: the trust, or 0 where that is too low."""
    return np.where(np.asarray(trust) < SILENT, 0.0, trust)


def token_gains(mixed: Floats, lm_log_probs: Floats) -> Floats:
    """Return log p of the mixture minus log p_LM; 0 for a token that is impossible for both."""
    with np.errstate(invalid="ignore"):
        gains: Floats = mixed - lm_log_probs
    return np.where(np.isnan(gains), 0.0, gains)


def log_probs_by_text(
    search: Search, lm_log_probs: Floats, setting: Mix, documents_Q: NDArray[np.integer[Any]]
) -> Floats:
    """Return log p of each target under a setting, λ by query and by the text so far if the setting has these, [Q].

    :param documents_Q: the document of each query; a document's queries follow one another in the order of its text.
    """
    knn_Q = knn_log_probs(search, setting.k, setting.temperature)
    lambdas_Q = setting.lambdas(search.distances_QK, search.values_QJ)
    mixed_Q = mix(lm_log_probs, knn_Q, lambdas_Q)
    if not setting.by_text:
        return mixed_Q
    gains_Q = token_gains(mixed_Q, lm_log_probs)
    starts = np.flatnonzero(np.diff(documents_Q)) + 1
    trust_Q = [trust for part in np.split(gains_Q, starts) for trust in trusts(part.tolist()[:-1])]
    return mix(lm_log_probs, knn_Q, lambdas_Q * heard(np.array(trust_Q)))

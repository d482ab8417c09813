"""Why the kNN-LM gave a token its probability: the LM's and the neighbours' distributions, and the neighbours' text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm.config import KNNConfig
from knnlm.errors import InputError
from knnlm.inference.cite import Citer, Memory
from knnlm.inference.continuing import Continuing
from knnlm.inference.detokenizer import TokenTexts, pieces_of
from knnlm.inference.model import KNNLM
from knnlm.knn.citing import deep_neighbors
from knnlm.knn.evidence import (
    LIKELIEST,
    Evidence,
    Neighborhood,
    NeighborSource,
    Prediction,
    SourcedNeighbor,
    make_evidence,
    read_source,
)
from knnlm.knn.mixing import Floats, Mix
from knnlm.knn.retrieval import Retrieval, open_retrieval
from knnlm.knn.trust import Trust
from knnlm.model.head import log_softmax
from knnlm.model.lm import LanguageModel

SHOWN_NEIGHBORS = 20
BEFORE_TOKENS, AFTER_TOKENS = 24, 12
"""Tokens of source text before and after a neighbour's token."""


@dataclass(frozen=True)
class Likely:
    """One of the likeliest tokens of a distribution."""

    text: str
    probability: float


@dataclass(frozen=True)
class ExplainedToken:
    """A token of a text, with the predictions for its position."""

    text: str
    lm_probability: float
    knn_probability: float
    mixed_probability: float
    lam: float
    """Weight of the kNN distribution for this token; with a gate it differs from token to token."""
    trust: float
    """What λ was multiplied by, as the text before is more or less like the datastore's; 1 if λ is not by text."""
    change: float | None
    """log2(p_mixed / p_LM), in bits: positive where retrieval made the token likelier; None if either is 0."""
    lm_likeliest: tuple[Likely, ...]
    knn_likeliest: tuple[Likely, ...]
    mixed_likeliest: tuple[Likely, ...]
    neighbors: tuple[SourcedNeighbor, ...]
    """The nearest neighbours, which have the largest weights."""


@dataclass(frozen=True)
class Explanation:
    """A text explained under one layer and setting."""

    layer: str
    setting: Mix
    beginning: str
    """The first token, which has no prediction."""
    tokens: tuple[ExplainedToken, ...]

    @property
    def lm_perplexity(self) -> float | None:
        """Perplexity of the tokens under the plain LM; None for infinity."""
        return _perplexity([one.lm_probability for one in self.tokens])

    @property
    def mixed_perplexity(self) -> float | None:
        """Perplexity of the tokens under the kNN-LM; None for infinity."""
        return _perplexity([one.mixed_probability for one in self.tokens])


class Explainer:
    """Explains texts with any layer of the datastore; the default is the layer of the given `Retrieval`.

    Another layer uses the setting fitted for it, or else that of the default layer.
    :param citer: as in `KNNLM.from_retrieval`.
    :param memory: as in `open_retrieval`, for the other layers.
    :raises DatastoreMismatch: the datastore was made with another model.
    """

    def __init__(
        self, lm: LanguageModel, retrieval: Retrieval, *, citer: Citer | None = None, memory: float | None = None
    ) -> None:
        self.lm, self.first = lm, retrieval.layer
        self.store = retrieval.searcher.store
        self._citer, self._memory = citer or Citer(lm), memory
        self._retrievals = {retrieval.layer: retrieval}
        self._models = {retrieval.layer: KNNLM.from_retrieval(lm, retrieval, self._citer)}
        self.token_text = TokenTexts(lm)

    def model(self, layer: str | None = None) -> KNNLM:
        """The kNN-LM with one layer's keys, opened on first use.

        :raises DatastoreMismatch: the layer is not stored.
        """
        layer = layer or self.first
        if layer not in self._models:
            self._models[layer] = KNNLM.from_retrieval(self.lm, self.retrieval(layer), self._citer)
        return self._models[layer]

    @property
    def memory(self) -> Memory:
        """The datastore's documents and their text."""
        return self._citer.memory(self.store)

    def retrieval(self, layer: str | None = None) -> Retrieval:
        """Retrieval from a layer's keys with its default setting. Raises as `model`."""
        layer = layer or self.first
        if layer not in self._retrievals:
            first = self._retrievals[self.first].setting
            k, temperature, lam = (None,) * 3 if self._fitted(layer) else (first.k, first.temperature, first.lam)
            self._retrievals[layer] = open_retrieval(self.store, layer, k, temperature, lam, self._memory)
        return self._retrievals[layer]

    def is_fitted(self, layer: str) -> bool:
        """Whether an evaluation fitted the layer's setting."""
        setting, fitted = self.retrieval(layer).setting, self._fitted(layer)
        numbers = {"k": setting.k, "temperature": setting.temperature, "lambda": setting.lam}
        gated = (setting.gate is None) == (fitted.get("gate") is None)
        return bool(fitted) and fitted.items() >= numbers.items() and gated

    def depth(self, layer: str | None = None) -> int:
        """Least number of neighbours of a search: the larger of the layer's k and the largest k that fitting tries.

        So many remain without any one document too, for what the probability would be without it.
        """
        return min(max(self.retrieval(layer).setting.k, KNNConfig.max_k), self.store.count)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text.

        :raises InputError: there are none, or more than the model's context limit.
        """
        tokens: list[int] = self.lm.encode(text).tolist()
        limit = self.lm.context_limit
        if not tokens:
            raise InputError("the text is empty; give some text")
        if limit is not None and len(tokens) > limit:
            raise InputError(f"the text has {len(tokens)} tokens, but {self.lm.name} takes {limit}; shorten it")
        return tokens

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token's part of the text, as `pieces_of`."""
        return pieces_of(self.lm, tokens)

    def evidence(self, tokens: Sequence[int], layer: str | None = None) -> list[Evidence]:
        """Evidence for each token but the first, from one forward pass and one search. Raises as `model`."""
        if len(tokens) < 2:
            return []
        model = self.model(layer)
        output, vectors_BTD = model.unmixed(torch.tensor([tokens[:-1]], device=self.lm.device))
        vectors_TD = vectors_BTD[0].float().cpu().numpy()
        found = deep_neighbors(model.retrieval.searcher, vectors_TD, self.depth(layer), self.memory.documents)
        places = zip(found, output.logits[0], tokens[1:], strict=True)
        # Row by row: log-probabilities of all positions at once would double the memory of the logits.
        return [_evidence(one, log_softmax(logits_V[None])[0], token) for one, logits_V, token in places]

    def explain(self, text: str, layer: str | None = None) -> Explanation:
        """Explain a text under the layer's setting.

        :raises InputError: as `encode`; or the text has a single token, which has no prediction.
        """
        tokens, setting = self.encode(text), self.retrieval(layer).setting
        found, pieces = self.evidence(tokens, layer), self.pieces(tokens)
        if not found:
            raise InputError("the text has one token, which nothing predicts; give a longer text")
        told, trust = [], Trust(setting)
        for evidence, token, piece in zip(found, tokens[1:], pieces[1:], strict=True):
            under = evidence.under(setting, trust.factor)
            told.append(self._token(evidence, under, trust.factor, token, piece))
            trust.add(evidence.gain(under, token))
        return Explanation(layer or self.first, setting, pieces[0], tuple(told))

    def go_on(
        self,
        tokens: Sequence[int],
        setting: Mix,
        layer: str | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Continuing:
        """Continue tokens under a setting with a k of at most `depth`; see `Continuing`."""
        return Continuing(
            self.model(layer),
            self.lm,
            tokens,
            setting,
            depth=self.depth(layer),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )

    def source(self, row: int) -> NeighborSource:
        """Source text around the value of a row of the datastore."""
        return read_source(self.store, row, self.lm.decode, self.token_text, before=BEFORE_TOKENS, after=AFTER_TOKENS)

    def _fitted(self, layer: str) -> dict[str, Any]:
        """Fitted setting of a layer in datastore.json; empty if there is none."""
        return (self.store.first.manifest.fitted or {}).get(layer) or {}

    def _token(self, evidence: Evidence, under: Prediction, trust: float, token: int, piece: str) -> ExplainedToken:
        at = evidence.place(token)
        lm, knn, mixed = (float(one_M[at]) for one_M in (under.lm_M, under.knn_M, under.mixed_M))
        return ExplainedToken(
            piece,
            lm,
            knn,
            mixed,
            under.lam,
            trust,
            math.log2(mixed / lm) if lm > 0 and mixed > 0 else None,
            self._likeliest(under.tokens_M, under.lm_M),
            self._likeliest(under.tokens_M, under.knn_M),
            self._likeliest(under.tokens_M, under.mixed_M),
            evidence.found.nearest(under.weights_K, SHOWN_NEIGHBORS, self.source),
        )

    def _likeliest(self, tokens_M: NDArray[np.int64], share_M: Floats) -> tuple[Likely, ...]:
        first = np.argsort(-share_M, kind="stable")[:LIKELIEST]
        return tuple(Likely(self.token_text(int(tokens_M[at])), float(share_M[at])) for at in first if share_M[at] > 0)


def _evidence(found: Neighborhood, log_probs_V: Tensor, token: int) -> Evidence:
    return make_evidence(found, log_probs_V).including(token, log_probs_V)


def _perplexity(probabilities: Sequence[float]) -> float | None:
    if not all(probabilities):
        return None
    return math.exp(-math.fsum(map(math.log, probabilities)) / len(probabilities))

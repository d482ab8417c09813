"""Generation token by token, with the evidence for each token: its neighbours and both distributions.

Shapes: T tokens, D dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm.inference.detokenizer import end_tokens
from knnlm.inference.model import KNNLM
from knnlm.inference.sampling import choose
from knnlm.knn.citing import deep_neighbors
from knnlm.knn.evidence import Evidence, make_evidence, mixed_log_probs
from knnlm.knn.mixing import Mix
from knnlm.knn.retrieval import Retrieval
from knnlm.knn.trust import Trust
from knnlm.model.head import log_prob, log_softmax
from knnlm.model.lm import LanguageModel


@dataclass(frozen=True, eq=False)
class NextToken:
    """A token chosen from the mixed distribution."""

    token: int
    evidence: Evidence
    ended: bool
    """Whether it is an end token."""


class Continuing:
    """A continuation: each `step` chooses a token by `knnlm.inference.sampling.choose`; the cache is kept.

    :param depth: neighbours that a search retrieves at least, also without any one document; the k nearest vote.
    """

    def __init__(
        self,
        model: KNNLM,
        lm: LanguageModel,
        tokens: Sequence[int],
        setting: Mix,
        *,
        depth: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._model, self._tokens, self._setting, self._depth = model, list(tokens), setting, depth
        self._temperature, self._top_p, self._random = temperature, top_p, np.random.default_rng(seed)
        self._ends = end_tokens(model, lm)
        self._past: Any = None
        self._trust: Trust | None = None

    def step(self) -> NextToken:
        """Choose the next token."""
        # Without a cache, the model reads all tokens again.
        fresh = self._tokens if self._past is None else self._tokens[-1:]
        output, vectors_BTD = self._model.unmixed(torch.tensor([fresh], device=self._model.device), self._past)
        self._past = output.get("past_key_values")
        log_probs_V = log_softmax(output.logits[0, -1:])[0]
        query_1D = vectors_BTD[0, -1:].float().cpu().numpy()
        searcher = self._model.retrieval.searcher
        trust = self._trust = self._trust or self._begin(vectors_BTD[0, :-1], output.logits[0, :-1])
        documents = self._model.citer.memory(searcher.store).documents
        (found,) = deep_neighbors(searcher, query_1D, self._depth, documents)
        evidence = make_evidence(found, log_probs_V)
        under = evidence.under(self._setting, trust.factor)
        token = choose(mixed_log_probs(under, log_probs_V), self._temperature, self._top_p, self._random)
        self._tokens.append(token)
        evidence = evidence.including(token, log_probs_V)
        trust.add(evidence.gain(under, token))
        return NextToken(token, evidence, token in self._ends)

    def _begin(self, vectors_TD: Tensor, logits_TV: Tensor) -> Trust:
        """The trust that the given tokens end with."""
        if not self._setting.by_text or not len(vectors_TD):
            return Trust(self._setting)
        retrieval = Retrieval(self._model.retrieval.searcher, self._setting)
        targets_T = torch.tensor(self._tokens[1:])
        lm_T = log_prob(logits_TV, targets_T).numpy()
        return Trust(self._setting, retrieval.gains_at(vectors_TD, targets_T.numpy(), lm_T).tolist())

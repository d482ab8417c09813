"""The mixed distribution sums to 1 over the full vocabulary, on every path that mixes and for odd neighbours too.

Vocabularies go up to 151,936 tokens: sums of so many terms in float32 are off by more than 1e-6, and where tokens are
equally likely, the rounding of their log-probabilities is the same and adds up.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from index.neighbors import Neighbors
from knnlm.inference.batch import RowModel
from knnlm.inference.by_text import RowPlan, TextMemory
from knnlm.inference.explain import Explainer
from knnlm.knn.evidence import find_neighbors, make_evidence, mixed_log_probs
from knnlm.knn.joint import JointSearcher
from knnlm.knn.mixing import Gate, Mix
from knnlm.knn.retrieval import Retrieval, RowRetrieval
from knnlm.model.head import log_softmax
from tests.inference.test_generation import GATE, PROMPTS, encode, knn_of, padded, stores  # noqa: F401
from tests.tiny_models import VOCABULARY

WITHIN = 1e-6
GATES = (None, Gate(3.0, -0.5, -0.9), Gate(-20.0, 0.0, 0.0), Gate(200.0, 0.0, 0.0), Gate(0.0, -50.0, -50.0))
K = 12


class Text(SimpleNamespace):
    """What is asked of a datastore; like one, a key of dictionaries by itself."""

    __hash__ = object.__hash__


class Found:
    """A searcher that finds what it is given: neighbours of `values`, fewer than asked for or none."""

    def __init__(self, found: Neighbors, values_N: np.ndarray) -> None:
        self.found, self.store, self.layer, self.metric = found, Text(values=values_N), "any", "l2"

    def neighbors(self, vectors_QD: np.ndarray, k: int) -> Neighbors:
        rows = vectors_QD[:, 0].astype(int)
        return Neighbors(self.found.distances_QK[rows, :k], self.found.ids_QK[rows, :k])


def searcher(rng: np.random.Generator, queries: int, vocabulary: int, scale: float) -> Found:
    """The first query has no neighbour, the second one, the third K at one distance; others any number."""
    values_N = rng.integers(0, vocabulary, 400).astype(np.int32)
    values_N[rng.random(400) < 0.5] = vocabulary - 1
    distances_QK = np.sort((rng.gamma(1.0, scale, (queries, K))).astype(np.float32), axis=1)
    ids_QK = rng.integers(0, 400, (queries, K))
    counts_Q1 = np.array([0, 1, K, *rng.integers(0, K + 1, max(0, queries - 3))])[:queries, None]
    if queries > 2:
        distances_QK[2] = distances_QK[2, 0]
    absent_QK = np.arange(K) >= counts_Q1
    distances_QK[absent_QK], ids_QK[absent_QK] = np.inf, -1
    return Found(Neighbors(distances_QK, ids_QK), values_N)


def several(rng: np.random.Generator, queries: int, vocabulary: int, scale: float, offset: float) -> JointSearcher:
    """Three datastores: one with an offset of its distances, and one that is not searched."""
    parts = tuple(searcher(rng, queries, vocabulary, scale) for _ in range(3))
    text = Text(values=np.concatenate([one.store.values for one in parts]), starts=(0, 400, 800))
    return JointSearcher(text, "any", parts, (0.0, offset, np.inf))


def lm_log_probs(rng: np.random.Generator, queries: int, vocabulary: int, sharpness: float) -> Tensor:
    logits = rng.standard_normal((queries, vocabulary)) * sharpness
    return log_softmax(torch.from_numpy(logits.astype(np.float32)))


def numbered(queries: int) -> Tensor:
    """Vectors by which `Found` knows its queries."""
    return torch.arange(queries, dtype=torch.float32)[:, None]


def check(log_probs_NV: Tensor) -> None:
    sums = log_probs_NV.double().exp().sum(-1)
    assert (sums - 1).abs().max() < WITHIN, sums


mixes = st.builds(
    Mix,
    k=st.integers(1, K + 5),
    temperature=st.sampled_from([1e-30, 0.01, 1.0, 40.0, 1e30]),
    lam=st.sampled_from([0.0, 1e-12, 1e-4, 0.3, 0.97, 1 - 1e-4, 1.0]),
    gate=st.sampled_from(GATES),
)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    vocabulary=st.sampled_from([2, 288, 50_257, 151_936]),
    sharpness=st.sampled_from([0.0, 1e-3, 3.0, 60.0]),
    scale=st.sampled_from([1e-6, 5.0, 1e4]),
    offset=st.sampled_from([0.0, -3.0, 1e-6, 1e5]),
    mixed=st.lists(mixes, min_size=2, max_size=2),
)
@example(
    seed=0, vocabulary=151_936, sharpness=0.0, scale=5.0, offset=0.0, mixed=[Mix(12, 1.0, 0.3), Mix(12, 1.0, 0.97)]
)
@example(
    seed=0, vocabulary=50_257, sharpness=0.0, scale=5.0, offset=0.0, mixed=[Mix(12, 1.0, 1e-4), Mix(3, 1.0, 1 - 1e-4)]
)
def test_any_mixture_sums_to_one(seed, vocabulary, sharpness, scale, offset, mixed) -> None:
    rng = np.random.default_rng(seed)
    one_store, plain = searcher(rng, 4, vocabulary, scale), lm_log_probs(rng, 4, vocabulary, sharpness)
    rows, vectors = torch.arange(4), numbered(4)
    joint = several(rng, 4, vocabulary, scale, offset)
    for found, setting in product((one_store, joint), mixed):
        one_NV = plain.clone()
        Retrieval(found, setting).mix_in(one_NV, rows, vectors)
        check(one_NV)
        assert torch.equal(one_NV[0], plain[0])  # no neighbour
        for one, lm_V in zip(find_neighbors(found, vectors.numpy(), setting.k), plain, strict=True):
            check(mixed_log_probs(make_evidence(one, lm_V).under(setting), lm_V)[None])
    for found, setting in product((one_store, joint), mixed):
        setting, tokens = replace(setting, by_text=True), rng.integers(0, vocabulary, 4)
        plan = RowPlan(tokens, Retrieval(found, setting), 0.5, np.arange(4), np.arange(4), np.arange(4))
        lm_Q = plain[torch.arange(4), torch.from_numpy(np.roll(tokens, -1))].double().numpy()
        text_NV = plain.clone()
        TextMemory(None).mix_in(text_NV, [plan], vectors, lm_Q)
        check(text_NV)
        assert torch.equal(text_NV[0], plain[0])
    for found in (one_store, joint):
        rows_NV, retrievals = plain.clone(), tuple(Retrieval(found, one) for one in mixed)
        RowRetrieval(found, mixed[0], retrievals).mix_in(rows_NV, rows, vectors)
        check(rows_NV)


# From a model's text to its numbers


@pytest.mark.parametrize("by_text", [False, True])
@pytest.mark.parametrize("gate", [None, GATE])
@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_logits_of_the_model_sum_to_one(lam, gate, by_text, knn_of) -> None:  # noqa: F811
    batch, model = padded([encode(prompt) for prompt in PROMPTS], "left"), knn_of("llama", lam=lam, gate=gate)
    model.retrieval = replace(model.retrieval, setting=replace(model.retrieval.setting, by_text=by_text))
    check(model(**batch).logits)


def test_log_probs_of_the_server_sum_to_one(knn_of) -> None:  # noqa: F811
    settings = (Mix(64, 4.0, 0.6), Mix(16, 2.0, 0.0), Mix(3, 0.5, 1.0), Mix(64, 4.0, 0.6, GATE, by_text=True))
    rows, heard = RowModel(model := knn_of("llama"), VOCABULARY), []
    retrievals = [Retrieval(model.retrieval.searcher, setting) for setting in settings]
    prompts = [encode(prompt) for prompt in (*PROMPTS, PROMPTS[0])]
    batch, log_probs_BV = rows.prefill(prompts, retrievals, lambda start, log_probs_BTV: heard.append(log_probs_BTV))
    check(torch.cat([log_probs_BV, batch.step([1, 2, 3, 4]), *(one.flatten(0, 1) for one in heard)]))


def test_explained_distributions_sum_to_one(stores, knn_of) -> None:  # noqa: F811
    (lm, _), model = stores("llama"), knn_of("llama")
    explainer, tokens = Explainer(lm, model.retrieval), encode(PROMPTS[0])
    plain = log_softmax(lm.model(torch.tensor([tokens[:-1]])).logits[0].detach())
    for setting in (Mix(64, 4.0, 0.6), Mix(64, 4.0, 0.6, GATE), Mix(3, 0.5, 1.0)):
        for evidence, lm_V in zip(explainer.evidence(tokens), plain, strict=True):
            told = evidence.under(setting, 0.37)
            rest = 1 - float(lm_V.double().exp()[told.tokens_M].sum())
            assert told.mixed_M.sum() + (1 - told.lam) * rest == pytest.approx(1, abs=WITHIN)
            assert told.knn_M.sum() == pytest.approx(1, abs=WITHIN)
            check(mixed_log_probs(evidence.under(setting, 0.37), lm_V)[None])

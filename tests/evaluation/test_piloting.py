"""The pilot against a kNN-LM written out in float64: every distance, every weight, every setting that is tried."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from knnlm.evaluation.parts import split_parts
from knnlm.evaluation.piloting import measure_pilot, pilots_of
from knnlm.knn.fitting import fit
from knnlm.knn.mixing import Search
from knnlm.model.lm import LanguageModel
from knnlm.results import Interval
from knnlm.scores.pilot import Pilot, pilot_change
from knnlm.scores.sample import Sample
from knnlm.scores.sample_search import query_rows, search_sample
from knnlm.statistics import relative_change
from tests.tiny_models import tiny_model, tiny_tokenizer


def informative(rows: int, seed: int = 0, noise: float = 1.0) -> Sample:
    """Vectors that tell their next token, more or less, in 12 clusters of text."""
    random = np.random.default_rng(seed)
    tokens, clusters = random.integers(0, 9, rows), random.integers(0, 12, rows)
    vectors = np.random.default_rng(99).normal(size=(9, 6))[tokens] + noise * random.normal(size=(rows, 6))
    return Sample(vectors.astype(np.float32), tokens, clusters)


def slow_loss(sample: Sample, row: int, lm: float, k: int, temperature: float, lam: float) -> float:
    """-log of the mixture's probability of a row's next token, from the k nearest keys of other clusters."""
    others = np.flatnonzero(sample.cluster_M != sample.cluster_M[row])
    distance = ((sample.vectors_MD[others].astype(np.float64) - sample.vectors_MD[row]) ** 2).sum(axis=1)
    nearest = np.argsort(distance)[:k]
    weight = np.exp(-(distance[nearest] - distance.min()) / temperature)
    right = sample.next_token_M[others][nearest] == sample.next_token_M[row]
    return -math.log(lam * weight[right].sum() / weight.sum() + (1 - lam) * math.exp(lm))


def test_pilot_is_a_small_knn_lm_fitted_on_other_clusters() -> None:
    sample = informative(600)
    found = search_sample(sample, neighbors=32, queries=300, seed=2)
    lm_Q = np.log(np.random.default_rng(3).uniform(0.05, 0.4, 300))
    parts = split_parts(found.cluster_Q)
    pilot = measure_pilot(found, lm_Q=lm_Q, parts=parts)
    assert len(pilot.losses_Q) == 300
    losses = []
    for scored in (parts.tuning_Q, parts.fitting_Q):
        others = ~scored
        setting = fit(Search(found.distances_QK[others], found.hits_QK[others]), lm_Q[others])
        assert not set(found.cluster_Q[scored]) & set(found.cluster_Q[others])
        for query in np.flatnonzero(scored):
            row = int(found.rows_Q[query])
            loss = slow_loss(sample, row, lm_Q[query], setting.k, setting.temperature, setting.lam)
            assert pilot.losses_Q[query] == pytest.approx(loss, rel=1e-4)
            losses.append(loss)
    assert pilot.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert pilot.perplexity < math.exp(-lm_Q.mean())


def test_pilot_orders_layers_by_what_their_keys_know() -> None:
    lm_Q = np.full(300, math.log(1 / 9))
    pilots = []
    for noise in (0.3, 1.0, 3.0):
        found = search_sample(informative(600, noise=noise), queries=300)
        pilots.append(measure_pilot(found, lm_Q=lm_Q, parts=split_parts(found.cluster_Q)))
    values = [pilot.perplexity for pilot in pilots]
    assert values == sorted(values)
    assert pilot_change(pilots[0], pilots[2], comparisons=150).high < 0


def test_change_of_pilots_is_the_paired_jackknife_widened_for_many() -> None:
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(10), 20)
    one, other = (Pilot(math.nan, random.normal(size=200), clusters) for _ in range(2))
    alone = pilot_change(one, other)
    assert alone == relative_change(one.losses_Q, other.losses_Q, clusters)[1]
    many = pilot_change(one, other, comparisons=150)
    assert many.low < alone.low < alone.high < many.high
    none = Pilot(math.nan, np.empty(0), np.empty(0, np.int64))
    assert np.isnan([*vars(pilot_change(one, none)).values()]).all()
    assert isinstance(alone, Interval)


def test_own_probabilities_are_those_of_the_model() -> None:
    """From the sampled `final_norm` vectors, as the head gives them."""
    lm = LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="tiny")
    dim = lm.dims["final_norm"]
    random = np.random.default_rng(1)
    vectors = random.normal(size=(200, dim)).astype(np.float32)
    head = Sample(vectors, random.integers(0, lm.vocabulary, 200), np.arange(200) // 10)
    measure = pilots_of(lm, head, seed=0)
    rows = query_rows(head.cluster_M, seed=0)
    logits = lm.model.get_output_embeddings()(torch.from_numpy(vectors[rows])).double()
    expected = torch.log_softmax(logits, 1)[torch.arange(len(rows)), torch.from_numpy(head.next_token_M[rows])]
    assert measure.keywords["lm_Q"] == pytest.approx(expected.detach().numpy(), abs=1e-5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("rows", "clusters"), [(40, 8), (400, 1)])
def test_pilot_of_too_small_a_sample_is_unknown(rows: int, clusters: int) -> None:
    lm = LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="tiny")
    head = Sample(
        np.ones((rows, lm.dims["final_norm"]), np.float32), np.zeros(rows, np.int64), np.arange(rows) % clusters
    )
    pilot = pilots_of(lm, head, seed=0)(search_sample(head))
    assert math.isnan(pilot.perplexity)
    assert not len(pilot.losses_Q)

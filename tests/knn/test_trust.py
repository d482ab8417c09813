"""λ by the text so far: against sums over all ways in which a text may change its domain, and its limits."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.knn.mixing import Gate, Mix, Search, knn_log_probs, mix
from knnlm.knn.trust import FIRST, SILENT, SWITCH, log_probs_by_text, token_gains, trusts, updated
from tests.knn.test_gate import lm_log_probs, make_search

SETTING = Mix(k=16, temperature=10.0, lam=0.4, gate=Gate(2.0, -0.3, -0.8), by_text=True)
gains = st.lists(st.floats(-9.3, 30.0), min_size=1, max_size=9)


def plain(search: Search, lm_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log p of the gated mixture and p_kNN of the targets."""
    knn_Q = knn_log_probs(search, SETTING.k, SETTING.temperature)
    return mix(lm_Q, knn_Q, SETTING.lambdas(search.distances_QK, search.values_QJ)), knn_Q


def enumerated(gains: list[float]) -> float:
    """The posterior of the mixture after these tokens: a sum over every sequence of the two forecasters."""
    mass = {True: 0.0, False: 0.0}
    for chain in itertools.product((True, False), repeat=len(gains) + 1):
        weight = 0.5
        for place, gain in enumerate(gains):
            weight *= math.exp(gain) if chain[place] else 1.0
            weight *= 1 / 1000 if chain[place] != chain[place + 1] else 999 / 1000
        mass[chain[-1]] += weight
    return mass[True] / (mass[True] + mass[False])


@given(gains=gains)
def test_trust_is_the_posterior_over_all_sequences_of_forecasters(gains) -> None:
    found = list(trusts(gains))
    assert found[0] == 0.5
    for place in range(len(gains)):
        assert found[place + 1] == pytest.approx(enumerated(gains[: place + 1]), rel=1e-9)


def oracle(search: Search, lm_Q: np.ndarray, documents_Q: np.ndarray) -> np.ndarray:
    """log p of every target in probabilities, not logarithms, by the forward algorithm of the two-state chain."""
    gated_Q, _ = plain(search, lm_Q)
    change = np.array([[1 - 1e-3, 1e-3], [1e-3, 1 - 1e-3]])
    found = np.empty(len(lm_Q))
    for document in np.unique(documents_Q):
        belief = np.array([0.5, 0.5])
        for place in np.flatnonzero(documents_Q == document):
            both = np.exp([gated_Q[place], lm_Q[place]])
            found[place] = both @ belief if belief[0] >= 0.01 else both[1]
            belief = change @ (belief * both)
            belief /= belief.sum()
    return np.log(found)


@pytest.mark.parametrize("documents", [1, 7, 400])
def test_log_probs_of_texts_equal_a_float64_oracle(documents) -> None:
    search, lm_Q = make_search(), lm_log_probs()
    documents_Q = np.arange(400) * documents // 400
    found = log_probs_by_text(search, lm_Q, SETTING, documents_Q)
    np.testing.assert_allclose(found, oracle(search, lm_Q, documents_Q), rtol=1e-9)
    always = log_probs_by_text(search, lm_Q, replace(SETTING, by_text=False), documents_Q)
    np.testing.assert_array_equal(always, plain(search, lm_Q)[0])
    assert not np.allclose(found, always)


def foreign(queries: int = 400) -> Search:
    """Neighbours that are never right."""
    return replace(make_search(queries=queries), hits_QK=np.zeros((queries, 16), bool))


def test_where_it_is_silent_the_answer_is_the_lms_to_the_bit() -> None:
    search, lm_Q = foreign(), lm_log_probs()
    found = log_probs_by_text(search, lm_Q, SETTING, np.zeros(400, int))
    first = int(np.flatnonzero(found == lm_Q)[0])
    assert 0 < first < 60
    np.testing.assert_array_equal(found[first:], lm_Q[first:])
    assert (found[:first] < lm_Q[:first]).all()


@given(seed=st.integers(0, 1000), right=st.sampled_from([0.0, 0.05, 0.3]))
def test_no_text_costs_more_than_the_bound(seed, right) -> None:
    """ln 2 + T α nats; what is cut off may add -ln(1 - 0.01) a token where the mixture is right after all."""
    search = make_search(seed)
    search = replace(search, hits_QK=np.random.default_rng(seed).random((400, 16)) < right)
    lm_Q = lm_log_probs()
    lost = (lm_Q - log_probs_by_text(search, lm_Q, SETTING, np.zeros(400, int))).cumsum()
    assert (lost <= math.log(2) - np.arange(1, 401) * math.log1p(-SWITCH) + 1e-9).all()


def test_a_text_that_changes_its_domain_is_followed() -> None:
    away, home = foreign(), make_search(3)
    both = Search(*(np.concatenate(pair) for pair in zip(vars(away).values(), vars(home).values(), strict=True)))
    lm_Q = np.concatenate([lm_log_probs(), lm_log_probs() - 2])
    found = log_probs_by_text(both, lm_Q, SETTING, np.zeros(800, int))
    gated_Q, _ = plain(both, lm_Q)
    kept = (found - lm_Q)[400:].sum() / (gated_Q - lm_Q)[400:].sum()
    assert kept > 0.9 and (found - lm_Q)[:400].sum() > -2


def test_tokens_that_are_impossible_for_one_or_both() -> None:
    assert updated(FIRST, math.inf) == pytest.approx(1 - SWITCH)
    assert updated(FIRST, -math.inf) == pytest.approx(SWITCH) and SWITCH < SILENT
    assert token_gains(np.array([-np.inf, -np.inf, -1.0]), np.array([-np.inf, -1.0, -np.inf])).tolist() == [
        *(0, -math.inf, math.inf)
    ]
    for trust in (SWITCH, 1 - SWITCH):
        for gain in (-1e300, -800.0, 800.0, 1e300):
            assert SWITCH <= updated(trust, gain) <= 1 - SWITCH

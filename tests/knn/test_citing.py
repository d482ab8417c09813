"""What documents gave to a token, against a loop that masks each one's keys; and how deep a search has to be."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.neighbors import Neighbors
from knnlm.knn.citing import DocumentMap, deep_neighbors, support
from knnlm.knn.evidence import Neighborhood
from knnlm.knn.mixing import Gate, Mix

KEYS = 300


def make_store(rng: np.random.Generator, documents: int) -> SimpleNamespace:
    """Values and documents; document 0 has half of the rows, and the last two parts are one document."""
    starts = np.sort(rng.choice(np.arange(KEYS // 2, KEYS), documents - 1, replace=False))
    rows = [[0, 1, 0, 1], *[[start, 1, number % 2, 2 + number] for number, start in enumerate(starts)]]
    rows[-1][2:] = rows[-2][2:]
    values = rng.integers(0, 6, KEYS).astype(np.int32)
    return SimpleNamespace(documents=np.array(rows), count=KEYS, values=values, sources=("a", "b"))


class Line:
    """A searcher of keys on a line.

    :param reached: how many of the keys it finds, as an index does that visits some of its lists.
    """

    def __init__(self, store: SimpleNamespace, keys_N: np.ndarray, reached: int = KEYS) -> None:
        self.store, self.keys_N, self.searched, self.reached = store, keys_N, 0, reached

    def neighbors(self, vectors_QD: np.ndarray, k: int) -> Neighbors:
        self.searched += len(vectors_QD)
        distances_QN = ((vectors_QD[:, :1] - self.keys_N) ** 2).astype(np.float32)
        distances_QN[:, ::-1][:, self.reached :] = np.inf
        ids_QK = np.argsort(distances_QN, axis=1, kind="stable")[:, :k]
        distances_QK = np.take_along_axis(distances_QN, ids_QK, 1)
        return Neighbors(distances_QK, np.where(np.isfinite(distances_QK), ids_QK, -1))


def slow(distances: list[float], values: list[int], token: int, lm: float, setting: Mix) -> float:
    """log p from the nearest k of these, in floats."""
    distances, values = distances[: setting.k], values[: setting.k]
    if not distances:
        return math.log(lm)
    weights = [math.exp(-(d - distances[0]) / setting.temperature) for d in distances]
    knn = sum(w for w, value in zip(weights, values, strict=True) if value == token) / sum(weights)
    lam = setting.lam
    if gate := setting.gate:
        logit = math.log(lam / (1 - lam)) + gate.offset + gate.distance * math.sqrt(distances[0])
        lam = 1 / (1 + math.exp(-logit - gate.different * math.log(len(set(values[:8])))))
    return math.log(lam * knn + (1 - lam) * lm)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    documents=st.integers(3, 60),
    k=st.sampled_from([1, 5, 20, 140, 290]),
    temperature=st.sampled_from([1e-3, 0.5, 100.0]),
    gate=st.sampled_from([None, Gate(1.0, -0.5, -0.7)]),
    reached=st.sampled_from([KEYS, 200, 7]),
)
def test_masking_equals_a_loop_over_documents(seed, documents, k, temperature, gate, reached) -> None:
    """Of the neighbours that an index finds, however deep it is asked for."""
    rng = np.random.default_rng(seed)
    store, setting = make_store(rng, documents), Mix(k, temperature, 0.6, gate)
    known, searcher = DocumentMap(store), Line(store, rng.normal(0, 3, KEYS), reached)
    queries, token, lm = rng.normal(0, 3, (4, 1)).astype(np.float32), 2, 0.05
    for query, found in zip(queries, deep_neighbors(searcher, queries, k, known), strict=True):
        told = support(found, known.of(found.rows_K), token, math.log(lm), setting)
        distances_N = ((query - searcher.keys_N) ** 2).astype(np.float32)
        order = np.argsort(distances_N, kind="stable")
        order = order[order >= KEYS - reached]
        of_N = known.of(order)
        every = [float(distances_N[row]) for row in order], store.values[order].tolist()
        assert told.log_prob == pytest.approx(slow(*every, token, lm, setting), abs=1e-5)
        assert told.documents_M.tolist() == sorted(set(of_N[:k].tolist()))
        for document, share, without in zip(told.documents_M, told.shares_M, told.without_M, strict=True):
            kept = of_N != document
            rest = distances_N[order[kept]].astype(float).tolist(), store.values[order[kept]].tolist()
            assert without == pytest.approx(slow(*rest, token, lm, setting), abs=1e-5)
            assert share >= 0
        assert told.shares_M.sum() + told.lm_share == pytest.approx(1, abs=1e-6)


def test_parts_of_a_document_are_one() -> None:
    store = make_store(np.random.default_rng(0), 5)
    known = DocumentMap(store)
    assert len(known.sizes_M) == 4 and known.sizes_M.sum() == KEYS
    last, before = store.documents[-1, 0], store.documents[-2, 0]
    assert len(set(known.of(np.array([last, before])).tolist())) == 1
    assert known.name(int(known.of(np.array([KEYS - 1]))[0])) == ("ab"[store.documents[-1, 2]], store.documents[-1, 3])


def test_only_queries_that_need_more_are_searched_again() -> None:
    rng = np.random.default_rng(1)
    store = make_store(rng, 40)
    keys_N = np.where(np.arange(KEYS) < KEYS // 2, 100.0, 0.0) + rng.normal(0, 1, KEYS)
    searcher, queries = Line(store, keys_N), np.array([[100.0], [0.0], [0.1]], np.float32)
    near, *others = deep_neighbors(searcher, queries, 20, DocumentMap(store))
    assert len(near.rows_K) >= KEYS // 2 + 20 and all(len(one.rows_K) < 60 for one in others)
    assert searcher.searched < 9


def test_without_neighbours_the_lm_has_it_all() -> None:
    empty = Neighborhood(np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int32))
    told = support(empty, np.empty(0, np.int64), 3, math.log(0.2), Mix(4, 1.0, 0.5))
    assert told.log_prob == pytest.approx(math.log(0.2)) and told.lm_share == pytest.approx(1)
    assert not len(told.documents_M)


def test_a_token_that_is_all_but_impossible_has_shares() -> None:
    """p_LM below what float64 holds."""
    found = Neighborhood(np.zeros(3, np.float32), np.arange(3), np.array([1, 1, 2], np.int32))
    told = support(found, np.array([0, 0, 1]), 3, -1000.0, Mix(2, 1.0, 0.5))
    assert told.log_prob == pytest.approx(math.log(0.5) - 1000)
    assert told.lm_share == pytest.approx(1) and told.shares_M.tolist() == [0]

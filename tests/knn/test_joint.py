"""Several datastores searched as one, against one datastore with the keys of all, and sums in float64 over raw keys."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.errors import DatastoreMismatch, InputError
from knnlm.knn.joint import JointSearcher, merge_searches, offsets_of, open_search, weights_of
from knnlm.knn.mixing import Gate, Mix
from knnlm.knn.retrieval import Retrieval
from knnlm.knn.searcher import open_searcher
from knnlm.model.head import log_softmax
from knnlm.store.changes import merge
from knnlm.store.datastore import Datastore
from knnlm.store.joint import JointStore, as_store, open_datastores
from knnlm.store.writer import DatastoreWriter
from tests.store.test_changes import FRAME

LAYER, DIM, VOCABULARY, METRICS = "1.ffn_input", 4, 30, ("l2", "cosine", "ip")


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def make(folder: Path, rng, lengths, *, frame=None, layers=(LAYER,), spread=1.0, **other) -> Datastore:
    """A datastore of documents of these lengths, its vectors around a place of its own."""
    folder.mkdir()
    dims, place = dict.fromkeys(layers, DIM), rng.normal(size=DIM)
    given = {**FRAME, "key_dtype": "float32", **other}
    with DatastoreWriter(folder, dims, part_rows=8, frame=frame, **given) as writer:
        for number, length in enumerate(lengths, 1):
            writer.begin_document(int(rng.integers(VOCABULARY)), "text", number)
            writer.append_values(rng.integers(0, VOCABULARY, length).astype(np.int32))
            for layer in layers:
                writer.append_keys(layer, (place + spread * rng.normal(size=(length, DIM))).astype(np.float32))
        writer.finish()
    return Datastore.open(folder)


def raw(store: Datastore) -> np.ndarray:
    keys = store.keys(LAYER)
    return keys.read(0, store.count).astype(np.float64) + keys.centre


def queries(rng, count=6) -> np.ndarray:
    return (0.5 * rng.normal(size=(count, DIM))).astype(np.float32)


def mixed(searcher, setting: Mix, vectors_QD: np.ndarray) -> np.ndarray:
    """p of the mixture with a uniform LM, [Q, V]."""
    log_probs_QV = log_softmax(torch.zeros(len(vectors_QD), VOCABULARY))
    Retrieval(searcher, setting).mix_in(log_probs_QV, torch.arange(len(vectors_QD)), torch.from_numpy(vectors_QD))
    return log_probs_QV.double().exp().numpy()


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=12)
@given(
    lengths=st.lists(LENGTHS, min_size=2, max_size=3),
    seed=st.integers(0, 99),
    k=st.integers(1, 40),
    temperature=st.sampled_from([0.1, 1.0, 30.0]),
    gate=st.sampled_from([None, Gate(1.0, -0.5, -0.9)]),
)
def test_several_are_one_with_the_keys_of_all(lengths, seed, k, temperature, gate) -> None:
    rng, setting = np.random.default_rng(seed), Mix(k, temperature, 0.6, gate)
    with tempfile.TemporaryDirectory() as folder:
        stores: list[Datastore] = []
        for number, each in enumerate(lengths):
            stores.append(make(Path(folder, f"{number}"), rng, each, frame=stores[0] if stores else None))
        Path(folder, "merged").mkdir()
        merged, joint, vectors_QD = merge(stores, Path(folder, "merged")), open_datastores(stores), queries(rng)
        check_same_text(joint, merged)
        for metric in METRICS:
            ours, theirs = open_search(joint, LAYER, metric), open_searcher(merged, LAYER, metric)
            one, other = ours.neighbors(vectors_QD, k), theirs.neighbors(vectors_QD, k)
            assert np.array_equal(one.ids_QK, other.ids_QK)
            np.testing.assert_allclose(one.distances_QK, other.distances_QK, rtol=1e-6, atol=1e-6)
            got, wanted = mixed(ours.at(temperature), setting, vectors_QD), mixed(theirs, setting, vectors_QD)
            np.testing.assert_allclose(got, wanted, atol=1e-6)


def check_same_text(joint: JointStore, merged: Datastore) -> None:
    assert joint.count == len(joint) == merged.count and np.array_equal(joint.values, merged.values)
    assert joint.layers == merged.layers and not joint.values.flags.writeable
    for row in range(joint.count):
        of = next(number for number, start in reversed(list(enumerate(joint.starts))) if row >= start)
        source, number = merged.document_of(row)
        assert joint.document_of(row) == (f"{of}/{source}", number)
        assert joint.context(row, 9).tolist() == merged.context(row, 9).tolist()
        assert joint.continuation(row, 9).tolist() == merged.continuation(row, 9).tolist()


def distances(metric: str, queries_QD: np.ndarray, keys_ND: np.ndarray) -> np.ndarray:
    if metric == "l2":
        return ((queries_QD[:, None] - keys_ND) ** 2).sum(-1)
    dots_QN = queries_QD @ keys_ND.T
    if metric == "ip":
        return -dots_QN
    return 2 - 2 * dots_QN / np.linalg.norm(queries_QD, axis=1)[:, None] / np.linalg.norm(keys_ND, axis=1)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> tuple[Datastore, Datastore, Datastore]:
    """Datastores with centres of their own, the second with a scale too, and the third of less than k keys."""
    folder, rng = tmp_path_factory.mktemp("others"), np.random.default_rng(5)
    return make(folder / "a", rng, (30, 11)), make(folder / "b", rng, (25,)), make(folder / "c", rng, (3, 2))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 0.2, 5), (0, 1, 1), (2.5, 0, 0)])
def test_weights_multiply_what_each_neighbour_counts(metric, weights, others) -> None:
    vectors_QD, k, temperature = queries(np.random.default_rng(7)), 12, 1.5
    centres = [one.keys(LAYER).centre for one in others]
    assert not any(np.allclose(*pair) for pair in itertools.combinations(centres, 2))
    searcher = open_search(open_datastores(others, weights), LAYER, metric).at(temperature)
    got = mixed(searcher, Mix(k, temperature, 1 - 1e-9), vectors_QD)
    keys_ND, values_N = np.concatenate([raw(one) for one in others]), np.concatenate([one.values for one in others])
    weights_N = np.repeat(weights, [one.count for one in others])
    far_QN = distances(metric, vectors_QD.astype(np.float64), keys_ND)
    heavy_QN = weights_N * np.exp((far_QN.min() - far_QN) / temperature)
    for row_N, got_V in zip(heavy_QN, got, strict=True):
        nearest = np.argsort(-row_N)[:k]
        wanted_V = np.bincount(values_N[nearest], row_N[nearest], VOCABULARY) / row_N[nearest].sum()
        np.testing.assert_allclose(got_V, wanted_V, atol=1e-5)


def test_one_of_weight_0_is_not_searched(others) -> None:
    first, second, _ = others
    searcher = open_search(open_datastores([first, second], [1, 0]), LAYER, "l2").at(2.0)
    assert isinstance(searcher, JointSearcher)
    broken = replace(searcher, searchers=(searcher.searchers[0], None))
    vectors_QD = queries(np.random.default_rng(1))
    one, other = broken.neighbors(vectors_QD, 8), open_searcher(first, LAYER, "l2").neighbors(vectors_QD, 8)
    assert np.array_equal(one.ids_QK, other.ids_QK) and np.array_equal(one.distances_QK, other.distances_QK)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 0.2, 5), (1, 0, 1)])
@pytest.mark.parametrize("k", [5, 60])
def test_merged_searches_are_the_search_of_all(metric, weights, k, others) -> None:
    vectors_QD, joint, offsets = queries(np.random.default_rng(3), 9), open_datastores(others), offsets_of(weights, 1.5)
    searcher = open_search(joint, LAYER, metric, offsets=offsets)
    assert isinstance(searcher, JointSearcher)
    found = searcher.neighbors(vectors_QD, k)
    values_QK = np.where(found.ids_QK >= 0, joint.values[found.ids_QK], -1)
    targets_Q = np.where(np.arange(9) < 7, values_QK[:, 3], VOCABULARY)
    got = merge_searches(searcher.cached(vectors_QD, targets_Q, k), offsets, k)
    np.testing.assert_allclose(got.distances_QK, found.distances_QK, rtol=1e-5)
    assert np.array_equal(got.hits_QK, values_QK == targets_Q[:, None])
    assert np.array_equal(got.values_QJ, values_QK[:, :8])


def test_weights_and_offsets_are_the_same_thing() -> None:
    offsets = offsets_of((1, 0.25, 0, 3), 7.0)
    assert offsets[0] == 0 and math.isinf(offsets[2]) and weights_of(offsets, 7.0) == (1, 0.25, 0, 3)


def test_what_cannot_be_joined_is_one_line(others, tmp_path) -> None:
    first, second, _ = others
    rng = np.random.default_rng(0)
    for weights, said in (((1,), "there are 2"), ((1, -1), "at least 0"), ((0, 0), "above 0"), ((1, math.inf), "fin")):
        with pytest.raises(InputError, match=said):
            open_datastores([first, second], weights)
    with pytest.raises(InputError, match="is given twice"):
        open_datastores([first, Datastore.open(first.folder)])
    with pytest.raises(InputError, match="no datastore"):
        as_store([])
    other = {**FRAME["fingerprint"], "tokenizer": "d"}
    stranger = make(tmp_path / "stranger", rng, (4,), fingerprint=other)
    with pytest.raises(
        DatastoreMismatch, match=r"stranger was made with another model .* tokenizer d here and c there"
    ):
        open_datastores([first, stranger])
    elsewhere = make(tmp_path / "elsewhere", rng, (4,), layers=("0.ffn_input",))
    with pytest.raises(DatastoreMismatch, match=r"no layer is in all.*elsewhere of 0\.ffn_input"):
        open_datastores([first, elsewhere])
    both = make(tmp_path / "both", rng, (4,), layers=("0.ffn_input", LAYER))
    assert open_datastores([both, first]).layers == (LAYER,)
    with pytest.raises(DatastoreMismatch, match=rf"a has no keys of layer 0\.ffn_input; it has {LAYER}"):
        open_search(open_datastores([both, first]), "0.ffn_input", "l2")


def test_names_tell_datastores_apart(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    stores = [make(tmp_path / name, rng, (3,)) for name in ("x/same", "y/same", "other")]
    joint = open_datastores(stores)
    assert joint.names == ("x/same", "y/same", "other") and joint.name == "x/same+y/same+other"
    assert joint.sources == ("x/same/text", "y/same/text", "other/text")
    assert as_store([stores[0].folder]).folder == stores[0].folder and as_store(joint) is joint

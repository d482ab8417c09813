"""An index whose datastore has changed: no removed key is found, no later one is missed, and nothing is trained."""

from __future__ import annotations

import os

import numpy as np
import pytest

from index.faiss_index import FaissIndex
from knnlm.config import KNNConfig, Settings
from knnlm.errors import DatastoreCorrupt
from knnlm.knn.indexing import index_layer, verify_store
from knnlm.knn.renewing import renew_indexes
from knnlm.knn.searcher import open_searcher
from knnlm.progress import Silent
from knnlm.store.changes import compact, remove
from knnlm.store.datastore import Datastore
from tests.store.test_changes import add, build

SPECS = ("IVF8,Flat", "IVF8,PQ3x4fs", "HNSW8,Flat", "PQ3x4", "exact")


def documents(first, count, size=20):
    rng = np.random.default_rng(first)
    for number in range(first, first + count):
        tokens = rng.integers(0, 99, size + 1).astype(np.int32)
        vectors = {"0.ffn_input": rng.normal(size=(size, 3)), "final_norm": rng.normal(size=(size, 2))}
        yield "a.txt", number, tokens, {name: one.astype(np.float32) for name, one in vectors.items()}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path, request):
    made = build(tmp_path / "store", documents(1, 30), part_rows=150)
    index_layer(made, "0.ffn_input", Settings(knn=KNNConfig(index=request.param, k=8)))
    return Datastore.open(made.folder)


def recall(store):
    """Share of the true 8 nearest, by a brute force in float64, that the index finds; with the rows that it gave."""
    keys = store.keys("0.ffn_input")
    queries = np.random.default_rng(7).normal(size=(40, 3)).astype(np.float32)
    rows = keys.read(0, store.count).astype(np.float64) + keys.centre
    exact = np.argsort(((queries[:, None] - rows) ** 2).sum(-1), axis=1)[:, :8]
    found = open_searcher(store, "0.ffn_input", "l2").neighbors(queries, 8)
    assert (found.ids_QK >= 0).all() and (found.ids_QK < store.count).all()
    true = ((queries[:, None] - rows[found.ids_QK]) ** 2).sum(-1)
    np.testing.assert_allclose(found.distances_QK, true, rtol=1e-4, atol=1e-5)
    return np.mean(
        [len({*one} & {*other}) / 8 for one, other in zip(found.ids_QK.tolist(), exact.tolist(), strict=True)]
    )


def near(store):
    """Documents that hold the nearest keys of a query: removing them takes what FAISS finds first."""
    keys = store.keys("0.ffn_input")
    rows = np.argsort(((keys.read(0, store.count) + keys.centre) ** 2).sum(-1))[:60]
    return sorted({store.document_of(int(row)) for row in rows})[:6]


@pytest.mark.parametrize("store", SPECS, indirect=True)
def test_index_follows_every_change(store, monkeypatch):
    monkeypatch.setattr(FaissIndex, "train", lambda *_: pytest.fail("it was trained"))
    least = recall(store) - 0.05
    for change in (
        lambda one: remove(one, near(one)),
        lambda one: add(one, documents(31, 5), part_rows=150),
        lambda one: remove(one, [("a.txt", 33)]),
        lambda one: compact(one, part_rows=300),
        lambda one: add(one, documents(41, 20), part_rows=150),
    ):
        store = change(store)
        assert recall(store) >= least  # as it is, before it is renewed
        assert verify_store(store.folder, Silent()) == ()
        (report,) = renew_indexes(store)
        store = Datastore.open(store.folder)
        entry = store.manifest.indexes["0.ffn_input"]
        assert recall(store) >= least and report.recall == entry["recall"] >= least
        assert verify_store(store.folder, Silent()) == () and renew_indexes(store) == renew_indexes(store)
        assert len(list((store.folder / "index").iterdir())) == 1  # no older one is left


@pytest.mark.parametrize("store", ["IVF8,Flat"], indirect=True)
def test_index_of_other_keys_is_refused(store):
    changed = remove(store, [("a.txt", 1)])
    entry = changed.manifest.indexes["0.ffn_input"]
    parts = [entry["parts"][0] | {"rows": 1}, *entry["parts"][1:]]
    changed.update_manifest(indexes={"0.ffn_input": entry | {"parts": parts}})
    with pytest.raises(DatastoreCorrupt, match="number of keys"):
        open_searcher(Datastore.open(store.folder), "0.ffn_input", "l2")

"""Actors on a Ray cluster find what one process finds, also after they were killed."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from knnlm.cluster.search import ClusterSearch
from knnlm.config import KNNConfig
from knnlm.errors import DatastoreError
from knnlm.knn.indexing import index_layer
from knnlm.knn.joint import open_search
from knnlm.knn.retrieval import open_retrieval
from knnlm.pipeline import remove
from knnlm.store.datastore import Datastore
from knnlm.store.joint import open_datastores
from tests.cluster.conftest import SETTINGS
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl

pytest.importorskip("ray")


def actors() -> list[int]:
    """Processes that hold a share of a datastore."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::SearchActor"):
            found.append(int(process.name))
    return found


def same(one, other) -> bool:
    return np.array_equal(one.distances_QK, other.distances_QK) and np.array_equal(one.ids_QK, other.ids_QK)


@pytest.fixture(scope="module")
def store(one_process: Path, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    folder = tmp_path_factory.mktemp("searched") / "store"
    shutil.copytree(one_process, folder)
    return Datastore.open(folder)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_actors_find_the_neighbours_of_one_process(opening, store, metric):
    (layer,) = store.layers
    vectors_QD = np.random.default_rng(0).normal(size=(40, store.keys(layer).dim)).astype(np.float32)
    # Keys themselves, many of them equal: equally near ones are in the order of their ids.
    vectors_QD[:20] = store.keys(layer).read(0, 20) + store.keys(layer).centre
    there = open_search(store, layer, metric, exact=True, opening=opening)
    here = open_search(store, layer, metric, exact=True)
    for k in (1, 50, store.count + 5):
        assert same(there.neighbors(vectors_QD, k), here.neighbors(vectors_QD, k)), k


def test_several_datastores_and_generations_are_searched_while_others_are_held(opening, cluster, store, tmp_path):
    """Actors once kept all CPUs for themselves, so that those of a second datastore waited for ever."""
    shutil.copytree(store.folder, tmp_path / "other")
    several, (layer,) = open_datastores([store, Datastore.open(tmp_path / "other")]), store.layers
    vectors_QD = store.keys(layer).read(0, 5) + store.keys(layer).centre
    held = open_search(several, layer, "l2", opening=opening)
    assert same(held.neighbors(vectors_QD, 20), open_search(several, layer, "l2").neighbors(vectors_QD, 20))
    grown = remove(tmp_path / "other", [(store.sources[0], 1)])
    there = open_search(grown, layer, "l2", opening=opening)
    assert same(there.neighbors(vectors_QD, 20), open_search(grown, layer, "l2").neighbors(vectors_QD, 20))
    with pytest.raises(DatastoreError, match="has changed since it was opened"):
        open_search(several.stores[1], layer, "l2", opening=ClusterSearch(cluster)).neighbors(vectors_QD, 1)


def test_an_approximate_index_finds_the_same_and_a_killed_actor_too(cluster, lm, one_process, tmp_path):
    shutil.copytree(one_process, tmp_path / "store")
    folder, (layer,) = tmp_path / "store", Datastore.open(one_process).layers
    shutil.rmtree(folder / "index")
    index_layer(folder, layer, replace(SETTINGS, knn=KNNConfig(index="IVF16,PQ8x4fs")))
    store, others = Datastore.open(folder), actors()
    there, here = open_search(store, layer, "l2", opening=ClusterSearch(cluster)), open_search(store, layer, "l2")
    vectors_QD = np.random.default_rng(0).normal(size=(40, store.keys(layer).dim)).astype(np.float32)
    expected = here.neighbors(vectors_QD, 20)
    assert same(there.neighbors(vectors_QD, 20), expected)
    killed = set(actors()) - set(others)
    assert len(killed) >= 2
    os.kill(killed.pop(), signal.SIGKILL)
    assert same(there.neighbors(vectors_QD, 20), expected)
    assert same(there.neighbors(vectors_QD[:1], 20), here.neighbors(vectors_QD[:1], 20))


def test_the_command_line_evaluates_on_the_cluster(raylets, cluster, store, call, tmp_path):
    text = write_jsonl(tmp_path / "held-out.jsonl", texts(900, 6))
    given = ("eval", store.folder, "--eval-text", text, "--eval-tokens", 600, "--k", 8, "--dry-run", "--json")
    here, there = call(*given), call(*given, "--ray", raylets.address)
    assert (there.status, there.out) == (here.status, here.out) and there.out.startswith("{")


def test_generation_retrieves_what_one_process_does(opening, store):
    # The seam by which `knnlm serve --ray` searches.
    here = open_retrieval(store, None, 8, 1.0, 0.25)
    there = open_retrieval(store, None, 8, 1.0, 0.25, opening=opening)
    for queries in (1, 5):
        vectors_QD = torch.randn(queries, store.keys(store.layers[0]).dim, generator=torch.Generator().manual_seed(0))
        one, other = here.find(vectors_QD), there.find(vectors_QD)
        assert np.array_equal(one.distances_QK, other.distances_QK) and np.array_equal(one.values_QK, other.values_QK)

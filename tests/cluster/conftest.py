"""Several raylets on this machine, and a tiny model with its text in files that all of them can read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knnlm.cluster.core import Cluster, open_cluster
from knnlm.cluster.search import ClusterSearch
from knnlm.config import KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.pipeline import build
from knnlm.store import writer as store_writer
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl

PART_ROWS = 2000
SETTINGS = Settings(
    text=TextConfig(context=32, stride=16),
    layers=LayerConfig(candidates="*.ffn_input"),
    knn=KNNConfig(k=8, lam=0.25, temperature=1.0, index="exact"),
)


class Raylets:
    """A cluster whose machines are processes here, with a CPU each: the head and another."""

    def __init__(self, ray_cluster: Any) -> None:
        self.all, self.nodes = ray_cluster, []
        self.add()

    @property
    def address(self) -> str:
        return self.all.address

    def add(self) -> None:
        """Have another machine; only in the main thread."""
        self.nodes.append(self.all.add_node(num_cpus=1, object_store_memory=80 << 20))

    def lose(self, pid: int) -> bool:
        """Lose at once the machine on which a worker runs, unless it is the head."""
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        for node in self.nodes:
            if node.all_processes["raylet"][0].process.pid == parent:
                self.nodes.remove(node)
                self.all.remove_node(node, allow_graceful=False)
                return True
        return False


@pytest.fixture(scope="package")
def raylets() -> Iterator[Raylets]:
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster as RayCluster

    # A lost machine is noticed after 5 seconds instead of 15, and workers do not wait for all other work.
    quick = {"health_check_period_ms": 1000, "worker_niceness": 0}
    head = {
        "num_cpus": 1,
        "include_dashboard": False,
        "object_store_memory": 80 << 20,
        "_system_config": quick,
    }
    started = RayCluster(initialize_head=True, head_node_args=head)
    yield Raylets(started)
    started.shutdown()


@pytest.fixture(scope="package")
def cluster(raylets: Raylets) -> Iterator[Cluster]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with open_cluster(raylets.address) as opened:
            yield opened


@pytest.fixture(scope="package")
def opening(cluster: Cluster) -> ClusterSearch:
    """Of one datastore the actors are started once."""
    return ClusterSearch(cluster)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "PART_ROWS", PART_ROWS)


@pytest.fixture(scope="package")
def lm(gpt2_folder: Path) -> LanguageModel:
    return load_model(gpt2_folder)


@pytest.fixture(scope="package")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of some 250 tokens; one fills several parts."""
    long = " ".join(texts(500, 30))
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "text.jsonl", [*texts(0, 20), long, *texts(20, 20)])


@pytest.fixture(scope="package")
def one_process(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel, corpus: Path) -> Path:
    """The datastore as one process makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "PART_ROWS", PART_ROWS)
        return build(lm, [corpus], tmp_path_factory.mktemp("one") / "store", settings=SETTINGS).folder

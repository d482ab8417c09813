"""Kinds of FAISS index against the peers' setting, on real keys: time per query, probability mass found, perplexity.

    .venv/bin/python scripts/benchmarks/indexes.py STORE --eval-text held-out.jsonl --json indexes.json

All kinds share the lists that are learnt once, so that they differ in codes only. FAISS proposes and exact distances
decide, as in `knnlm`; the peers' setting (knn-transformers) takes FAISS's distances as they are.

Legend: N keys, Q queries, K neighbours, D dimension.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import peer
from extraction import documents
from machine import describe
from numpy.typing import NDArray
from ratios import timed

from index.metric import Metric
from index.neighbors import Neighbors
from index.rerank import rerank
from index.source import VectorSource
from index.spec import choose_lists, parse_spec
from knnlm.config import TextConfig
from knnlm.evaluation.queries import open_queries
from knnlm.knn.fitting import fit
from knnlm.knn.mixing import Mix, Search, knn_log_probs, mix, neighbor_weights
from knnlm.knn.searcher import open_searcher
from knnlm.model.loading import load_model
from knnlm.store.datastore import Datastore
from knnlm.text.windows import window_config

K = 1024
# What follows `IVF…,`; PQ and fast-scan codes have D/4 sub-vectors, so 64 of 256 dimensions.
CODES = ("Flat", "SQfp16", "SQ8", "SQ4", "PQ{m}", "PQ{m}x4fs", "PQ{m2}x4fs", "RaBitQ", "RaBitQfs", "SQ6")
WITH_GRAPH = ("PQ{m}x4fs",)
PROBES = (8, 16, 32, 64, 128, 256)
OVERFETCH = (1.0, 1.5, 2.0, 3.0)
# `nprobe` and candidates with which ours finds about as much weight as the peers' setting on the same lists.
BESIDE_PEERS = (32, 40, 48, 64), (1.0, 1.25, 1.5)


@dataclass(frozen=True)
class Found:
    """One setting of one kind."""

    kind: str
    nprobe: int
    overfetch: float
    milliseconds: float
    """Time per query when all are searched together, the median of the rounds."""
    recall: float
    mass: float
    """Share of the exact K nearest neighbours' weight that was found, at the fitted temperature."""
    perplexity: float
    bytes_per_key: float


@dataclass(frozen=True)
class Truth:
    """Queries with their exact neighbours."""

    queries_QD: NDArray[np.float32]
    targets_Q: NDArray[np.int32]
    lm_Q: NDArray[np.float64]
    values_N: NDArray[np.int32]
    exact: Neighbors
    mix: Mix

    def judge(self, found: Neighbors) -> tuple[float, float, float]:
        """Recall, mass and perplexity."""
        radius_Q1 = self.exact.distances_QK[:, -1:] * (1 + 1e-6)
        recall = float(np.mean((found.distances_QK <= radius_Q1) & (found.ids_QK >= 0)))
        nearest_Q1 = self.exact.distances_QK[:, :1].astype(np.float64)
        weights_QK = np.exp((nearest_Q1 - found.distances_QK) / self.mix.temperature)
        mass = float(
            np.mean(weights_QK.sum(1) / neighbor_weights(self.exact.distances_QK, self.mix.temperature).sum(1))
        )
        return recall, mass, self.perplexity(found)

    def perplexity(self, found: Neighbors) -> float:
        hits_QK = (self.values_N[found.ids_QK] == self.targets_Q[:, None]) & (found.ids_QK >= 0)
        search = Search(found.distances_QK, hits_QK)
        return float(np.exp(-mix(self.lm_Q, knn_log_probs(search, K, self.mix.temperature), self.mix.lam).mean()))


def truth(store: Datastore, held_out: Path, queries: int) -> tuple[Truth, VectorSource, float]:
    """Return queries of held-out text, the keys, and the seconds of exact search."""
    lm, (layer,) = load_model(store.model, dtype="float32"), store.layers
    with open_queries(
        lm, documents(lm, [held_out], queries), window_config(TextConfig(), lm.name, lm.context_limit), [layer]
    ) as opened:
        keys = store.keys(layer)
        queries_QD = keys.prepare_queries(opened.vectors(layer), "l2")
        searcher = open_searcher(store, layer, "l2", exact=True)
        seconds, exact = timed(lambda: searcher.index.search(queries_QD, K))
        hits_QK = store.values[exact.ids_QK] == opened.targets_Q[:, None]
        fitted = fit(Search(exact.distances_QK, hits_QK), opened.lm_Q)
        return Truth(queries_QD, opened.targets_Q, opened.lm_Q, store.values, exact, fitted), keys, seconds


def centroids(keys_ND: NDArray[np.float32], lists: int) -> NDArray[np.float32]:
    """Lists learnt as `index.build` has FAISS learn them."""
    rng = np.random.default_rng(0)
    points = parse_spec(f"IVF{lists},Flat").training_points(len(keys_ND), keys_ND.shape[1])
    means = faiss.Kmeans(keys_ND.shape[1], lists, niter=10, seed=1, min_points_per_centroid=1)
    means.train(keys_ND[np.sort(rng.choice(len(keys_ND), points, replace=False))])
    return np.asarray(means.centroids)


def built(spec: str, keys_ND: NDArray[np.float32], means_LD: NDArray[np.float32]) -> Any:  # noqa: ANN401
    """A FAISS index with given lists."""
    index = faiss.index_factory(keys_ND.shape[1], spec)
    lists = faiss.extract_index_ivf(index)
    lists.quantizer.train(means_LD)
    lists.quantizer.add(means_LD)
    index.train(keys_ND[:: max(1, len(keys_ND) // 65_536)])
    index.add(keys_ND)
    return index


def settings_of(
    kind: str,
    index: Any,  # noqa: ANN401
    real: Truth,
    source: VectorSource,
    rounds: int,
    *,
    probes: Sequence[int] = PROBES,
    overfetch: Sequence[float] = OVERFETCH,
) -> Iterator[Found]:
    """Each `nprobe` with more candidates, as long as they bring more neighbours."""
    size = len(faiss.serialize_index(index)) / index.ntotal
    for nprobe in probes:
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", nprobe)
        best = 0.0
        for wider in overfetch:
            seconds, found = timed(partial(_search, index, real, source, int(wider * K) + 16), rounds)
            recall, mass, perplexity = real.judge(found)
            milliseconds = 1000 * seconds / len(real.queries_QD)
            yield Found(kind, nprobe, wider, milliseconds, recall, mass, perplexity, size)
            if recall - best < 0.002:
                break
            best = recall


def _search(index: Any, real: Truth, source: VectorSource, candidates: int) -> Neighbors:  # noqa: ANN401
    ids_QC = np.asarray(index.search(real.queries_QD, candidates)[1], np.int64)
    return rerank(real.queries_QD, ids_QC, source, Metric.L2, K)


def beside_the_peers(keys_ND: NDArray[np.float32], real: Truth, source: VectorSource, rounds: int) -> Iterator[Found]:
    """The peers' setting, and the codes that `auto` uses on the same lists, in turn."""
    means_LD, ours = centroids(keys_ND, peer.LISTS), f"IVF{peer.LISTS},PQ{keys_ND.shape[1] // 2}x4fs"
    theirs_index, ours_index = (built(spec, keys_ND, means_LD) for spec in (peer.INDEX, ours))
    for _ in range(rounds):
        yield _as_the_peers(theirs_index, real, source)
        probes, overfetch = BESIDE_PEERS
        yield from settings_of(ours, ours_index, real, source, 1, probes=probes, overfetch=overfetch)


def _as_the_peers(index: Any, real: Truth, source: VectorSource) -> Found:  # noqa: ANN401
    """FAISS's own distances from codes, nothing computed again; recall and mass are of what was found."""
    faiss.ParameterSpace().set_index_parameter(index, "nprobe", peer.PROBES)
    seconds, (distances_QK, ids_QK) = timed(lambda: index.search(real.queries_QD, K))
    recall, mass, _ = real.judge(rerank(real.queries_QD, ids_QK, source, Metric.L2, K))
    perplexity = real.perplexity(Neighbors(distances_QK, ids_QK))
    size = len(faiss.serialize_index(index)) / index.ntotal
    milliseconds = 1000 * seconds / len(real.queries_QD)
    return Found(f"peers: {peer.INDEX}", peer.PROBES, 1.0, milliseconds, recall, mass, perplexity, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--eval-text", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    store = Datastore.open(args.store)
    real, source, seconds = truth(store, args.eval_text, args.queries)
    keys_ND, dim = source.read(0, len(source)), source.dim
    lists = choose_lists(len(source), dim, 8 << 30)
    fill = {"m": dim // 4, "m2": dim // 2}
    about = {"keys": len(source), "dim": dim, "lists": lists, "mix": asdict(real.mix), "machine": describe()}
    exact = Found("exact", 0, 1, 1000 * seconds / args.queries, 1.0, 1.0, real.perplexity(real.exact), 0.0)
    measured: dict[str, list[Found]] = {"found": [exact], "beside_peers": []}

    def keep() -> None:
        document = about | {name: [asdict(one) for one in rows] for name, rows in measured.items()}
        args.json.write_text(json.dumps(document, indent=1), encoding="utf-8")

    measured["beside_peers"] += beside_the_peers(keys_ND, real, source, args.rounds)
    keep()
    means_LD = centroids(keys_ND, lists)
    for spec in [f"IVF{lists},{c}" for c in CODES] + [f"IVF{lists}_HNSW32,{c}" for c in WITH_GRAPH]:
        kind = spec.format(**fill)
        build_seconds, index = timed(partial(built, kind, keys_ND, means_LD))
        print(f"{kind}: built in {build_seconds:.0f} s", file=sys.stderr, flush=True)
        measured["found"] += settings_of(kind, index, real, source, args.rounds)
        keep()


if __name__ == "__main__":
    main()

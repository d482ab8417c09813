"""Build the index of one layer of a datastore, measure it against exact search, and keep it beside the keys."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from index.build import build_index
from index.errors import VectorIndexError
from index.recall import measure_recall
from index.storage import save_index
from index.storage import verify as verify_index
from knnlm.config import Settings
from knnlm.datastore import Datastore
from knnlm.progress import Progress
from knnlm.results import IndexReport
from knnlm.search import index_metric

RECALL_QUERIES = 256


def index_layer(
    store: Datastore,
    layer: str,
    settings: Settings,
    progress: Progress,
    vectors_QD: NDArray[np.float32] | None = None,
) -> IndexReport:
    """Index the layer's keys as `settings.knn.index` says; recall@k is measured and stored with the index.

    :param vectors_QD: raw vectors of an evaluation text to measure recall with; without them, stored keys are searched
        for, which lie where other keys are, and recall comes out higher than on new text.
    :raises index.errors.UnknownSpec: FAISS does not understand the factory string.
    """
    knn = settings.knn
    metric = index_metric(knn.metric)
    keys = store.keys(layer)
    source = keys.for_metric(knn.metric)
    queries: int | NDArray[np.float32] = min(RECALL_QUERIES, store.count)
    if vectors_QD is not None:
        spread = vectors_QD[:: max(1, len(vectors_QD) // RECALL_QUERIES)]
        queries = keys.prepare_queries(spread, knn.metric)
    with progress.stage(f"indexing {layer}", "keys") as advance:
        built = build_index(source, knn.index, metric=metric, k=knn.search_k, seed=settings.seed, progress=advance)
    k = min(knn.search_k, store.count - 1)
    recall = measure_recall(built, source, k=k, queries=queries, seed=settings.seed)
    save_index(built, store.index_folder(layer), recall=recall)
    report = IndexReport(layer, built.spec, recall.recall, k, built.size_bytes)
    store.update_manifest(indexes={layer: {"metric": knn.metric, "spec": built.spec, "recall": recall.recall, "k": k}})
    return report


def verify_store(store: Datastore, progress: Progress) -> tuple[str, ...]:
    """What is wrong with the datastore's files and indexes, a line each; nothing when it is whole."""
    with progress.stage("verifying", "bytes") as advance:
        problems = list(store.verify(advance))
    for layer in store.manifest.indexes:
        try:
            verify_index(store.index_folder(layer))
        except VectorIndexError as error:
            problems.append(str(error))
    return tuple(problems)

"""The index of one layer of a datastore: built, measured against exact search, and saved beside the keys.

Legend: Q queries, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.base import VectorIndex
from index.build import BUILD_BYTES, build_index, tune_index
from index.errors import VectorIndexError
from index.manifest import Recall
from index.recall import measure_recall
from index.storage import save_index
from knnlm.config import KNNConfig, Settings
from knnlm.errors import DatastoreCorrupt, DatastoreError
from knnlm.knn.searcher import checked_index, index_metric
from knnlm.memory import work_bytes
from knnlm.places import INDEX_FILES, remove_files
from knnlm.progress import Progress, Silent
from knnlm.results import IndexReport
from knnlm.store.datastore import Datastore, as_datastore
from knnlm.store.hub import refuse_cached
from knnlm.store.tokens import check_tokens

RECALL_QUERIES = 256


def index_layer(
    store: str | Path | Datastore,
    layer: str,
    settings: Settings | None = None,
    progress: Progress | None = None,
    vectors_QD: NDArray[np.float32] | None = None,
) -> IndexReport:
    """Build the layer's index as `settings.knn.index` specifies; recall@k is measured and stored with the index.

    :param store: an opened datastore, or its folder.
    :param vectors_QD: raw vectors of an evaluation text to measure recall with; without them stored keys are the
        queries, which gives a higher recall than new text.
    :raises index.errors.VectorIndexError: the index cannot be built; the datastore is unchanged.
    """
    store, settings = as_datastore(store), settings or Settings()
    refuse_cached(store.folder)
    progress, knn = progress or Silent(), settings.knn
    source, metric = store.keys(layer).for_metric(knn.metric), index_metric(knn.metric)
    with progress.stage("indexing", "keys") as advance:
        built = build_index(
            source,
            knn.index,
            metric=metric,
            recall_target=None,
            seed=settings.seed,
            progress=advance,
            scratch=store.folder,
            work_bytes=work_bytes(settings.memory, BUILD_BYTES),
        )
    k = min(knn.search_k, max(1, store.count - 1))
    measured = None  # exact search has a recall of 1, and measuring it would read every key twice
    if built.spec != "exact":
        with progress.stage("tuning the index", "queries"):
            tune_index(built, k=k, seed=settings.seed)
        with progress.stage("measuring recall", "queries"):
            queries = _recall_queries(store, layer, knn, vectors_QD)
            measured = measure_recall(built, source, k=k, queries=queries, seed=settings.seed)
    return _keep(store, layer, knn.metric, built, k, measured)


def try_index(
    store: Datastore, layer: str, settings: Settings, progress: Progress, vectors_QD: NDArray[np.float32] | None = None
) -> tuple[IndexReport | None, tuple[str, ...]]:
    """As `index_layer`, but return None and a warning instead of raising, so that earlier work is not lost."""
    try:
        return index_layer(store, layer, settings, progress, vectors_QD), ()
    except VectorIndexError as error:
        warning = (
            f"{layer} has no index: {error}; the datastore is whole and is searched exactly, until "
            "knnlm.index_layer makes an index"
        )
        return None, (warning,)


def _recall_queries(
    store: Datastore, layer: str, knn: KNNConfig, vectors_QD: NDArray[np.float32] | None
) -> int | NDArray[np.float32]:
    """A subset of the vectors, evenly spaced, as queries; without vectors, the number of stored keys to sample."""
    if vectors_QD is None:
        return min(RECALL_QUERIES, store.count)
    spread_QD = vectors_QD[:: max(1, len(vectors_QD) // RECALL_QUERIES)]
    return store.keys(layer).prepare_queries(spread_QD, knn.metric)


def _keep(
    store: Datastore, layer: str, metric: str, built: VectorIndex, k: int, measured: Recall | None
) -> IndexReport:
    """Save the index, then enter it in the manifest: an index that is not entered there is never opened."""
    folder, recall = store.index_folder(layer), measured.recall if measured else 1.0
    with store.changing():
        if layer not in store.manifest.built_indexes:
            remove_files(folder, INDEX_FILES)  # of a run that was stopped between the two
        save_index(built, folder, recall=measured)
        store.update_manifest(indexes={layer: {"metric": metric, "spec": built.spec, "recall": recall, "k": k}})
    return IndexReport(layer, built.spec, recall, k, built.size_bytes)


def verify_store(folder: str | Path, progress: Progress) -> tuple[str, ...]:
    """Return one line for each problem in a datastore's files and indexes, none if it is intact.

    Every file is checked, even if the datastore cannot be opened because of others.
    :raises DatastoreError: the folder is no datastore.
    """
    try:
        store = Datastore.look(folder)
    except DatastoreCorrupt as error:
        return (str(error),)
    with progress.stage("verifying", "bytes") as advance:
        problems = list(store.verify(advance)) or _token_problems(store)
    for layer in store.manifest.built_indexes:
        with progress.stage(f"verifying the index of {layer}", "bytes"):
            problems += _index_problems(store, layer)
    return tuple(problems)


def check_before_use(store: Datastore, layers: Sequence[str], progress: Progress, *, exact: bool = False) -> None:
    """Verify all files of an opened datastore that an evaluation of the layers will read.

    :param exact: no index will be read.
    :raises DatastoreCorrupt: a file has changed since it was written; gives the first problem and the number of others.
    """
    with progress.stage("verifying", "bytes") as advance:
        problems = list(store.verify(advance, layers))
    for layer in layers:
        if layer in store.manifest.built_indexes and not exact:
            problems += _index_problems(store, layer)
    if problems:
        more = f" (and {len(problems) - 1} more: knnlm verify names them)" if len(problems) > 1 else ""
        raise DatastoreCorrupt(problems[0] + more)


def _token_problems(store: Datastore) -> list[str]:
    try:
        check_tokens(store)
    except DatastoreCorrupt as error:
        return [str(error)]
    return []


def _index_problems(store: Datastore, layer: str) -> list[str]:
    """Problems of the index as it was when the datastore was opened."""
    try:
        saved = checked_index(store, layer)
        saved.check_files()
        source = store.keys(layer).for_metric(store.manifest.index_metric(layer))
        if store.index_runs(layer) is None:
            saved.check_source(source, index_metric(source.metric))
    except (VectorIndexError, DatastoreError) as error:
        return [str(error)]
    return []

"""Indexes of a datastore whose documents have changed: brought up to date, if they can be without training."""

from __future__ import annotations

from dataclasses import asdict

from index.base import VectorIndex
from index.build import add_keys
from index.covered import Cover, CoveredIndex
from index.recall import measure_recall
from index.storage import save_index
from knnlm.config import KNNConfig, Settings
from knnlm.knn.indexing import try_index
from knnlm.knn.searcher import open_layer_index
from knnlm.progress import Advance, Progress, Silent
from knnlm.results import IndexReport
from knnlm.store.datastore import Datastore
from knnlm.store.document_table import index_runs
from knnlm.store.manifest import IndexedPart, IndexEntry

# With a larger share of removed keys, all others are encoded again: each search asks for as many more.
MOST_REMOVED = 0.25
# Stored keys searched exactly to tell recall: most of what a change takes. A build, which searches for twice as many,
# has set the search effort.
RENEWED_QUERIES = 128


def renew_indexes(store: Datastore, progress: Progress | None = None) -> tuple[IndexReport, ...]:
    """Bring every index of a datastore up to date with its documents; recall is measured again on stored keys.

    Keys that an index lacks are encoded with what it has learned; only an index that is still to be built is trained,
    or a note says why it cannot be. Until then, and if this is stopped, keys are compared exactly.
    :raises index.errors.CorruptIndex: an index is damaged.
    """
    progress, reports = progress or Silent(), []
    for layer in store.manifest.indexes:
        entry = store.manifest.index_entry(layer)
        if entry is None or entry.parts is None:
            continue
        report = _renew(store, layer, entry, progress) if entry.parts else _train(store, layer, entry, progress)
        reports += [] if report is None else [report]
    return tuple(reports)


def _train(store: Datastore, layer: str, entry: IndexEntry, progress: Progress) -> IndexReport | None:
    knn = KNNConfig(metric=entry.metric, index=entry.spec, k=entry.k)
    report, warnings = try_index(store, layer, Settings(knn=knn), progress)
    for warning in warnings:
        progress.note(warning)
    return report


def _renew(store: Datastore, layer: str, entry: IndexEntry, progress: Progress) -> IndexReport:
    index, parts, recall = open_layer_index(store, layer), entry.parts or (), None
    k, is_new = min(entry.k, max(1, store.count - 1)), True
    if isinstance(index, CoveredIndex):
        with progress.stage(f"adding to the index of {layer}", "keys") as advance:
            index, parts, is_new = _updated(store, index, parts, advance)
        with progress.stage("measuring recall", "queries"):
            recall = measure_recall(index, index.source, k=k, queries=min(RENEWED_QUERIES, store.count))
    else:  # exact search has nothing to bring up to date
        parts = ()
    share = 1.0 if recall is None else recall.recall
    told = {"metric": entry.metric, "spec": entry.spec, "recall": share, "k": k}
    with store.changing():
        folder = f"{layer}~{store.manifest.generation + 1}" if is_new else entry.folder
        if is_new:
            save_index(index, store.folder / "index" / folder, recall=recall)
        indexed = [asdict(part) for part in parts] or None
        store.update_manifest(indexes={layer: told | {"folder": folder, "parts": indexed}})
        store.remove_leftovers()
    return IndexReport(layer, entry.spec, share, k, index.size_bytes)


def _updated(
    store: Datastore, index: CoveredIndex, parts: tuple[IndexedPart, ...], advance: Advance
) -> tuple[VectorIndex, tuple[IndexedPart, ...], bool]:
    """The index with all keys; what it is then built over (empty: the rows that count); whether its file changes."""
    built, removed, names = index.built, index.cover.removed, {part.name for part in parts}
    later = [part for part in store.manifest.parts if part.name not in names]
    if removed > MOST_REMOVED * index.cover.indexed:
        built.native.reset()
        add_keys(built, index.source, advance, store.folder)
        return built, (), True
    if not len(index.later):
        return index, parts, False
    add_keys(built, index.later, advance, store.folder)
    if not removed:
        return built, (), True
    over = (*parts, *(IndexedPart(part.name, part.live, part.removed) for part in later))
    runs = index_runs(over, store.part_documents, store.live_rows)
    return CoveredIndex(index.source, index.metric, built, Cover(runs, built.indexed)), over, True

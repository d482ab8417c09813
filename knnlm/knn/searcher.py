"""Search in a datastore: the index that serves a layer, and the cached search that evaluation uses.

Legend: Q queries, K neighbours, D dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from index.base import VectorIndex
from index.build import check_spec
from index.covered import Cover
from index.errors import CorruptIndex, VectorIndexError
from index.exact import ExactIndex
from index.metric import Metric
from index.neighbors import Neighbors
from index.saved import SavedIndex
from index.spec import parse_spec
from index.storage import open_covered
from index.storage import open_index as open_saved
from knnlm.config import KNNConfig, Settings
from knnlm.errors import DatastoreCorrupt, DatastoreError, InputError
from knnlm.knn.mixing import NEAREST, Search
from knnlm.layer_names import select_layers
from knnlm.memory import work_bytes
from knnlm.progress import Advance, ignore
from knnlm.store.datastore import Datastore
from knnlm.store.joint import AnyStore

# Queries searched together: bounds the memory of ids and distances, 12 bytes x K each.
QUERY_BLOCK = 4096


class Searches(Protocol):
    """Finds the nearest keys of prepared queries: an index, in this process or elsewhere."""

    work_bytes: int
    """Memory that a search may take."""

    def search(self, queries_QD: NDArray[np.float32], k: int, /) -> Neighbors:
        """Return the k nearest keys of each query."""


class OpenIndex(Protocol):
    """Opens what searches a layer: `open_index`, or a function that has it done elsewhere."""

    def __call__(self, store: Datastore, layer: str, metric: str, /, *, exact: bool) -> Searches: ...  # noqa: D102


@dataclass(frozen=True)
class LayerSearcher:
    """A layer's keys with the index that searches them, under one metric."""

    store: Datastore
    layer: str
    metric: str
    index: Searches

    @property
    def searchers(self) -> tuple[LayerSearcher, ...]:
        """Itself, as the only one."""
        return (self,)

    def at(self, temperature: float) -> LayerSearcher:
        """Return itself: only in a search of several datastores something depends on the temperature."""
        return self

    def neighbors(self, vectors_QD: NDArray[np.float32], k: int) -> Neighbors:
        """Return the k nearest keys of raw (not centred) vectors of the layer."""
        queries_QD = self.store.keys(self.layer).prepare_queries(vectors_QD, self.metric)
        return self.index.search(queries_QD, k)

    def cached(
        self, vectors_QD: NDArray[np.float32], targets_Q: NDArray[np.int32], k: int, advance: Advance = ignore
    ) -> Search:
        """Search once for all queries; keep distances, whether each value equals the target, and the nearest values.

        The keys leave memory afterwards: those of all layers together would take as much as the datastore.
        """
        count = len(targets_Q)
        distances_QK = np.empty((count, k), np.float32)
        hits_QK = np.empty((count, k), np.bool_)
        values_QJ = np.empty((count, min(k, NEAREST)), np.int32)
        values = self.store.values
        for start in range(0, count, QUERY_BLOCK):
            rows = slice(start, min(start + QUERY_BLOCK, count))
            found = self.neighbors(vectors_QD[rows], k)
            distances_QK[rows] = found.distances_QK
            values_QK = np.where(found.ids_QK >= 0, values[found.ids_QK], -1)
            hits_QK[rows] = values_QK == targets_Q[rows, None]
            values_QJ[rows] = values_QK[:, :NEAREST]
            advance(rows.stop, count)
        self.store.keys(self.layer).release()
        return Search(distances_QK, hits_QK, values_QJ)


def open_searcher(
    store: Datastore,
    layer: str,
    metric: str,
    *,
    exact: bool = False,
    memory: float | None = None,
    opening: OpenIndex | None = None,
) -> LayerSearcher:
    """Return the layer with the index that the datastore holds for it, or with exact search.

    :param exact: search exactly even if there is an index.
    :param memory: bytes that the process may take; None: searches take what is quick.
    :param opening: opens what searches, in the place of `open_index`.
    :raises InputError: the index was built for another metric.
    :raises DatastoreCorrupt: a file of the index is missing, short or changed.
    :raises DatastoreError: FAISS refuses the index for another reason.
    """
    index = (opening or open_index)(store, layer, metric, exact=exact)
    index.work_bytes = work_bytes(memory, index.work_bytes)
    return LayerSearcher(store, layer, metric, index)


def open_index(store: Datastore, layer: str, metric: str, *, exact: bool) -> VectorIndex:
    """Return the index that searches a layer here. Parameters and errors as in `open_searcher`."""
    source = store.keys(layer).for_metric(metric)
    # By the manifest, not the folder: a run stopped between the two leaves an index that is not known to be complete.
    if exact or layer not in store.manifest.built_indexes:
        return ExactIndex(source, index_metric(metric))
    _check_metric(store, layer, metric)
    try:
        return open_layer_index(store, layer)
    except CorruptIndex as error:
        raise DatastoreCorrupt(str(error)) from None
    except VectorIndexError as error:
        raise DatastoreError(str(error)) from None


def is_searched_exactly(store: Datastore, layer: str, *, exact: bool) -> bool:
    """Return whether `open_index` compares every key of a layer."""
    entry = store.manifest.index_entry(layer)
    return exact or layer not in store.manifest.built_indexes or (entry is not None and is_exact(entry.spec))


def open_layer_index(store: Datastore, layer: str) -> VectorIndex:
    """Return the layer's index over the rows that count now, also if these have changed since it was built.

    :raises index.errors.CorruptIndex: it is damaged, or another one.
    """
    saved, runs, entry = checked_index(store, layer), store.index_runs(layer), store.manifest.index_entry(layer)
    source = store.keys(layer).for_metric(store.manifest.index_metric(layer))
    if runs is None:
        return open_saved(saved, source)
    if saved.manifest.is_exact:
        return ExactIndex(source, Metric(saved.manifest.metric))
    built_over = sum(part.rows for part in (entry and entry.parts) or ())
    saved.compare(saved.folder, "number of keys", saved.manifest.count, built_over)
    return open_covered(saved, source, Cover(runs, saved.manifest.count))


def checked_index(store: Datastore, layer: str) -> SavedIndex:
    """Return the layer's index, not yet loaded, checked against the datastore's manifest.

    :raises index.errors.CorruptIndex: it is another one, or its files are missing or short.
    """
    saved, entry = store.saved_index(layer), store.manifest.indexes[layer]
    saved.compare(saved.folder, "spec", saved.manifest.spec, entry["spec"])
    saved.compare(saved.folder, "metric", saved.manifest.metric, index_metric(entry["metric"]).value)
    return saved


def searched_layers(store: AnyStore, settings: Settings) -> tuple[str, ...]:
    """Return the layers that an evaluation searches. The settings a datastore was built with are always accepted.

    Of several datastores, the layers that all have, unless others are named.

    :raises LayerError: a pattern matches no layer of the datastore.
    :raises DatastoreMismatch: one of several datastores has no keys of a layer that is named; lists those that it has.
    :raises InputError: more neighbours than keys, another index than the datastore's, or one for another metric.
    """
    pattern, knn = settings.layers.layers, settings.knn
    same = pattern in (None, built_with(store.first).get("layers"))
    layers = store.layers if same else select_layers(pattern or "all", store.first.layers)
    check_k(knn.k, store.count)
    for one in store.stores:
        one.check_layers(layers)
        _check_own_index(one, knn)
        for layer in layers:
            if layer in one.manifest.indexes and not is_exact(knn.index):
                _check_metric(one, layer, knn.metric)
    return layers


def _check_own_index(store: Datastore, knn: KNNConfig) -> None:
    spec = parse_spec(knn.index)
    own = {built_with(store).get("index"), *(one["spec"] for one in store.manifest.indexes.values())}
    if not (spec.is_auto or spec.is_exact or spec.text in own):
        raise InputError(f"`index` is {knn.index!r}, but a datastore has its own; take auto, or exact")


def is_exact(index: str) -> bool:
    """Return whether `settings.knn.index` asks for exact search."""
    return parse_spec(index).is_exact


def built_with(store: Datastore) -> Mapping[str, Any]:
    """Return the settings stored with the scores; empty if the datastore was written without scores."""
    scores = store.manifest.scores
    return scores.get("settings", {}) if isinstance(scores, Mapping) else {}


def _check_metric(store: Datastore, layer: str, metric: str) -> None:
    built_for = store.manifest.index_metric(layer)
    if built_for != metric:
        raise InputError(
            f"the index of {layer} in {store.folder} was built for `metric={built_for!r}`, not {metric}; "
            f"take `metric={built_for!r}`, or `index='exact'`"
        )


def index_metric(metric: str) -> Metric:
    """Return the index's metric: cosine is squared L2 (2 - 2 cos) on unit vectors, which `Keys` provides."""
    return Metric.IP if metric == "ip" else Metric.L2


def check_index(knn: KNNConfig, dims: Sequence[int]) -> None:
    """Raise index.errors.UnknownSpec if FAISS does not accept the index for a layer's dimension."""
    for dim in set(dims):
        check_spec(knn.index, dim, index_metric(knn.metric))


def check_count(knn: KNNConfig, count: int) -> None:
    """Check, as soon as the keys are counted, that there are enough.

    :raises InputError: fewer than k.
    :raises index.errors.TooFewKeys: fewer than training the index needs.
    """
    check_k(knn.k, count)
    parse_spec(knn.index).check_count(count)


def check_k(k: int | None, count: int) -> None:
    """Raise InputError if there are fewer than k keys."""
    if k is not None and k > count:
        raise InputError(f"`k` is {k}, but the datastore has only {count} keys; take a smaller k or more text")

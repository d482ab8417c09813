"""Search by Ray actors: each maps the datastore and searches its share; what they find is merged exactly.

Without an approximate index each actor compares a range of rows. An approximate index is one file over all parts, of
which every list may be needed: each actor maps it and searches for a share of the queries. Only queries and neighbours
pass through Ray's object store.

Legend: Q queries, D dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.base import WORK_BYTES
from index.covered import RunsSource
from index.exact import ExactIndex
from index.faiss_index import thread_count, use_threads
from index.neighbors import Neighbors, merge, stack
from knnlm.cluster.core import Actor, Cluster, Need
from knnlm.errors import DatastoreError
from knnlm.knn.searcher import Searches, index_metric, is_searched_exactly, open_index
from knnlm.store.datastore import Datastore

# An actor is started anew, and what it was asked is asked again, as often as this: a search changes nothing.
RETRIES = 10


@dataclass(frozen=True)
class Sought:
    """Whose keys are searched, and how."""

    layer: str
    metric: str
    by_rows: bool
    """Each actor compares its range of rows; otherwise each uses the whole of an approximate index."""


class SearchActor:
    """Searches its share of a datastore, in a process of its own; the files are opened at the first search."""

    def __init__(self, folder: Path, content: str, rows: tuple[int, int], threads: int) -> None:
        """Prepare for a datastore of this content, and this range of its rows."""
        self._folder, self._content, self._rows = folder, content, rows
        use_threads(threads)
        self._opened: dict[Sought, Searches] = {}

    def neighbors(self, sought: Sought, queries_QD: NDArray[np.float32], k: int, work_bytes: int) -> Neighbors:
        """Return the k nearest of the actor's rows for prepared queries; through an approximate index, of all rows.

        :raises DatastoreError: the datastore is not on this machine, or has changed since it was opened.
        """
        if sought not in self._opened:
            self._opened[sought] = self._open(sought)
        searches = self._opened[sought]
        searches.work_bytes = work_bytes
        found = searches.search(queries_QD, k)
        if not sought.by_rows:
            return found
        return Neighbors(found.distances_QK, np.where(found.ids_QK < 0, -1, found.ids_QK + self._rows[0]))

    @cached_property
    def _store(self) -> Datastore:
        store = Datastore.open(self._folder)
        if _content(store) != self._content:
            raise DatastoreError(
                f"{self._folder} has changed since it was opened; give the same command again, or reload it where it "
                "is served"
            )
        return store

    def _open(self, sought: Sought) -> Searches:
        if not sought.by_rows:
            return open_index(self._store, sought.layer, sought.metric, exact=False)
        keys = self._store.keys(sought.layer).for_metric(sought.metric)
        return ExactIndex(RunsSource(keys, np.array([self._rows], np.int64)), index_metric(sought.metric))


class SharedIndex:
    """The index of a layer, or its keys where it has none, in the hands of actors."""

    def __init__(self, cluster: Cluster, actors: Sequence[Actor], sought: Sought) -> None:
        self._cluster, self._actors, self._sought = cluster, actors, sought
        self.work_bytes = WORK_BYTES
        """Memory that the search of each actor may take."""

    def search(self, queries_QD: NDArray[np.float32], k: int) -> Neighbors:
        """Return the k nearest keys of each query, as one process would.

        :raises DatastoreError: an actor is lost again and again, or cannot open the datastore.
        """
        if self._sought.by_rows:
            shared = self._cluster.put(queries_QD)
            return merge(self._asked([(one, shared) for one in self._actors], k), k)
        cuts = np.linspace(0, len(queries_QD), len(self._actors) + 1).astype(int).tolist()
        blocks = [queries_QD[start:stop] for start, stop in itertools.pairwise(cuts)]
        wanted = [pair for pair in zip(self._actors, blocks, strict=True) if len(pair[1])]
        return stack(self._asked(wanted or [(self._actors[0], queries_QD)], k))

    def _asked(self, questions: Sequence[tuple[Actor, object]], k: int) -> list[Neighbors]:
        pending = [
            actor.call(SearchActor.neighbors, self._sought, queries, k, self.work_bytes) for actor, queries in questions
        ]
        return [one.result() for one in pending]


class ClusterSearch:
    """Opens indexes on a cluster, in the place of `knnlm.knn.searcher.open_index`.

    A datastore's actors serve all its layers, until another generation of it is opened or this is let go.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._actors: dict[Path, tuple[str, list[Actor]]] = {}

    def __call__(self, store: Datastore, layer: str, metric: str, *, exact: bool) -> Searches:
        """Return the layer's index, held by actors. Raises as `open_index` where the driver can tell."""
        open_index(store, layer, metric, exact=exact)
        sought = Sought(layer, metric, is_searched_exactly(store, layer, exact=exact))
        return SharedIndex(self._cluster, self._of(store), sought)

    def _of(self, store: Datastore) -> list[Actor]:
        folder, content = store.folder.resolve(), _content(store)
        if self._actors.get(folder, ("", []))[0] != content:
            threads = min(thread_count(), self._cluster.most_cpus)
            count = min(self._cluster.slots(Need(cpus=threads)), store.count)
            cuts = np.linspace(0, store.count, count + 1).astype(int).tolist()
            actors = [
                self._cluster.actor(SearchActor, RETRIES, folder, content, rows, threads)
                for rows in itertools.pairwise(cuts)
            ]
            self._actors[folder] = content, actors
        return self._actors[folder][1]


def _content(store: Datastore) -> str:
    """The rows of a datastore: its parts, and the generation that says what was removed."""
    return f"{store.manifest.generation} {store.manifest.content}"

"""Several datastores of one model, read as one: rows, documents and sources are numbered through, in the given order.

Nothing is copied but values and documents. The first one counts where only one can: its choice of a layer, its fitted
settings, its windows, its model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnlm.errors import DatastoreMismatch, InputError
from knnlm.files import short_names
from knnlm.store.datastore import Datastore, as_datastore
from knnlm.store.hub import hub_name
from knnlm.store.joined import LOADED_BYTES, joined
from knnlm.store.stored_text import StoredText


class JointStore(StoredText):
    """Several datastores, searched as one (`open_datastores`). Each source has its datastore's name before its own."""

    def __init__(self, stores: Sequence[Datastore], weights: Sequence[float] | None = None) -> None:
        """Raises as `open_datastores`."""
        self.stores = tuple(stores)
        self.weights = tuple(1.0 for _ in self.stores) if weights is None else tuple(map(float, weights))
        """What each one's neighbours count for: see `knnlm.knn.joint`."""
        _check_stores(self.stores)
        _check_weights(self.weights, self.stores)
        self.names = tuple(short_names([hub_name(one.folder) or one.folder.resolve().as_posix() for one in stores]))
        """The name of each: its folder's, with as much of the path as tells it from the others."""
        self.starts = np.cumsum([0, *(one.count for one in self.stores[:-1])]).tolist()
        """The first row of each."""

    def __repr__(self) -> str:
        return f"<JointStore of {', '.join(map(repr, self.stores))}>"

    @property
    def first(self) -> Datastore:
        """The first datastore."""
        return self.stores[0]

    @property
    def name(self) -> str:
        """All names in one."""
        return "+".join(self.names)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of which each one has keys."""
        return tuple(name for name in self.first.layers if all(name in one.layers for one in self.stores))

    @property
    def count(self) -> int:
        """N, the number of keys of all together."""
        return sum(one.count for one in self.stores)

    @property
    def loaded_bytes(self) -> int:
        """Memory that `values` takes."""
        return min(4 * self.count, LOADED_BYTES) + sum(one.loaded_bytes for one in self.stores)

    @cached_property
    def values(self) -> NDArray[np.int32]:
        """The next token of each key, int32 [N], read-only, in memory. Raises as `Datastore.values`."""
        values = joined([one.values for one in self.stores])
        values.flags.writeable = False
        return values

    @cached_property
    def documents(self) -> NDArray[np.int64]:
        """int64 [documents, 4], as `Datastore.documents`."""
        sources = np.cumsum([0, *(len(one.sources) for one in self.stores[:-1])]).tolist()
        return np.concatenate(
            [
                one.documents + np.array([row, 0, source, 0])
                for one, row, source in zip(self.stores, self.starts, sources, strict=True)
            ]
        )

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the texts, as STORE/SOURCE."""
        pairs = zip(self.names, self.stores, strict=True)
        return tuple(f"{name}/{source}" for name, one in pairs for source in one.sources)


AnyStore = Datastore | JointStore
"""One opened datastore, or several as one."""
OneStore = str | Path | Datastore
GivenStores = OneStore | JointStore | Sequence[OneStore]
"""What a caller may name: a datastore or its folder, or several."""


def open_datastores(stores: Sequence[OneStore], weights: Sequence[float] | None = None) -> JointStore:
    """Open several datastores of one model, to be searched as one.

    :param weights: what each one's neighbours count for, at least 0: the factor of exp(-distance / T) in p_kNN. 1 for
        all, the default, is one datastore with the keys of all; one of weight 0 is not searched.
    :raises InputError: a datastore is given twice, or the weights do not fit.
    :raises DatastoreMismatch: they are of different models or tokenizers, or have no layer in common.
    :raises DatastoreError: as `Datastore.open`.
    """
    return JointStore([as_datastore(one) for one in stores], weights)


def as_store(given: GivenStores, weights: Sequence[float] | None = None) -> AnyStore:
    """Return what is opened as it is, and open the rest; a single one stays a `Datastore`.

    :param weights: as for `open_datastores`, for several that are not opened as one.
    :raises InputError: weights are given for one datastore, or for what has its own; or as `open_datastores`.
    """
    if isinstance(given, str | Path | Datastore):
        given = (given,)
    if weights is not None and (isinstance(given, JointStore) or len(given) == 1):
        told = "an opened set has its own" if isinstance(given, JointStore) else f"only {given[0]} is given"
        raise InputError(f"`weights` are for several datastores, but {told}; leave them out, or name several")
    if isinstance(given, JointStore):
        return given
    return as_datastore(given[0]) if len(given) == 1 else open_datastores(given, weights)


def _check_weights(weights: Sequence[float], stores: Sequence[Datastore]) -> None:
    told = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != len(stores):
        raise InputError(f"`weights` are {told}, but there are {len(stores)} datastores; give one weight for each")
    if not all(weight >= 0 and math.isfinite(weight) for weight in weights) or not any(weights):
        raise InputError(f"`weights` are {told}, but must be finite, at least 0, and one of them above 0")


def _check_stores(stores: Sequence[Datastore]) -> None:
    """Refuse what cannot be searched together. Windows may differ: vectors of one layer are comparable."""
    if not stores:
        raise InputError("no datastore is given; name at least one")
    first, common = stores[0], set(stores[0].layers)
    places = [one.folder.resolve() for one in stores]
    for place, one in zip(places, stores, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{one.folder} is given twice; name each datastore once")
        one.check_model({**first.manifest.fingerprint, "model": first.model})
        common &= set(one.layers)
        if not common:
            raise DatastoreMismatch(
                f"no layer is in all datastores: {first.folder} has keys of {', '.join(first.layers)}, {one.folder} of "
                f"{', '.join(one.layers)}; build it again, with `frame={str(first.folder)!r}`"
            )

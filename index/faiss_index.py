"""FAISS: the kernel of exact distances, and FAISS's own indexes; their inverted lists are in `index.faiss_lists`.

FAISS proposes ids, which are row numbers; its distances are discarded (index/rerank.py computes exact ones).

Legend: N keys, Q queries, K neighbours, D dimension, P pairs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from index.errors import CorruptIndex, FaissFailed, NotTrained, UnknownSpec
from index.faiss_lists import Lists, ListStore
from index.manifest import EFFORTS
from index.mapped import Bytes
from index.metric import Metric
from index.typed import Misfit

# Names that SWIG makes at run time are not in FAISS's stubs.
_faiss: Any = faiss

VERSION: str = faiss.__version__

# FAISS's metric numbers; its inner product grows with nearness, our distance is its negative.
_METRICS = {Metric.L2: faiss.METRIC_L2, Metric.IP: faiss.METRIC_INNER_PRODUCT}
# A longer graph walk costs more than a scan.
_LONGEST_WALK = 1 << 15

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def thread_count() -> int:
    """Return the number of threads that FAISS uses when called from this one.

    It is torch's number if torch was imported first: both then share one OpenMP library.
    """
    return int(faiss.omp_get_max_threads())


def use_threads(count: int) -> None:
    """Make FAISS use so many threads when called from this one."""
    faiss.omp_set_num_threads(count)


def pair_distances(queries_QD: Floats, rows_P: Ids, keys_ND: Floats, keys_P: Ids, metric: Metric) -> Floats:
    """The distance of query rows_P[i] and key keys_P[i], float32 [P], by direct differences; on FAISS's threads.

    All arrays must be C-contiguous: the kernel takes bare pointers.
    """
    kernel = _faiss.pairwise_indexed_L2sqr if metric is Metric.L2 else _faiss.pairwise_indexed_inner_product
    distances_P = np.empty(len(rows_P), np.float32)
    pointers = [faiss.swig_ptr(array) for array in (queries_QD, rows_P, keys_ND, keys_P, distances_P)]
    kernel(queries_QD.shape[1], len(rows_P), *pointers)
    return distances_P if metric is Metric.L2 else np.negative(distances_P, out=distances_P)


@dataclass(frozen=True)
class Effort:
    """The FAISS parameter that sets how much of an index a search visits."""

    name: str
    """`nprobe` (lists of an inverted file) or `efSearch` (candidates of a graph walk)."""
    value: int
    limit: int
    """The largest useful value: beyond it a search finds nothing more, or costs as much as brute force."""


class FaissIndex:
    """A FAISS index whose errors are those of `index.errors`."""

    def __init__(self, native: Any) -> None:  # noqa: ANN401  (FAISS has no types)
        self._native = native
        self._lists = ListStore.of(native)
        self._size: int | None = None

    @property
    def dim(self) -> int:
        """D."""
        return int(self._native.d)

    @property
    def metric(self) -> Metric:
        """The metric that FAISS searches by."""
        return Metric.L2 if self._native.metric_type == faiss.METRIC_L2 else Metric.IP

    def __len__(self) -> int:
        return int(self._native.ntotal)

    @property
    def is_trained(self) -> bool:
        """Whether keys may be added."""
        return bool(self._native.is_trained)

    @property
    def kind(self) -> str:
        """The structure that FAISS built: nested classes, number of lists, bytes per code."""
        native, names = self._native, []
        while native is not None:
            native = faiss.downcast_index(native)
            names.append(re.sub("(L2|IP)$", "", type(native).__name__))  # a loaded file has the class of its metric
            inner, native = native, getattr(native, "index", None) or getattr(native, "base_index", None)
        size = f"{inner.sa_code_size()} bytes" if hasattr(inner, "code_size") else f"{inner.d} dimensions"
        return f"{' of '.join(names)} with {getattr(inner, 'nlist', 0)} lists and {size}"

    def train(self, keys_ND: Floats, seed: int) -> None:
        """Learn lists, codes and projections from a sample.

        :raises FaissFailed: in FAISS's words, such as too few points.
        """
        with _quantizers_of_rotations(self._native) as quantizers:
            for settings in (*_clusterings(self._native), *(one.cp for one in quantizers)):
                settings.seed = seed
                # FAISS would warn on standard error; the measured recall is more informative.
                settings.min_points_per_centroid = 1
            with _faiss_errors():
                self._native.train(keys_ND)

    @property
    def wants_lists(self) -> int:
        """Number of inverted lists whose means it may be given before training (`give_lists`); 0: FAISS finds them."""
        lists = _with_means(self._native)
        is_ready = all(step.is_trained for step in _projections(self._native))
        return int(lists.nlist) if lists is not None and is_ready and not lists.quantizer.ntotal else 0

    def give_lists(self, means_LD: Floats) -> None:
        """Set the means of the inverted lists, of `prepared` keys."""
        _with_means(self._native).quantizer.add(means_LD)

    @property
    def list_means(self) -> Floats | None:
        """Means of the inverted lists, [L, D], by which `add` may be told where keys belong.

        None where it may not, or where FAISS finds the nearest of many lists by a graph.
        """
        lists = None if self._lists is None else _with_means(self._native)
        if lists is None or isinstance(faiss.downcast_index(lists.quantizer), faiss.IndexHNSWFlat):
            return None
        means_LD: Floats = lists.quantizer.reconstruct_n(0, lists.nlist)
        return means_LD

    def prepared(self, keys_ND: Floats) -> Floats:
        """Keys as the inverted lists see them: projected or padded."""
        for step in _projections(self._native):
            keys_ND = step.apply(np.ascontiguousarray(keys_ND))
        return keys_ND

    def add(self, keys_ND: Floats, find_lists: Callable[[Floats], Ids] | None = None) -> None:
        """Append keys; their ids continue the count. All are found after `finish`.

        :param find_lists: returns the list of the nearest mean for each `prepared` key; None: FAISS looks for it.
        :raises NotTrained: the index has to be trained first.
        """
        if not self.is_trained:
            raise NotTrained("keys are added to an index that is not trained; train it on a sample first")
        self._size = None
        with _faiss_errors():
            if self._lists is not None:
                prepared_ND = self.prepared(keys_ND)
                self._lists.add(prepared_ND, (find_lists or self._nearest_lists)(prepared_ND))
                self._native.ntotal = self._lists.count
            elif isinstance(self._native, faiss.IndexIDMap):
                self._native.add_with_ids(keys_ND, np.arange(len(self), len(self) + len(keys_ND)))
            else:
                self._native.add(keys_ND)

    def _nearest_lists(self, prepared_ND: Floats) -> Ids:
        lists = faiss.extract_index_ivf(self._native)
        found_N = np.asarray(lists.quantizer.search(np.ascontiguousarray(prepared_ND), 1)[1][:, 0], np.int64)
        return np.maximum(found_N, 0)  # -1 where distances leave float32

    def keys_in(self, memory_bytes: int) -> int | None:
        """Keys that may be added until `end_run`, for them to take so much memory; None: all stay in memory."""
        return None if self._lists is None else max(1, memory_bytes // self._lists.key_bytes)

    def end_run(self, scratch: Path | None) -> None:
        """Write added keys to a temporary file without a name in a folder, where the kind of index allows it.

        :raises OSError: the disk is full.
        """
        if self._lists is not None:
            self._lists.end_run(scratch)

    def finish(self, scratch: Path | None) -> None:
        """Make added keys searchable. Raises as `end_run`."""
        if self._lists is not None:
            self._lists.finish(scratch)

    @property
    def lists(self) -> Bytes | None:
        """The file of inverted lists, mapped; None for a kind that FAISS keeps in memory."""
        return None if self._lists is None or self._lists.mapped is None else self._lists.mapped.data

    def use_lists(self, data: Bytes | None, path: Path) -> None:
        """Search the lists in a mapped file, as `lists` gave it; errors name `path`.

        :raises CorruptIndex: they are not those of this index.
        """
        if (data is None) != (self._lists is None):
            raise CorruptIndex(f"{path} is {'missing' if data is None else 'of another index'}; build the index again")
        if data is None or self._lists is None:
            return
        try:
            lists = Lists(data, self._lists.layout)
        except Misfit as error:
            raise CorruptIndex(f"{path} cannot be used: {error}; build the index again") from None
        if len(lists) != len(self):
            raise CorruptIndex(f"{path} has {len(lists)} keys, but {len(self)} are wanted; build the index again")
        self._lists.use(lists)

    def reset(self) -> None:
        """Remove all keys; what was learned stays."""
        self._size = None
        if self._lists is not None:
            self._lists.clear()
        self._native.reset()

    def propose(self, queries_QD: Floats, k: int) -> Ids:
        """Return ids of about the k nearest keys, nearest first; -1 where fewer are found."""
        return self.search(queries_QD, k)[1]

    def search(self, queries_QD: Floats, k: int) -> tuple[Floats, Ids]:
        """As `propose`, with FAISS's own distances: of codes, where the index keeps codes.

        :raises FaissFailed: keys were added since `finish`.
        """
        if self._lists is not None and not self._lists.is_whole:
            raise FaissFailed("keys were added that cannot be found yet; call finish first")
        with _faiss_errors():
            values_QK, ids_QK = self._native.search(queries_QD, k)
        return values_QK if self.metric is Metric.L2 else np.negative(values_QK), np.asarray(ids_QK, np.int64)

    @property
    def effort(self) -> Effort | None:
        """The search effort; None if a search always visits everything."""
        if (lists := faiss.try_extract_index_ivf(self._native)) is not None:
            return Effort("nprobe", int(lists.nprobe), int(lists.nlist))
        if (graph := _unwrapped(self._native, faiss.IndexHNSW)) is not None:
            return Effort("efSearch", int(graph.hnsw.efSearch), max(1, min(len(self), _LONGEST_WALK)))
        return None

    def set_effort(self, name: str, value: int) -> None:
        """Set the search effort, by ParameterSpace: an attribute set on PCA or OPQ does not reach the inverted file.

        :raises FaissFailed: the index has no such parameter.
        """
        if name not in EFFORTS:
            raise FaissFailed(f"the search parameter is {name!r}, but must be one of {', '.join(EFFORTS)}")
        with _faiss_errors():
            faiss.ParameterSpace().set_index_parameter(self._native, name, value)

    def write(self, write: Callable[[bytes], object]) -> None:
        """Pass the bytes of FAISS's file to `write` in pieces; its errors, such as a full disk, are raised unchanged.

        Inverted lists that are mapped are no part of it.
        """

        def written() -> None:
            with _faiss_errors():
                faiss.write_index(self._native, _faiss.PyCallbackIOWriter(write))

        written() if self._lists is None else self._lists.detached(written)

    @property
    def size_bytes(self) -> int:
        """Bytes of its files."""
        if self._size is None:
            sizes: list[int] = []
            self.write(lambda piece: sizes.append(len(piece)))
            self._size = sum(sizes)
        return self._size + (0 if self.lists is None else len(self.lists))


def create_index(text: str, dim: int, metric: Metric) -> FaissIndex:
    """Return an empty index from a FAISS factory string.

    :raises UnknownSpec: FAISS does not accept it for this dimension and metric.
    """
    try:
        native = faiss.index_factory(dim, text, _METRICS[metric])
    except (RuntimeError, TypeError) as error:
        raise UnknownSpec(
            f"index {text!r} for {dim} dimensions and metric {metric}: FAISS says: {_said(error)}; "
            "take auto, exact, or a factory string such as 'IVF1024,Flat'"
        ) from None
    if native.metric_type != _METRICS[metric]:
        raise UnknownSpec(f"index {text!r} does not search by metric {metric}; take another index or metric")
    if misfit := _misfit(native):
        raise UnknownSpec(
            f"index {text!r} for {dim} dimensions has {misfit}; take another size, or a factory string such as "
            "'IVF1024,Flat'"
        )
    if hasattr(coded := _with_lists_or_codes(native), "do_polysemous_training"):
        # It orders code words by Hamming distance, which no search here uses: 2 seconds a quantizer.
        coded.do_polysemous_training = False
    return FaissIndex(native)


def _misfit(native: Any) -> str:  # noqa: ANN401
    """An impossible projection, which FAISS detects only in training; empty if there is none."""
    for step in _projections(native):
        if isinstance(step, faiss.PCAMatrix | faiss.ITQTransform) and step.d_out > step.d_in:
            return f"a projection from {step.d_in} to {step.d_out}, but it can only make them fewer"
        if isinstance(step, faiss.OPQMatrix) and step.d_out % step.M:
            return f"an OPQ of {step.M} parts, which do not divide {step.d_out} dimensions"
    return ""


def read_index(data: NDArray[np.uint8], path: Path) -> FaissIndex:
    """Return an index from the bytes of its file; errors name `path`.

    :raises CorruptIndex: FAISS cannot read them.
    """
    place = 0

    def read(size: int) -> bytes:
        nonlocal place
        place += size
        return data[place - size : place].tobytes()

    try:
        return FaissIndex(faiss.read_index(_faiss.PyCallbackIOReader(read)))
    except (RuntimeError, MemoryError) as error:
        raise CorruptIndex(f"{path} is not a whole FAISS index: {_said(error)}; build it again") from None


def _projections(native: Any) -> Iterator[Any]:  # noqa: ANN401
    """The transformations applied to vectors before the index proper."""
    projected = _unwrapped(native, faiss.IndexPreTransform)
    for place in range(projected.chain.size() if projected else 0):
        yield faiss.downcast_VectorTransform(projected.chain.at(place))


def _unwrapped(native: Any, kind: type) -> Any:  # noqa: ANN401
    """The index of a kind under projections, id maps, refinement and graphs; None if there is none."""
    while native is not None:
        native = faiss.downcast_index(native)
        if isinstance(native, kind):
            return native
        native = next(filter(None, (getattr(native, name, None) for name in ("index", "base_index", "storage"))), None)
    return None


def _with_means(native: Any) -> Any:  # noqa: ANN401
    """The inverted file whose lists are those of the nearest mean, a plain vector; None if there is none."""
    lists = faiss.try_extract_index_ivf(native)
    if lists is None or not isinstance(faiss.downcast_index(lists.quantizer), faiss.IndexFlat | faiss.IndexHNSWFlat):
        return None
    return faiss.downcast_index(lists)


def _with_lists_or_codes(native: Any) -> Any:  # noqa: ANN401
    """The inverted file, or the index of product quantizer's codes; None if there is neither."""
    if (lists := faiss.try_extract_index_ivf(native)) is not None:
        return faiss.downcast_index(lists)
    return _unwrapped(native, faiss.IndexPQ) or _unwrapped(native, faiss.IndexPQFastScan)


def _clusterings(native: Any) -> Iterator[Any]:  # noqa: ANN401
    """The k-means settings of an inverted file and of product quantizers."""
    trained = _with_lists_or_codes(native)
    if hasattr(trained, "cp"):
        yield trained.cp
    if hasattr(trained, "pq"):
        yield trained.pq.cp


@contextmanager
def _quantizers_of_rotations(native: Any) -> Iterator[list[Any]]:  # noqa: ANN401
    """The quantizers that OPQ trains its rotation with; those that FAISS itself would make cannot be seeded."""
    rotations = [step for step in _projections(native) if isinstance(step, faiss.OPQMatrix)]
    quantizers = [faiss.ProductQuantizer(step.d_out, step.M, 8) for step in rotations]
    for step, quantizer in zip(rotations, quantizers, strict=True):
        step.pq = quantizer
    try:
        yield quantizers
    finally:
        for step in rotations:
            step.pq = None


@contextmanager
def _faiss_errors() -> Iterator[None]:
    """Turn FAISS's RuntimeError and MemoryError into FaissFailed; a writer's OSError and Ctrl-C pass through."""
    try:
        yield
    except RuntimeError as error:
        raise FaissFailed(f"FAISS says: {_said(error)}") from None
    except MemoryError:
        raise FaissFailed("FAISS has not enough memory for this index; take one with smaller codes, or exact") from None


def _said(error: BaseException) -> str:
    """FAISS's message without the C++ function, file and line before it."""
    text = " ".join(str(error).split())
    text = re.sub(r"^Error in .*? at \S+:\d+: ", "", text)
    sentence = re.sub(r"^Error: '.*?' failed: ?", "", text)
    return sentence or text

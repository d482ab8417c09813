"""Sources of keys: anything that gives rows in float32, which need not fit into memory.

Legend: N keys, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from index.errors import DimensionMismatch, InvalidKeys
from index.metric import Metric

# Float32 bytes of the keys that are in memory at a time.
BLOCK_BYTES = 128 << 20
# Rows whose mean is the centre: its error, a fortieth of a standard deviation, does not matter for centring.
CENTRE_ROWS = 2048

Floats = NDArray[np.float32]


class VectorSource(Protocol):
    """N keys of D dimensions. Several threads may read at once."""

    @property
    def dim(self) -> int:
        """D."""

    def __len__(self) -> int:
        """N."""

    def read(self, start: int, stop: int) -> Floats:
        """Rows start to stop, float32 [stop - start, D], C-contiguous. May be a view: the reader must not write."""

    def take(self, ids_N: NDArray[np.int64]) -> Floats:
        """The rows of any ids in 0..N-1, in the order of the ids, float32 [n, D]."""


class ArraySource:
    """The rows of an array or memory map of any float type, times an optional scale."""

    def __init__(self, array_ND: NDArray[Any], scale: float = 1.0) -> None:
        """:raises DimensionMismatch: not two axes. :raises InvalidKeys: not floats, or no dimension."""
        if array_ND.ndim != 2:
            raise DimensionMismatch(f"keys have the shape {array_ND.shape}, but must be [keys, dimension]")
        if not np.issubdtype(array_ND.dtype, np.floating) or not array_ND.shape[1]:
            raise InvalidKeys(
                f"keys are {array_ND.dtype} of {array_ND.shape[1]} dimensions, but must be floats of some"
            )
        self._array_ND, self._scale = array_ND, np.float32(scale)

    @property
    def dim(self) -> int:
        """D."""
        return int(self._array_ND.shape[1])

    def __len__(self) -> int:
        return len(self._array_ND)

    def read(self, start: int, stop: int) -> Floats:
        """Rows start to stop, float32, C-contiguous."""
        return self._scaled(self._array_ND[start:stop])

    def take(self, ids_N: NDArray[np.int64]) -> Floats:
        """The rows of any ids, in the order of the ids."""
        return self._scaled(np.take(self._array_ND, ids_N, axis=0))

    def _scaled(self, rows_ND: NDArray[Any]) -> Floats:
        floats_ND = np.ascontiguousarray(rows_ND, np.float32)
        return floats_ND if self._scale == 1 else floats_ND * self._scale


def rows_in(size_bytes: int, dim: int) -> int:
    """Return the number of float32 rows that fit into `size_bytes`, at least 1."""
    return max(1, size_bytes // (4 * dim))


def blocks(source: VectorSource, rows: int) -> Iterator[tuple[int, Floats]]:
    """Yield (number of the first row, rows) over the whole source."""
    for start in range(0, len(source), rows):
        yield start, source.read(start, min(start + rows, len(source)))


def spread_ids(count: int, rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return `rows` random ids below `count`, ascending, one from each of equal stretches; takes O(rows) memory.

    :param rows: at most `count`.
    """
    edges = np.arange(rows + 1, dtype=np.int64) * count // max(1, rows)
    return rng.integers(edges[:-1], edges[1:])


def centre_of(source: VectorSource) -> Floats:
    """Return the mean of evenly spread keys, float32 [D]: subtracted before FAISS computes |q|² + |k|² - 2<q,k>.

    That form, which FAISS 1.15 uses if Q D is 128,000 or more, loses all precision if two nearly constant dimensions
    make |k|² near 1e7: errors up to 35 on squared distances of ordinary size were measured. Subtracting a vector from
    keys and queries does not change squared L2; from keys alone, not the order of inner products.
    :raises InvalidKeys: NaN or infinity among these keys.
    """
    count = len(source)
    ids = np.arange(min(count, CENTRE_ROWS), dtype=np.int64) * count // max(1, min(count, CENTRE_ROWS))
    mean_D = source.take(ids).mean(axis=0, dtype=np.float64) if count else np.zeros(source.dim)
    if not np.isfinite(mean_D).all():
        raise InvalidKeys(
            f"keys hold NaN or infinity in dimension {int(np.argmin(np.isfinite(mean_D)))}; mend them first"
        )
    return mean_D.astype(np.float32)


def centred_queries(queries_QD: Floats, centre_D: Floats, metric: Metric) -> Floats:
    """Return queries with the same neighbours among centred keys as these have among the keys."""
    # <q, k - c> = <q, k> - <q, c>: one number for all keys of a query. <q - c, k - c> would be another order.
    return queries_QD - centre_D if metric is Metric.L2 else queries_QD

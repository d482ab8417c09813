"""Results of a search, the nearest keys of each query, and functions that sort, merge and cut them.

Legend: Q queries, K neighbours, C candidates, N keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.errors import DimensionMismatch

Distances = NDArray[np.float32]
Ids = NDArray[np.int64]

# Values ranked in one call: they and their order stay in cache.
RANKED = 1 << 16


@dataclass(frozen=True)
class Neighbors:
    """The K nearest keys of each of Q queries, nearest first; absent ones last."""

    distances_QK: Distances
    """Ascending; +inf where there is no neighbour. Squared L2, or minus the inner product."""
    ids_QK: Ids
    """Row numbers of the keys; -1 where there is no neighbour."""

    def __post_init__(self) -> None:
        if self.ids_QK.ndim != 2 or self.distances_QK.shape != self.ids_QK.shape:
            raise DimensionMismatch(
                f"distances {self.distances_QK.shape} and ids {self.ids_QK.shape} must both be [queries, neighbours]"
            )

    def without(self, ids_Q: Ids, k: int) -> Neighbors:
        """Return the k nearest without one id per query, such as a stored key's own."""
        own_QK = self.ids_QK == ids_Q[:, None]
        return ordered(np.where(own_QK, np.float32(np.inf), self.distances_QK), np.where(own_QK, -1, self.ids_QK), k)


def merge(parts: Sequence[Neighbors], k: int) -> Neighbors:
    """Return the k nearest among results for the same queries, such as those of shards; ids must be global."""
    distances_QC = np.concatenate([part.distances_QK for part in parts], axis=1)
    return ordered(distances_QC, np.concatenate([part.ids_QK for part in parts], axis=1), k)


def stack(parts: Sequence[Neighbors]) -> Neighbors:
    """Concatenate results for different queries."""
    if len(parts) == 1:
        return parts[0]
    return Neighbors(np.concatenate([p.distances_QK for p in parts]), np.concatenate([p.ids_QK for p in parts]))


def absent(queries: int, k: int) -> Neighbors:
    """Return results without neighbours."""
    return Neighbors(np.full((queries, k), np.inf, np.float32), np.full((queries, k), -1, np.int64))


def nearest(distances_QC: Distances, ids_QC: Ids, k: int) -> tuple[Distances, Ids]:
    """Return the k nearest candidates, unordered; all of them if there are at most k."""
    if ids_QC.shape[1] <= k:
        return distances_QC, ids_QC
    columns_QK, near_QK = least(distances_QC, k)
    return near_QK, np.take_along_axis(ids_QC, columns_QK, axis=1)


def least(values_QN: Distances, k: int) -> tuple[Ids, Distances]:
    """Return columns and values of the k <= N least of each row, unordered; NaN counts as the largest."""
    if k == 1:
        columns_Q1 = values_QN.argmin(axis=1, keepdims=True)
        if np.isfinite(least_Q1 := np.take_along_axis(values_QN, columns_Q1, axis=1)).all():
            return columns_Q1, least_Q1  # NumPy takes NaN for the least
    columns_QK = np.empty((len(values_QN), k), np.int64)
    rows = max(1, RANKED // values_QN.shape[1])
    for start in range(0, len(values_QN) if k < values_QN.shape[1] else 0, rows):
        part = slice(start, start + rows)
        columns_QK[part] = np.argpartition(values_QN[part], k - 1, axis=1)[:, :k]
    if k == values_QN.shape[1]:
        columns_QK[:] = np.arange(k)
    return columns_QK, np.take_along_axis(values_QN, columns_QK, axis=1)


def ordered(distances_QC: Distances, ids_QC: Ids, k: int) -> Neighbors:
    """Return the k nearest candidates, nearest first, padded with absent ones. NaN distances count as absent."""
    lost_QC = ~np.isfinite(distances_QC) | (ids_QC < 0)
    columns_QK, sorted_QK = _sorted_rows(np.where(lost_QC, np.float32(np.inf), distances_QC), k)
    found = absent(len(ids_QC), k)
    width = columns_QK.shape[1]
    found.distances_QK[:, :width] = sorted_QK
    found.ids_QK[:, :width] = np.where(np.isinf(sorted_QK), -1, np.take_along_axis(ids_QC, columns_QK, axis=1))
    return found


def _sorted_rows(distances_QC: Distances, k: int) -> tuple[Ids, Distances]:
    """Columns and distances of the k smallest of each row, ascending; equal ones in the order of columns.

    Each distance and its column are packed into one 64-bit integer: NumPy sorts these four times as fast as it
    argsorts.
    """
    bits_QC = np.ascontiguousarray(distances_QC, np.float32).view(np.int32)
    packed_QC = _in_order(bits_QC).astype(np.int64) << 32
    packed_QC |= np.arange(distances_QC.shape[1])
    packed_QC.sort(axis=1)
    packed_QK = packed_QC[:, :k]
    return packed_QK & 0xFFFFFFFF, _in_order((packed_QK >> 32).astype(np.int32)).view(np.float32)


def _in_order(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """Map float32 bits to integers of the same order, and back: bits of negative numbers are in reverse order."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)

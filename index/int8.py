"""Products of 8-bit integers, which CPUs compute two to eight times as fast as float32. In torch, as `index.scan`.

Legend: N keys, Q queries, D dimension, M coordinates, G keys of a group, P pairs of a query and a key.
"""

# ruff: noqa: TID251 - only torch offers such a product in Python on every CPU
from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

# The largest numbers. oneDNN, below torch, takes the first operand plus 128 and without VNNI adds products in pairs in
# 16 bits, which saturate above 2 x 255 x 64 (its page "Nuances of int8 computations").
MOST_OF_QUERY, MOST_OF_KEY = 127, 63
# Floors stay within ±LIMIT, or are ALWAYS, so that no difference leaves 32 bits: a product is below 2**13 M.
LIMIT, ALWAYS = 1 << 28, -(1 << 30)
# Queries in one product: its table and that of some thousand keys stay in cache.
QUERY_TILE = 512
# Keys whose maximum score is tested before their own scores.
GROUP = 8


class Codes(NamedTuple):
    """Vectors as integers with floors: a product must reach the sum of its query's floor and its key's floor."""

    numbers_NM: NDArray[np.int8]
    floors_N: NDArray[np.int32]


def floors(values_N: NDArray[np.float64]) -> NDArray[np.int32]:
    """Return the values rounded down and clipped to LIMIT; ALWAYS for NaN and for values of -LIMIT or less."""
    with np.errstate(invalid="ignore"):
        held_N = np.where(values_N > -LIMIT, np.minimum(np.floor(values_N), LIMIT), ALWAYS)
    return held_N.astype(np.int32)


class Split(NamedTuple):
    """Vectors v with coordinates v' rounded to v^: v^ in steps, int8 [N, M], and squared lengths, [N]."""

    numbers_NM: NDArray[np.int8]
    rounded_N: NDArray[np.float32]
    """|v^|²."""
    error_N: NDArray[np.float32]
    """|v' - v^|²."""
    lead_N: NDArray[np.float32]
    """|v'|²."""
    whole_N: NDArray[np.float32]
    """|v|²."""


def split(rows_ND: Floats, rotation_DM: Floats, step: float, most: int) -> Split:
    """Return coordinates in the columns of R, rounded to steps and clipped to `most` steps either way.

    Entirely in torch: after a NumPy product, its threads busy-wait and halve the speed of torch's next one.
    """
    import torch

    rows = torch.from_numpy(rows_ND if rows_ND.flags.writeable else rows_ND.copy())  # torch warns of read-only arrays
    lead = rows @ torch.from_numpy(rotation_DM)
    steps = (lead / step).round_().clamp_(-most, most)
    numbers, rounded = steps.to(torch.int8), steps.mul_(step)
    squares = [part.square().sum(dim=1) for part in (rounded, lead - rounded, lead, rows)]
    return Split(*(part.numpy() for part in (numbers, *squares)))


class Matches:
    """Finds the pairs of fixed queries and blocks of keys whose product reaches their floors, which may be changed."""

    def __init__(self, queries: Codes, most_keys: int) -> None:
        """:param most_keys: largest number of keys in a call of `pairs`."""
        import torch

        self._queries = queries
        # Allocated once: allocating memory for each product costs more than the product.
        size = min(QUERY_TILE, len(queries.floors_N)) * (most_keys + GROUP)
        self._scores, self._highest = torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=torch.int32)

    def pairs(self, keys: Codes) -> tuple[Ids, Ids]:
        """Return the query's row, ascending, and the key's row of each pair, int64 [P]."""
        import torch

        count, padding = len(keys.floors_N), -len(keys.floors_N) % GROUP
        numbers_MN = torch.from_numpy(np.pad(keys.numbers_NM, ((0, padding), (0, 0)))).T
        floors_N = torch.from_numpy(np.pad(keys.floors_N, (0, padding)))
        starts = range(0, len(self._queries.floors_N), QUERY_TILE)
        found = [self._of_tile(start, numbers_MN, floors_N) for start in starts]
        rows_P, keys_P = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return rows_P[keys_P < count], keys_P[keys_P < count]

    def _of_tile(self, start: int, keys_MN: Tensor, floors_N: Tensor) -> tuple[Ids, Ids]:
        import torch

        numbers_QM, least_Q = (torch.from_numpy(part[start : start + QUERY_TILE]) for part in self._queries)
        shape = len(least_Q), len(floors_N)
        scores_QN = torch._int_mm(numbers_QM, keys_MN, out=self._scores[: math.prod(shape)].view(shape))
        scores_QGN = scores_QN.sub_(floors_N).view(len(least_Q), GROUP, -1)
        # About one key in a hundred passes: testing maxima of groups takes a quarter of the time of testing each.
        highest_QN = self._highest[: scores_QN.numel() // GROUP].view(len(least_Q), -1)
        torch.amax(scores_QGN, dim=1, out=highest_QN)
        rows_P, keys_P = _reached(scores_QN.numpy(), highest_QN.numpy(), least_Q.numpy())
        return rows_P + start, keys_P


def _reached(
    scores_QN: NDArray[np.int32], highest_QN: NDArray[np.int32], least_Q: NDArray[np.int32]
) -> tuple[Ids, Ids]:
    """Rows and columns of the scores that reach their row's least; only groups whose maximum does are searched."""
    groups = highest_QN.shape[1]
    rows_P, groups_P = np.divmod(np.flatnonzero(highest_QN >= least_Q[:, None]), groups)
    keys_PG = groups_P[:, None] + np.arange(GROUP) * groups
    scores_PG = scores_QN.reshape(-1)[rows_P[:, None] * scores_QN.shape[1] + keys_PG]
    found = np.flatnonzero(scores_PG >= least_Q[rows_P, None])
    return rows_P[found // GROUP], keys_PG.reshape(-1)[found]


@cache
def is_fast() -> bool:
    """Return whether this CPU multiplies 8-bit integers at least 1.5 times as fast as float32, measured in some ms."""
    import torch

    ones = torch.ones(256, 512)
    return hasattr(torch, "_int_mm") and 1.5 * _seconds(torch._int_mm, ones.to(torch.int8)) < _seconds(torch.mm, ones)


def _seconds(product: Callable[[Tensor, Tensor], Tensor], matrix: Tensor) -> float:
    """Shortest time of a matrix's product with its transpose."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(matrix, matrix.T)
        seconds.append(time.perf_counter() - start)
    return min(seconds)

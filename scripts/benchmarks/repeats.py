"""Any number of keys from fewer real ones, by repetition with noise.

Legend: N keys, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS = 1 << 16


def repeated(keys_ND: NDArray[Any], count: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(number of the first row, rows): the keys, and beyond their number these again, each time with new noise.

    The noise has a tenth of every dimension's deviation, so that the spectrum stays that of the keys.
    """
    deviation_D, rng = keys_ND[:ROWS].astype(np.float32).std(axis=0) / 10, np.random.default_rng(0)
    for start in range(0, count, ROWS):
        numbers = np.arange(start, min(count, start + ROWS))
        rows_ND = keys_ND[numbers % len(keys_ND)].astype(np.float32)
        again_ND = rows_ND[max(0, len(keys_ND) - start) :]  # a view
        again_ND += rng.standard_normal(again_ND.shape, np.float32) * deviation_D
        yield start, rows_ND

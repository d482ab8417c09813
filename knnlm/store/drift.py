"""How far the keys that came later are from those that a datastore's frame was made with.

The centre, the choice of the layer, the index and the fitted settings are of the first; figures are from the rows of
both, or from evenly spaced ones where there are many.

Legend: N rows, M rows that are read, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knnlm.store.keys import Keys
from knnlm.store.manifest import Manifest

# Rows read of each kind: a shift of 0.03 is then chance for keys that are drawn one by one.
MOST_ROWS = 2048


@dataclass(frozen=True)
class KeyDrift:
    """Of one layer; both are measured from the mean of the keys that the frame was made with."""

    keys: int
    """Keys that came later."""
    shift: float
    """Distance of the mean of the later keys, in units of the root of the first ones' mean squared distance."""
    spread: float
    """Mean squared distance of the later keys, over that of the first: 1 where nothing has changed."""


def key_drift(keys: Keys, built: int) -> KeyDrift | None:
    """Compare the rows from `built` on with those before; None where there are none of either, or these are all equal.

    Reads at most `MOST_ROWS` rows of each.
    """
    later = len(keys) - built
    if not (built and later):
        return None
    first_MD = keys.take(_spaced(0, built)).astype(np.float64)
    mean_D = first_MD.mean(0)
    later_MD = keys.take(_spaced(built, len(keys))).astype(np.float64) - mean_D
    unit = _mean_square(first_MD - mean_D)
    if not unit:
        return None
    return KeyDrift(later, float(np.sqrt(np.square(later_MD.mean(0)).sum() / unit)), _mean_square(later_MD) / unit)


def stale_lines(manifest: Manifest, lacking: Mapping[str, int], drift: Mapping[str, KeyDrift | None]) -> Iterator[str]:
    """What was measured or chosen on other documents than those of today, and what renews it, line by line.

    :param lacking: keys that a layer's index lacks.
    """
    if manifest.corpus:
        return
    if manifest.scores is not None:
        yield "Stale: the scores and the choice are of the documents before; `knnlm.build` makes new ones."
    if manifest.fitted:
        yield "Stale: k, λ and T were fitted to the documents before; `knnlm.evaluate` fits them again."
    for layer, keys in lacking.items():
        yield f"The index of {layer} lacks {keys:,} keys, which are compared exactly; `knnlm.compact` adds them."
    if not manifest.built_keys:
        yield "No key is left of those that centres and scales are from; `knnlm.build` makes new ones."
    found = {layer: one for layer, one in drift.items() if one is not None}
    for layer in sorted(found, key=lambda layer: -found[layer].shift)[:1]:
        one = found[layer]
        told = f"shift {one.shift:.2f}, spread {one.spread:.2f}"
        yield f"Drift of the {one.keys:,} later keys of {layer}: {told}; `knnlm.build` makes centres and scales of all."


def _spaced(start: int, stop: int) -> NDArray[np.int64]:
    """All rows from start to stop, or so many at equal distances."""
    count = min(stop - start, MOST_ROWS)
    return start + np.arange(count, dtype=np.int64) * (stop - start) // count


def _mean_square(rows_MD: NDArray[np.float64]) -> float:
    return float(np.square(rows_MD).sum(1).mean())

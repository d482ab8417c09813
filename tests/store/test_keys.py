"""Keys in many arrays are read as if they were in one."""

from __future__ import annotations

import numpy as np
import pytest

from knnlm.store.keys import TAKE_ROWS, Keys
from knnlm.store.live import LiveRows


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("sizes", [[700, 1, 1300], [0, 2000, 0, 1], [31] * 64, [5000]])
def test_rows_of_any_array(kind, sizes, tmp_path):
    rng, shards = np.random.default_rng(0), []
    for number, size in enumerate(sizes):
        np.save(tmp_path / f"{number}.npy", rng.standard_normal((size, 5)).astype(kind))
        path = tmp_path / f"{number}.npy"
        shards.append(np.load(path, mmap_mode="r") if size and number % 2 else np.load(path))
    whole_ND, keys = np.concatenate(shards).astype(np.float32), Keys(shards, np.zeros(5, np.float32))
    for ids in (rng.integers(0, len(keys), 3 * TAKE_ROWS // 2), np.arange(len(keys)), np.array([len(keys) - 1, 0, 0])):
        np.testing.assert_array_equal(keys.take(ids), whole_ND[ids])
    runs = np.array([[3, 9], [20, len(keys) - 2]])
    kept = Keys(shards, np.zeros(5, np.float32), live=LiveRows(runs))
    expected_ND = np.concatenate([whole_ND[first:last] for first, last in runs])
    ids = rng.integers(0, len(kept), 500)
    np.testing.assert_array_equal(kept.take(ids), expected_ND[ids])

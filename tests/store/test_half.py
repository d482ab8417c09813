"""float16 to and from float32, against NumPy's own conversion of every number there is."""

from __future__ import annotations

import numpy as np
import pytest

from knnlm.store.half import FLOAT16_MAX, to_float16, to_float32

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


@pytest.mark.parametrize("chosen", [np.isfinite(EVERY), np.isfinite(EVERY) | np.isinf(EVERY), np.full(1 << 16, True)])
def test_every_float16_is_the_same_number_in_float32(chosen):
    halves = EVERY[chosen]
    found = np.empty(len(halves), np.float32)
    to_float32(halves, found)
    np.testing.assert_array_equal(found, halves.astype(np.float32))
    assert (np.signbit(found) == np.signbit(halves))[~np.isnan(found)].all()


def test_no_numbers_are_no_numbers():
    to_float32(np.empty((0, 3), np.float16), np.empty((0, 3), np.float32))
    assert to_float16(np.empty((0, 3), np.float32)).shape == (0, 3)


def test_float32_is_rounded_as_numpy_rounds():
    numbers = np.random.default_rng(0).normal(size=(400, 33)).astype(np.float32)
    numbers *= np.float32(10.0) ** np.random.default_rng(1).integers(-9, 5, size=(400, 1))
    finite = np.sort(EVERY[np.isfinite(EVERY)].astype(np.float32))
    ties = (finite[:-1] + finite[1:]) / 2  # halfway between neighbours
    for one in (numbers, ties):
        inside = np.clip(one, -FLOAT16_MAX, FLOAT16_MAX)
        np.testing.assert_array_equal(to_float16(inside), inside.astype(np.float16))

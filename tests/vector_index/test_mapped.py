"""Mapped files: pages that are let go come back with the same bytes."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from index.mapped import OpenFolder, release

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def file_bytes_in_memory() -> int:
    """Bytes of files that are mapped and loaded in this process."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE


@linux
def test_released_pages_leave_memory_and_come_back(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 256, 16 << 20, np.uint8)
    (tmp_path / "numbers").write_bytes(numbers.tobytes())
    with OpenFolder(tmp_path) as folder:
        mapped = folder.map("numbers").data
    rows = mapped.view(np.float16).reshape(-1, 64)
    rows.view(np.int16).sum()  # loads every page
    loaded = file_bytes_in_memory()
    release(rows)
    assert loaded - file_bytes_in_memory() > 15 << 20
    np.testing.assert_array_equal(mapped, numbers)


@pytest.mark.parametrize("cut", [slice(None), slice(3, -3)])
def test_arrays_in_ordinary_memory_are_left_alone(cut):
    # To the system their pages would be dropped for good, and read as zeros.
    numbers = np.arange(1 << 20)
    for array in (numbers[cut], np.frombuffer(memoryview(bytearray(numbers.tobytes())), np.int64)[cut]):
        release(array)
        np.testing.assert_array_equal(array, np.arange(1 << 20)[cut])


def test_less_than_a_page_and_nothing(tmp_path):
    (tmp_path / "small").write_bytes(b"abc")
    (tmp_path / "empty").write_bytes(b"")
    with OpenFolder(tmp_path) as folder:
        for name, text in (("small", b"abc"), ("empty", b"")):
            mapped = folder.map(name).data
            release(mapped)
            assert mapped.tobytes() == text

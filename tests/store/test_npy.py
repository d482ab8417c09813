"""Files of arrays that are counted, and refused when they do not fit."""

from __future__ import annotations

from hashlib import sha256

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from knnlm.errors import DatastoreCorrupt
from knnlm.store.npy import NpyWriter, npy_header, open_npy


@hypothesis.given(
    sizes=st.lists(st.integers(0, 40), max_size=6),
    columns=st.sampled_from([None, 1, 3, 17]),
    dtype=st.sampled_from(["int32", "int64", "float16", "float32"]),
)
def test_npy_file_is_what_numpy_reads(tmp_path_factory, sizes, columns, dtype):
    path = tmp_path_factory.mktemp("npy") / "a.npy"
    rng = np.random.default_rng(sum(sizes))
    row_shape = () if columns is None else (columns,)
    parts = [rng.integers(-99, 99, (size, *row_shape)).astype(dtype) for size in sizes]
    with NpyWriter(path, dtype, columns) as file:
        for part in parts:
            file.append(part)
    expected = np.concatenate([np.empty((0, *row_shape), dtype), *parts])
    found = np.load(path, allow_pickle=False)
    assert found.dtype == expected.dtype and np.array_equal(found, expected) and found.shape == expected.shape
    assert file.rows == len(expected) and file.sha256 == sha256(expected.tobytes()).hexdigest()
    assert np.array_equal(open_npy(path, dtype, expected.shape), expected)


def test_header_keeps_its_length_however_many_rows_come(tmp_path):
    with NpyWriter(tmp_path / "a.npy", np.int32) as file:
        file.append(np.arange(3, dtype=np.int32))
        file.rows = 10**18
    assert (tmp_path / "a.npy").read_bytes()[-12:] == np.arange(3, dtype=np.int32).tobytes()


def test_rows_that_are_not_contiguous_are_written_in_order(tmp_path):
    rows = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    with NpyWriter(tmp_path / "a.npy", np.float32, 3) as file:
        file.append(rows)
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows)


@pytest.mark.parametrize("rows", [np.zeros((2, 3), "f4"), np.zeros((2, 2), "f8"), np.zeros(2, "f4"), np.float32(1)])
def test_rows_of_another_shape_or_type_are_refused(tmp_path, rows):
    with NpyWriter(tmp_path / "a.npy", np.float32, 2) as file, pytest.raises(ValueError, match="takes rows"):
        file.append(np.asarray(rows))


def test_a_file_that_was_not_closed_does_not_pass_for_a_whole_one(tmp_path):
    with pytest.raises(KeyboardInterrupt), NpyWriter(tmp_path / "a.npy", np.int32) as file:
        file.append(np.arange(5, dtype=np.int32))
        raise KeyboardInterrupt
    for rows in (0, 5):
        with pytest.raises(DatastoreCorrupt, match=r"a\.npy"):
            open_npy(tmp_path / "a.npy", np.int32, (rows,))


def test_partial_writes_are_continued(tmp_path):
    file = NpyWriter(tmp_path / "a.npy", np.int32)
    real = file._file

    class Slow:
        def write(self, data):
            return real.write(data[:7])

    file._file = Slow()
    file.append(np.arange(100, dtype=np.int32))
    file._file = real
    file.close()
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.arange(100))


@pytest.mark.parametrize("dtype", ["<i4", "<i8", "<f2", "<f4"])
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5), (123_456, 0)])
def test_header_is_numpys_to_the_byte(tmp_path, dtype, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, dtype))
    assert (tmp_path / "a.npy").read_bytes().startswith(npy_header(np.dtype(dtype), shape))


def test_every_flipped_bit_of_a_header_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(6, dtype=np.int32))
    data = path.read_bytes()
    for bit in range(8 * (len(data) - 24)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DatastoreCorrupt, match=r"a\.npy") as caught:
            open_npy(path, np.int32, (6,))
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "bytes, but its rows need"),
        (lambda data: data + b"x", "bytes, but its rows need"),
        (lambda data: data[:20], "cannot be read"),
        (lambda data: b"", "cannot be read"),
        (lambda data: b"PK" + data[2:], "cannot be read"),
        (lambda data: data.replace(b"<i4", b"<f4"), "holds float32"),
        (lambda data: data.replace(b"(6,)", b"(5,)"), "holds int32 .5,., but the manifest says int32 .6,."),
        (lambda data: data.replace(b"{'descr'", b"['descr'"), "cannot be read"),
        (lambda data: data.replace(b"'<i4'", b"'|O' "), "holds object"),
    ],
)
def test_damaged_npy_file_is_refused_by_name(tmp_path, damage, message):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(6, dtype=np.int32))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatastoreCorrupt, match=message) as caught:
        open_npy(path, np.int32, (6,))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_npy_file_is_named(tmp_path):
    with pytest.raises(DatastoreCorrupt, match=r"gone\.npy is missing"):
        open_npy(tmp_path / "gone.npy", np.int32, (6,))

"""A datastore on disk: what was written comes back, and what was changed is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from index.mapped import OpenFolder
from knnlm.documents import score_document
from knnlm.errors import (
    DatastoreCorrupt,
    DatastoreError,
    DatastoreMismatch,
    InputError,
    ModelError,
)
from knnlm.files import new_folder, write_json
from knnlm.store import writer as datastore_writer
from knnlm.store.datastore import Datastore, open_datastore
from knnlm.store.manifest import from_json
from knnlm.store.npy import NpyWriter
from knnlm.store.writer import DatastoreWriter
from tests.damage import TEXTS, damaged_documents, flip_bit, rewrite
from tests.sample_results import sample_scores

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"model": "tiny", "config": "c" * 64, "weights": "a" * 64, "tokenizer": "f" * 64}
FRAME = {"fingerprint": MODEL, "context": 8, "stride": 4}
LAYERS = {"0.ffn_input": 3, "final_norm": 5}
FITTED = {"k": 8, "lambda": 0.25, "temperature": 2.0, "gate": None}
ENTRY = {"metric": "cosine", "spec": "exact", "recall": 1.0, "k": 8}
SCORES = score_document(sample_scores(1))
# Three documents of 4, 0 and 6 values: 10 rows.
DOCUMENTS = ((70, "a.txt", 1, (1, 2, 3, 4)), (80, "b.txt", 7, ()), (90, "a.txt", 2, (5, 6, 7, 8, 9, 10)))


def vectors(rows, dim, *, seed=0, mean=0.0, size=1.0):
    return (np.random.default_rng(seed).normal(mean, size, (rows, dim))).astype(np.float32)


def write_values(writer):
    for first, source, number, tokens in DOCUMENTS:
        writer.begin_document(first, source, number)
        writer.append_values(np.array(tokens, np.int32))


def write_documents(writer, documents, rows, chunk):
    """Values and keys together, in pieces, as a model gives them."""
    done = 0
    for first, source, number, tokens in documents:
        writer.begin_document(first, source, number)
        for start in range(0, len(tokens), chunk):
            piece = np.array(tokens[start : start + chunk], np.int32)
            writer.append_values(piece)
            for name, one in rows.items():
                writer.append_keys(name, one[done : done + len(piece)])
            done += len(piece)


def write_store(folder, *, layers=LAYERS, part_rows=3, chunk=3, make=vectors, documents=DOCUMENTS, **options):
    folder.mkdir(exist_ok=True)
    with DatastoreWriter(folder, layers, part_rows=part_rows, **FRAME, **options) as writer:
        write_documents(writer, documents, {name: make(10, dim) for name, dim in layers.items()}, chunk)
        writer.finish(corpus="corpus", scores=SCORES, versions={"torch": "2"})
    return Datastore.open(folder)


def part(store, number, name):
    """The path of a file of a part."""
    return store.folder / "parts" / store.manifest.parts[number].name / name


def described(store):
    """Every file but the manifest, by kind."""
    return {
        "documents": part(store, 0, "documents.npy"),
        "values": part(store, 1, "values.npy"),
        "centre": store.folder / "frame" / "final_norm.npy",
        "keys": part(store, 0, "keys/final_norm.npy"),
        "other keys": part(store, 1, "keys/0.ffn_input.npy"),
    }


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store.knn")


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


# What was written comes back


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum),
    dims=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    part_rows=st.integers(1, 12),
    chunk=st.integers(1, 11),
    dtype=st.sampled_from(["float16", "float32"]),
    exponent=st.integers(-3, 5),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path_factory, lengths, dims, part_rows, chunk, dtype, exponent, seed):
    folder, count = tmp_path_factory.mktemp("store"), sum(lengths)
    tokens = np.random.default_rng(seed).integers(0, 2**31, count).astype(np.int32)
    size = 10.0**exponent
    rows = {
        f"{place}.ffn_input": vectors(count, dim, seed=seed, mean=size, size=size) for place, dim in enumerate(dims)
    }
    pieces = np.split(tokens, np.cumsum(lengths)[:-1])
    documents = [(number, f"text {number % 2}", number, one) for number, one in enumerate(pieces)]
    dims = {name: one.shape[1] for name, one in rows.items()}
    with DatastoreWriter(folder, dims, key_dtype=dtype, part_rows=part_rows, **FRAME) as writer:
        write_documents(writer, documents, rows, chunk)
        writer.finish()
    first = min(chunk, next(length for length in lengths if length))
    store = Datastore.open(folder)
    assert store.verify() == () and store.layers == tuple(rows) and store.count == len(store) == count
    assert np.array_equal(store.values, tokens) and store.values.dtype == np.int32
    ids = np.random.default_rng(seed).integers(0, count, 3 * count)
    for name, one in rows.items():
        keys = store.keys(name)
        assert len(keys) == count and keys.dim == one.shape[1]
        assert np.array_equal(keys.centre, one[:first].mean(0, dtype=np.float64).astype(np.float32))
        read = keys.read(0, count)
        # float16 has 11 bits, float32 24.
        step = 2.0**-10 if dtype == "float16" else 2.0**-22
        largest = np.abs(one - keys.centre).max() + np.abs(keys.centre).max()
        assert read.dtype == np.float32 and np.abs(read + keys.centre - one).max() <= step * largest
        assert np.array_equal(keys.take(ids), read[ids])
        assert np.array_equal(keys.read(count // 3, count // 2), read[count // 3 : count // 2])
    firsts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    assert store.documents[:, [0, 1, 3]].tolist() == [[row, i, i] for i, row in enumerate(firsts)]
    assert [store.sources[number] for number in store.documents[:, 2]] == [f"text {i % 2}" for i in range(len(lengths))]


def test_files_are_as_described(store):
    files = sorted(path.relative_to(store.folder).as_posix() for path in store.folder.rglob("*") if path.is_file())
    names = ("part.json", "values.npy", "documents.npy", *(f"keys/{name}.npy" for name in LAYERS))
    parts = [f"parts/{one.name}/{name}" for one in store.manifest.parts for name in names]
    assert files == sorted(["datastore.json", *parts, *(f"frame/{name}.npy" for name in LAYERS)])
    assert [one.name[:6] for one in store.manifest.parts] == ["00000-", "00001-"]
    assert np.load(part(store, 1, "keys/final_norm.npy")).shape == (6, 5)
    manifest = json.loads((store.folder / "datastore.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["count"]) == ("knnlm-datastore", 2, 10)
    assert manifest["layers"]["final_norm"]["scale"] == 1 and manifest["versions"]["torch"] == "2"
    assert store.sources == ("a.txt", "b.txt") and manifest["corpus"] == "corpus" and manifest["generation"] == 1
    assert store.size_bytes == sum((store.folder / name).stat().st_size for name in files)


def test_manifest_comes_back_the_same(store):
    again = from_json(json.loads(json.dumps(store.manifest.to_json())), Path("datastore.json"))
    assert again == store.manifest and store.manifest.model == "tiny"
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.count = 3


def test_values_of_one_part_are_mapped_and_of_many_are_joined(tmp_path, store):
    one = write_store(tmp_path / "one", part_rows=None)
    assert np.array_equal(one.values, store.values) and np.array_equal(one.values, np.arange(1, 11))
    assert one.values.base is not None
    for values in (one.values, store.values):
        assert not values.flags.writeable


@pytest.mark.parametrize("part_rows", [1, 2, 3, 4, 9, None])
@pytest.mark.parametrize("chunk", [1, 2, 3, 10])
def test_a_document_that_is_cut_is_one(tmp_path, part_rows, chunk):
    """However the rows are spread over parts, what is read is the same."""
    store = write_store(tmp_path / "store", part_rows=part_rows, chunk=chunk, key_dtype="float32")
    assert len(store.manifest.parts) > 2 or part_rows not in (1, 2) or chunk > 2
    assert store.documents.tolist() == [[0, 70, 0, 1], [4, 80, 1, 7], [4, 90, 0, 2]]
    assert store.context(9, 9).tolist() == [90, 5, 6, 7, 8, 9] and store.continuation(0, 9).tolist() == [2, 3, 4]
    keys = store.keys("final_norm")
    np.testing.assert_allclose(keys.read(0, 10) + keys.centre, vectors(10, 5), atol=1e-6)
    assert store.verify() == ()


def test_layers_may_come_before_their_values_and_in_any_order(tmp_path):
    rows = {name: vectors(10, dim) for name, dim in LAYERS.items()}
    with DatastoreWriter(tmp_path, LAYERS, **FRAME) as writer:
        writer.append_keys("final_norm", rows["final_norm"])
        write_values(writer)
        writer.append_keys("0.ffn_input", rows["0.ffn_input"][:9])
        writer.append_keys("0.ffn_input", np.empty((0, 3), np.float32))
        writer.append_keys("0.ffn_input", rows["0.ffn_input"][9:])
        writer.finish()
    store = open_datastore(tmp_path)
    for name, one in rows.items():
        keys = store.keys(name)
        np.testing.assert_allclose(keys.read(0, 10) + keys.centre, one, atol=2e-3)


# Documents


def test_documents_of_rows(store):
    assert store.documents.tolist() == [[0, 70, 0, 1], [4, 80, 1, 7], [4, 90, 0, 2]]
    assert [store.document_of(row) for row in (0, 3, 4, 9)] == [("a.txt", 1)] * 2 + [("a.txt", 2)] * 2


@pytest.mark.parametrize(
    ("row", "width", "tokens"),
    [
        (0, 5, [70]),
        (0, 1, [70]),
        (0, 0, []),
        (3, 2, [2, 3]),
        (3, 3, [1, 2, 3]),
        (3, 4, [70, 1, 2, 3]),
        (4, 9, [90]),
        (9, 9, [90, 5, 6, 7, 8, 9]),
        (9, 5, [5, 6, 7, 8, 9]),
    ],
)
def test_context_stays_in_the_document(store, row, width, tokens):
    context = store.context(row, width)
    assert context.tolist() == tokens and context.dtype == np.int32


@pytest.mark.parametrize("row", [-1, 10])
def test_rows_outside_are_refused(store, row):
    with pytest.raises(IndexError):
        store.context(row, 3)
    with pytest.raises(IndexError):
        store.document_of(row)
    with pytest.raises(IndexError):
        store.keys("final_norm").take(np.array([0, row]))


def test_reading_past_the_end_stops_there(store):
    keys = store.keys("final_norm")
    assert (
        keys.read(8, 99).shape == (2, 5)
        and keys.read(10, 99).shape == (0, 5)
        and keys.take(np.empty(0, int)).shape == (0, 5)
    )
    assert keys.read(1, 9).flags.c_contiguous
    with pytest.raises(IndexError):
        keys.read(-2, 3)


# Metrics


@pytest.mark.parametrize("mean", [0.0, 500.0])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_metric_views_agree_with_float64(tmp_path, mean, dtype):
    layers = {"final_norm": 16}
    raw = vectors(10, 16, mean=mean, size=2.0)
    store = write_store(tmp_path, layers=layers, make=lambda rows, dim: raw, key_dtype=dtype)
    keys = store.keys("final_norm")
    queries = vectors(6, 16, seed=1, mean=mean, size=2.0)
    exact_q, exact_k = queries.astype(np.float64), raw.astype(np.float64)
    pairs = exact_q[:, None] - exact_k[None]
    unit_q, unit_k = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (exact_q, exact_k))
    expected = {"l2": (pairs**2).sum(-1), "cosine": 2 - 2 * unit_q @ unit_k.T, "ip": exact_q @ exact_k.T}
    # float16 keeps 11 bits of numbers of about 2 standard deviations; cosine divides by the norm of the whole vector.
    allowed = {"l2": 0.1, "cosine": 5e-3 / (1 + mean**2 / 400), "ip": 0.02 * (mean + 10)}
    fine = 1.0 if dtype == "float16" else 1e-2
    for metric, exact in expected.items():
        view = keys.for_metric(metric)
        ours_q, ours_k = (one.astype(np.float64) for one in (view.prepare_queries(queries), view.read(0, 10)))
        if metric == "ip":
            found = ours_q @ ours_k.T
            # One constant per query cancels in p_kNN: <query, centre>.
            found, exact = found - found[:, :1], exact - exact[:, :1]
        else:
            found = ((ours_q[:, None] - ours_k[None]) ** 2).sum(-1)
        assert np.abs(found - exact).max() < allowed[metric] * fine, metric
        assert view.take(np.array([7, 0])).tolist() == view.read(0, 10)[[7, 0]].tolist()
        assert np.array_equal(keys.prepare_queries(queries, metric), view.prepare_queries(queries))


def test_prepared_queries_leave_the_callers_array_alone(store):
    for metric in ("l2", "cosine", "ip"):
        queries = vectors(4, 5, mean=3)
        before = queries.copy()
        prepared = store.keys("final_norm").prepare_queries(queries, metric)
        prepared += 1
        assert np.array_equal(queries, before) and prepared.dtype == np.float32


def test_cosine_of_a_zero_vector_is_finite(tmp_path):
    store = write_store(tmp_path, layers={"final_norm": 3}, make=lambda rows, dim: np.zeros((rows, dim), np.float32))
    view = store.keys("final_norm").for_metric("cosine")
    assert not view.read(0, 10).any() and not view.prepare_queries(np.zeros((1, 3), np.float32)).any()


def test_unknown_metric_and_wrong_queries_are_refused(store):
    with pytest.raises(InputError, match="'dot'"):
        store.keys("final_norm").for_metric("dot")
    with pytest.raises(InputError, match="'dot'"):
        store.keys("final_norm").prepare_queries(vectors(2, 5), "dot")
    with pytest.raises(InputError, match=r"\[queries, 5\]"):
        store.keys("final_norm").prepare_queries(vectors(2, 4))


def test_take_gathers_over_many_shards_and_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("knnlm.store.keys.TAKE_ROWS", 3)
    many = write_store(tmp_path / "many", part_rows=1, chunk=1).keys("final_norm")
    one = write_store(tmp_path / "one", part_rows=None, chunk=1).keys("final_norm")
    ids = np.random.default_rng(0).integers(0, 10, 50)
    assert np.array_equal(many.take(ids), one.take(ids)) and np.array_equal(one.take(ids), one.read(0, 10)[ids])


# Scale


@pytest.mark.parametrize(
    ("size", "dtype", "scale"),
    [(1.0, "float16", 1), (1023.0, "float16", 1), (1025.0, "float16", 2), (1e6, "float16", 1024), (1e6, "float32", 1)],
)
def test_large_keys_are_scaled_by_a_power_of_two(tmp_path, size, dtype, scale):
    rows = np.array([[size], [-size]] * 5, np.float32)
    store = write_store(tmp_path, layers={"a": 1}, make=lambda *_: rows, key_dtype=dtype, chunk=10)
    assert store.manifest.layers["a"].scale == scale
    np.testing.assert_allclose(store.keys("a").read(0, 10), rows, rtol=2.0**-11)


def test_tiny_keys_keep_their_precision(tmp_path):
    rows = vectors(10, 4, size=1e-6)
    keys = write_store(tmp_path, layers={"a": 4}, make=lambda *_: rows).keys("a")
    np.testing.assert_allclose(keys.read(0, 10) + keys.centre, rows, atol=1e-9)


def test_far_constant_costs_no_precision(tmp_path):
    # A residual stream: one huge nearly constant dimension.
    rows = vectors(10, 4)
    rows[:, 2] += 3000
    keys = write_store(tmp_path, layers={"a": 4}, make=lambda *_: rows, chunk=5).keys("a")
    assert np.abs(keys.read(0, 10) + keys.centre - rows).max() < 4e-3


def test_overflow_names_the_layer_the_place_and_the_way_out(tmp_path):
    rows = vectors(10, 4)
    rows[8, 1] = 1e5
    with new_store_must_fail(
        tmp_path,
        DatastoreError,
        r"layer a overflows float16 at token 4 of a\.txt, document 2; take `key_dtype='float32'`",
    ) as folder:
        write_store(folder, layers={"a": 4}, make=lambda *_: rows)
    assert write_store(tmp_path / "f32", layers={"a": 4}, make=lambda *_: rows, key_dtype="float32").verify() == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [1, 7])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_that_are_not_finite_are_refused(tmp_path, bad, row, dtype):
    rows = vectors(10, 4)
    rows[row, 3] = bad
    place = {1: "token 1 of a.txt, document 1", 7: "token 3 of a.txt, document 2"}[row]
    with new_store_must_fail(tmp_path, ModelError, f"layer a gives NaN or infinite values at {place}") as folder:
        write_store(folder, layers={"a": 4}, make=lambda *_: rows, key_dtype=dtype)


class new_store_must_fail:
    """The block fails with one line, and nothing of its folder stays."""

    def __init__(self, parent, error, message):
        self.parent, self.raises = parent, pytest.raises(error, match=message)
        self.folder = new_folder(parent / "out")

    def __enter__(self):
        self.caught = self.raises.__enter__()
        return self.folder.__enter__()

    def __exit__(self, *error):
        with pytest.raises(error[0]):
            self.folder.__exit__(*error)
            raise error[1]
        assert self.raises.__exit__(*error) and "\n" not in str(self.caught.value)
        assert list(self.parent.iterdir()) == []
        return True


# The writer


def test_counts_must_agree(tmp_path):
    with new_store_must_fail(
        tmp_path, DatastoreError, "layer final_norm has 9 keys, but there are 10 values"
    ) as folder:
        with DatastoreWriter(folder, LAYERS, **FRAME) as writer:
            write_values(writer)
            writer.append_keys("0.ffn_input", vectors(10, 3))
            writer.append_keys("final_norm", vectors(9, 5))
            writer.finish()


def test_nothing_written_is_refused(tmp_path):
    with DatastoreWriter(tmp_path, LAYERS, **FRAME) as writer, pytest.raises(DatastoreError, match="give more text"):
        writer.finish()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda one: one.append_values(np.array([1], np.int32)), "begin a document first"),
        (lambda one: write_values(one) or one.append_values(np.array([2**31])), "cannot be stored"),
        (lambda one: write_values(one) or one.append_values(np.array([-100])), "cannot be stored"),
        (lambda one: one.append_keys("1.ffn_input", vectors(2, 3)), "without layer 1.ffn_input"),
        (lambda one: one.append_keys("final_norm", vectors(2, 3)), "takes .n, 5."),
    ],
)
def test_wrong_appends_are_refused_and_close_the_writer(tmp_path, act, message):
    with DatastoreWriter(tmp_path, LAYERS, **FRAME) as writer:
        with pytest.raises(DatastoreError, match=message):
            act(writer)
        with pytest.raises(DatastoreError, match="closed"):
            writer.append_keys("final_norm", vectors(2, 5))


@pytest.mark.parametrize(("layers", "dtype"), [({}, "float16"), (LAYERS, "bfloat16"), (LAYERS, "int8")])
def test_wrong_options_are_refused(tmp_path, layers, dtype):
    with pytest.raises(InputError):
        DatastoreWriter(tmp_path, layers, key_dtype=dtype, **FRAME)


def writing_threads():
    return [one for one in threading.enumerate() if one.name.startswith("knnlm-datastore")]


def test_exception_in_the_block_stops_the_thread_and_leaves_nothing(tmp_path):
    with new_store_must_fail(tmp_path, KeyboardInterrupt, None) as folder:
        with DatastoreWriter(folder, LAYERS, **FRAME) as writer:
            write_values(writer)
            writer.append_keys("final_norm", vectors(4, 5))
            raise KeyboardInterrupt
    assert not writing_threads()


def test_waiting_keys_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(datastore_writer, "PENDING_BYTES", 100)
    with DatastoreWriter(tmp_path, {"a": 5}, **FRAME) as writer:
        writer.begin_document(0, "a", 1)
        for _ in range(20):
            writer.append_keys("a", vectors(4, 5))
            assert writer._pending_bytes <= 100
            writer.append_values(np.arange(4, dtype=np.int32))
        writer.finish()
    assert Datastore.open(tmp_path).count == 80 and not writing_threads()


@pytest.mark.parametrize("where", ["keys", "values", "documents", "manifest"])
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, where):
    write = NpyWriter._write

    def full(self, data):
        if where in str(self.path.relative_to(self.path.parents[2])):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(NpyWriter, "_write", full)
    if where == "manifest":
        monkeypatch.setattr(datastore_writer, "write_json", lambda *_: full_disk())
    with new_store_must_fail(
        tmp_path, DatastoreError, r"cannot write .*No space left on device.*choose another"
    ) as folder:
        write_store(folder)
    assert not writing_threads()


def test_full_disk_names_what_chose_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(NpyWriter, "_write", lambda *_: full_disk())
    with pytest.raises(DatastoreError, match=r"No space left on device; free .* another TMPDIR$"):
        write_store(tmp_path / "queries", named_by="TMPDIR")


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


KILLED = """
    import os, signal, sys
    import numpy as np
    from knnlm.store.writer import DatastoreWriter
    from knnlm.files import new_folder
    frame = {"fingerprint": {}, "context": 8, "stride": 4}
    with new_folder(sys.argv[1]) as folder, DatastoreWriter(folder, {"a": 4}, **frame) as writer:
        writer.begin_document(0, "a", 1)
        for number in range(100):
            writer.append_values(np.arange(4, dtype=np.int32))
            writer.append_keys("a", np.ones((4, 4), np.float32))
            if number == 50:
                os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_run_leaves_no_datastore_and_the_next_run_cleans_up(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(out)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    left = [path.name for path in tmp_path.iterdir()]
    assert left == [".out.partial"]
    with pytest.raises(DatastoreError, match="is not a datastore"):
        Datastore.open(tmp_path / left[0])
    with new_folder(out) as folder:
        write_store(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and Datastore.open(out).verify() == ()


# What was changed is refused


FILES = ("documents", "values", "centre", "keys", "other keys")


@pytest.mark.parametrize("kind", FILES)
def test_missing_and_truncated_files_are_named_when_opened(store, kind):
    path = described(store)[kind]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatastoreCorrupt, match="bytes") as caught:
        Datastore.open(store.folder)
    assert str(path) in str(caught.value)
    assert [str(path) in problem for problem in Datastore.look(store.folder).verify()] == [True]
    path.unlink()
    with pytest.raises(DatastoreCorrupt, match="is missing") as caught:
        Datastore.open(store.folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", FILES)
def test_changed_byte_is_found_by_verify(store, kind):
    path = described(store)[kind]
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    problems = Datastore.open(store.folder).verify()
    assert len(problems) == 1 and str(path) in problems[0] and "checksum" in problems[0]


def test_swapped_keys_are_found_by_verify(tmp_path):
    documents = [(0, "a", number, [1, 2, 3]) for number in range(3)]
    store = write_store(tmp_path / "store", documents=documents)
    one, other = (part(store, number, "keys/final_norm.npy") for number in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert len(Datastore.open(store.folder).verify()) == 2


@pytest.mark.parametrize("damage", ["missing", "cut", "another", "no json"])
def test_damaged_part_json_is_one_line(store, damage):
    one, other = (part(store, number, "part.json") for number in (0, 1))
    if damage == "missing":
        one.unlink()
    else:
        data = one.read_bytes()
        one.write_bytes({"cut": data[:-20], "another": other.read_bytes(), "no json": b"[]"}[damage])
    with pytest.raises(DatastoreCorrupt, match=r"part\.json (is missing|cannot be read)") as caught:
        Datastore.open(store.folder)
    assert "\n" not in str(caught.value) and str(one) in str(caught.value)


def test_changed_header_is_refused(store):
    path = part(store, 1, "keys/final_norm.npy")
    path.write_bytes(path.read_bytes().replace(b"(6, 5)", b"(5, 6)"))
    with pytest.raises(
        DatastoreCorrupt, match=r"final_norm\.npy holds float16 \(5, 6\), but the manifest says float16 \(6, 5\)"
    ):
        Datastore.open(store.folder)


def edit(store, change):
    rewrite(store.folder / "datastore.json", change)


def edit_part(store, number, change):
    """Change a part.json, with right checksums there and in the manifest."""
    path = part(store, number, "part.json")
    rewrite(path, change)
    checksum = json.loads(path.read_text())["checksum"]
    edit(store, lambda one: one["parts"][number].update(checksum=checksum))


def checksum_of(rows):
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()


def test_nan_with_a_right_checksum_is_found_by_verify(store):
    path = part(store, 1, "keys/final_norm.npy")
    rows = np.load(path)
    rows[1, 2] = np.nan
    path.write_bytes(path.read_bytes()[: -rows.nbytes] + rows.tobytes())
    edit_part(store, 1, lambda one: one["keys"]["final_norm"].update(sha256=checksum_of(rows)))
    assert [problem.split(" ", 1)[1][:9] for problem in Datastore.open(store.folder).verify()] == ["holds NaN"]


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0], [11, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0], [5, 0, 0, 0, 0], [4, 0, 0, 0, 0]],
        [[0, 0, 2, 0, 0]],
        [[0, 0, -1, 0, 0]],
        [[0, 0, 0, 0, -1]],
    ],
)
def test_documents_that_do_not_fit_are_found_by_verify(store, rows):
    path = part(store, 1, "documents.npy")
    path.unlink()
    with NpyWriter(path, np.int64, 5) as file:
        file.append(np.array(rows))
    edit_part(store, 1, lambda one: one["documents"].update(rows=file.rows, sha256=file.sha256))
    assert ["does not fit" in problem for problem in Datastore.open(store.folder).verify()] == [True]


def test_verify_tells_its_progress(store):
    told = []
    assert store.verify(lambda done, total: told.append((done, total))) == ()
    total = 3 * 5 * 8 + 10 * 4 + sum(4 * dim + 10 * 2 * dim for dim in LAYERS.values())
    assert told[-1] == (total, total) and [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.update(count=11), "have 10 rows, the datastore has 11"),
        (lambda one: one["parts"].pop(), "the parts have 4 rows"),
        (lambda one: one["parts"].append(one["parts"][0] | {"live": 0, "removed": [[0, 1]]}), "a part is listed twice"),
        (lambda one: one["parts"][0].update(live=3), "live is 3 of 4, none is removed"),
        (lambda one: one["parts"][0].update(live=5), "live is 5 of 4 rows"),
        (lambda one: one["parts"][0].update(removed=[[1, 1]]), "removed is not in order"),
        (lambda one: one["parts"][0].update(removed=[[2, 3], [0, 1]]), "removed is not in order"),
        (lambda one: one["parts"][0].update(name="../x"), "no name of a part"),
        (lambda one: one["parts"][0].update(name="/00000-00000000"), "no name of a part"),
        (lambda one: one["parts"][0].update(checksum="x"), r"parts.0.: checksum is 'x', which is no SHA-256"),
        (lambda one: one.pop("stride"), "no 'stride'"),
        (lambda one: one.update(layers=[]), "layers is a list of 0, but must be an object"),
        (lambda one: one["layers"]["final_norm"].update(scale=0), "scale is 0"),
        (lambda one: one["layers"]["final_norm"].update(scale=3.0), "scale is 3.0"),
        (lambda one: one["layers"]["final_norm"].update(scale="nan"), "scale is 'nan', but must be a number"),
        (lambda one: one["layers"]["final_norm"].update(dtype="object"), "dtype is 'object'"),
        (lambda one: one["layers"]["final_norm"]["centre"].update(sha256="x"), "'x', which is no SHA-256"),
        (lambda one: one["layers"].update({"../x": one["layers"]["final_norm"]}), "no name inside"),
        (lambda one: one["layers"].update({"\x1b[31m": one["layers"]["final_norm"]}), r"'.x1b.31m' is no name inside"),
        (lambda one: one.update(context=0), "context is 0"),
        (lambda one: one.update(stride=9), "context is 8 and stride 9"),
        (lambda one: one.update(count=True), "count is True, but must be a whole number"),
        (lambda one: one.update(generation=-1), "generation is -1"),
        (lambda one: one.update(fitted=[]), "fitted is a list"),
        (lambda one: one.update(fitted={"final_norm": {}}), r"no 'k' in fitted.'final_norm'."),
        (lambda one: one.update(fitted={"0.x": FITTED}), "fitted names the layer '0.x', which is not stored"),
        (lambda one: one.update(fitted={"final_norm": FITTED | {"lambda": 1.5}}), "lambda is 1.5"),
        (lambda one: one.update(fitted={"final_norm": FITTED | {"gate": []}}), "gate is a list"),
        (lambda one: one.update(indexes={"0.x": ENTRY}), "indexes names the layer '0.x', which is not stored"),
        (lambda one: one.update(indexes={"final_norm": None}), r"indexes.'final_norm'. is None"),
        (lambda one: one.update(indexes={"final_norm": ENTRY | {"recall": None}}), "recall is None"),
        (lambda one: one.update(indexes={"final_norm": ENTRY | {"k": 11}}), "is 11 of 10 keys"),
        (lambda one: one["scores"].update(choice=[]), "choice is a list"),
        (lambda one: one["scores"]["choice"].update(layer=3), "choice.layer is 3"),
        (lambda one: one["scores"]["settings"].update(index=[]), "index is a list"),
        (lambda one: one["scores"]["settings"].update(metric="x"), "metric is 'x'"),
    ],
)
def test_damaged_manifest_is_refused(store, change, message):
    edit(store, change)
    with pytest.raises(DatastoreCorrupt, match=message) as caught:
        Datastore.open(store.folder)
    assert "datastore.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.update(version=3), "made by a newer knnlm .format 3, this one reads 2.; upgrade knnlm"),
        (lambda one: one.update(version=1), "made by an older knnlm .format 1, this one reads 2.; build it again"),
        (lambda one: one.update(version="x"), "of an unknown format"),
        (lambda one: one.update(format="other"), "not the manifest of a datastore"),
    ],
)
def test_other_formats_are_refused(store, change, message):
    edit(store, change)
    with pytest.raises(DatastoreError, match=message):
        Datastore.open(store.folder)


def test_folders_that_are_no_datastore_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(DatastoreError, match=r"is not a datastore: it has no datastore\.json"):
            Datastore.open(path)
    (tmp_path / "datastore.json").write_text('{"format":')
    with pytest.raises(DatastoreCorrupt, match=r"datastore\.json cannot be read"):
        Datastore.open(tmp_path)


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_is_hardly_json_is_one_line(store, text):
    path = store.folder / "datastore.json"
    whole = path.read_text()
    for damaged in (text, whole.replace('"count": 10', f'"count": {text}'), whole.replace('"tiny"', text)):
        path.write_text(damaged)
        with pytest.raises(DatastoreError) as caught:
            Datastore.open(store.folder)
        assert "datastore.json" in str(caught.value) and str(caught.value).isprintable()


def test_manifest_has_a_checksum_of_itself(store):
    # As docs/format.md tells it, to whoever reads a datastore without knnlm.
    document = json.loads((store.folder / "datastore.json").read_text())
    checksum = document.pop("checksum")
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    assert checksum == hashlib.sha256(text.encode()).hexdigest()


def test_every_flipped_bit_of_the_manifest_is_refused_or_changes_nothing(store):
    path = store.folder / "datastore.json"
    data, rng = path.read_bytes(), random.Random(0)
    for _ in range(400):
        flip_bit(path, rng)
        with contextlib.suppress(DatastoreError):
            assert Datastore.open(store.folder).manifest == store.manifest
        path.write_bytes(data)


def test_manifest_without_a_checksum_is_refused(store):
    rewrite(store.folder / "datastore.json", lambda one: one.pop("checksum"))
    with pytest.raises(DatastoreCorrupt, match="no 'checksum' of itself"):
        Datastore.open(store.folder)


def test_damaged_documents_are_refused_or_whole(store):
    path, rng = store.folder / "datastore.json", random.Random(0)
    store.update_manifest(fitted={"final_norm": FITTED}, indexes={"final_norm": ENTRY})
    document, refused = json.loads(path.read_text()), 0
    for text in damaged_documents(document, rng, 400):
        path.write_text(text)
        try:
            opened = Datastore.open(store.folder)
        except DatastoreError as error:
            assert str(error).isprintable()
            refused += 1
        else:
            json.dumps(opened.describe())
            opened.keys("final_norm").take(np.arange(3))
    assert 300 < refused < 400  # what is optional may go


# Opened once


def test_a_datastore_that_is_replaced_stays_what_it_was(store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "kept")
    kept = Datastore.open(tmp_path / "kept")
    other = write_store(tmp_path / "other", make=lambda rows, dim: vectors(rows, dim, seed=9))
    shutil.rmtree(store.folder)
    other.folder.rename(store.folder)
    for name in LAYERS:
        assert np.array_equal(store.keys(name).read(0, 10), kept.keys(name).read(0, 10))
        assert not np.array_equal(store.keys(name).read(0, 10), other.keys(name).read(0, 10))
    assert np.array_equal(store.documents, kept.documents) and np.array_equal(store.values, kept.values)
    assert store.verify() == ()
    store.check_untouched()


def test_an_open_datastore_holds_no_descriptors(store):
    before = len(os.listdir("/proc/self/fd"))
    opened = [Datastore.open(store.folder) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before and opened[7].keys("final_norm").read(0, 1).shape == (1, 5)


def test_a_datastore_that_is_replaced_while_it_is_opened_is_the_new_one(store, tmp_path, monkeypatch):
    other, real = write_store(tmp_path / "other", make=lambda rows, dim: vectors(rows, dim, seed=9)), OpenFolder.map

    def replaced(self, name):
        if name.endswith("values.npy") and other.folder.exists():
            shutil.rmtree(store.folder)
            other.folder.rename(store.folder)
        return real(self, name)

    monkeypatch.setattr(OpenFolder, "map", replaced)
    opened = Datastore.open(store.folder)
    assert opened.verify() == () and opened.manifest == other.manifest


def test_a_file_that_is_written_to_while_it_is_read_is_told(store):
    path = part(store, 1, "keys/final_norm.npy")
    data = path.read_bytes()
    os.utime(path, ns=(1, 1))
    store.check_untouched()  # of another time, and of the same bytes
    with path.open("r+b") as file:
        file.write(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DatastoreCorrupt, match=r"final_norm\.npy .* written to while it was read"):
        store.check_untouched()


def test_what_is_read_as_a_whole_is_checked_when_it_is_read(store):
    for name, read in (
        ("documents", lambda one: one.documents),
        ("centre", lambda one: one.keys("final_norm")),
    ):
        path = described(store)[name]
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(DatastoreCorrupt, match="checksum"):
            read(Datastore.open(store.folder))
        path.write_bytes(data)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(store):
    for path in (store.folder / "datastore.json", part(store, 0, "part.json"), part(store, 0, "values.npy")):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DatastoreCorrupt, match="no regular file"):
            Datastore.open(store.folder)


# Models, layers, later additions


def test_same_model_under_another_name_is_accepted(store):
    store.check_model({**MODEL, "model": "elsewhere/tiny"})


@pytest.mark.parametrize("part", ["config", "weights", "tokenizer"])
def test_other_model_is_refused_with_what_differs(store, part):
    with pytest.raises(DatastoreMismatch) as caught:
        store.check_model({**MODEL, "model": "other", part: "0123456789abcdef"})
    message = str(caught.value)
    assert f"{part} {MODEL[part][:8]} here and 01234567 there" in message and "(tiny) than other" in message
    assert not any(
        f"{same} {MODEL[same][:8]}" in message for same in ("config", "weights", "tokenizer") if same != part
    )


def test_fingerprint_that_lacks_a_part_is_refused(store):
    with pytest.raises(DatastoreMismatch, match="weights aaaaaaaa here and unknown there"):
        store.check_model({name: value for name, value in MODEL.items() if name != "weights"})


def test_layer_that_is_not_stored_is_refused(store):
    for act in (store.keys, store.index_folder):
        with pytest.raises(DatastoreMismatch, match=r"no keys of layer 1\.ffn_input; it has 0\.ffn_input, final_norm"):
            act("1.ffn_input")


def test_index_folder_is_a_path_only(store):
    folder = store.index_folder("final_norm")
    assert folder == store.folder / "index" / "final_norm" and not folder.exists()


def test_manifest_is_updated_field_by_field(store):
    store.update_manifest(indexes={"final_norm": ENTRY | {"recall": np.float32(0.5)}})
    store.update_manifest(fitted={"final_norm": FITTED}, indexes={"0.ffn_input": ENTRY | {"metric": "l2"}})
    manifest = Datastore.open(store.folder).manifest
    assert manifest == store.manifest and manifest.fitted == {"final_norm": FITTED}
    assert manifest.index_metric("final_norm") == "cosine" and manifest.index_metric("0.ffn_input") == "l2"
    assert manifest.scores == SCORES and manifest.count == 10


def test_update_that_fails_leaves_the_manifest(store, monkeypatch):
    monkeypatch.setattr("knnlm.store.changeable.write_json", lambda *_: full_disk())
    with pytest.raises(DatastoreError, match="No space left"):
        store.update_manifest(fitted={"final_norm": FITTED})
    assert store.manifest.fitted is None and Datastore.open(store.folder).manifest.fitted is None


def test_layer_without_an_index_has_no_metric(store):
    with pytest.raises(DatastoreError, match="no finished index of layer final_norm"):
        store.manifest.index_metric("final_norm")


def test_description_is_plain_json(store, tmp_path):
    description = store.describe()
    write_json(tmp_path / "a.json", description)
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(description))
    assert description["keys"] == 10 and description["choice"] == SCORES["choice"] and description["documents"] == 3

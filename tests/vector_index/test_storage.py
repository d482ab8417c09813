"""An index on disk: whole or absent, and opened only over its own keys."""

from __future__ import annotations

import json
import os
import random
import shutil
from hashlib import sha256

import numpy as np
import pytest

from index.build import build_index
from index.errors import CorruptIndex, IndexExists, VectorIndexError
from index.exact import ExactIndex
from index.manifest import Recall
from index.metric import Metric
from index.saved import SavedIndex
from index.source import ArraySource
from index.storage import open_index, read_manifest, save_index, verify
from tests.damage import TEXTS, damaged_documents, flip_bit, rewrite
from tests.vector_oracle import clustered

RECALL = Recall(recall=0.97, k=20, queries=50, max_distance_error=0.1, milliseconds_per_query=0.2)


@pytest.fixture(scope="module")
def source():
    return ArraySource(clustered(400, 8, dtype=np.float16))


@pytest.fixture(scope="module")
def built(source):
    return build_index(source, "IVF8,Flat", k=10)


@pytest.fixture
def saved(built, tmp_path):
    save_index(built, tmp_path / "layers" / "index", recall=RECALL)
    return tmp_path / "layers" / "index"


def everything(folder):
    return sorted(path.name for path in folder.rglob("*"))


def edit(folder, **changes):
    rewrite(folder / "index.json", lambda document: document.update(changes))


def test_manifest_tells_all_that_opening_needs(saved, built):
    manifest = read_manifest(saved)
    assert (manifest.spec, manifest.metric, manifest.dim, manifest.count) == ("IVF8,Flat", "l2", 8, 400)
    assert manifest.recall == RECALL
    assert manifest.parameters == {"nprobe": built.effort.value, "overfetch": 1.0}
    assert set(manifest.files) == {"index.faiss", "lists.bin", "centre.npy"} == set(everything(saved)) - {"index.json"}
    assert manifest.files["index.faiss"].bytes + manifest.files["lists.bin"].bytes == built.size_bytes


def test_tuned_parameters_come_from_the_manifest(saved, source):
    edit(saved, parameters={"nprobe": 7, "overfetch": 3.0})
    opened = open_index(saved, source)
    assert opened.effort.value == 7 and opened.overfetch == 3.0


def test_exact_search_is_a_manifest_only(source, tmp_path):
    save_index(ExactIndex(source, Metric.IP), tmp_path / "exact")
    assert everything(tmp_path / "exact") == ["index.json"]
    opened = open_index(tmp_path / "exact", source)
    assert isinstance(opened, ExactIndex) and opened.metric is Metric.IP
    assert verify(tmp_path / "exact").recall is None


def test_a_folder_that_is_there_is_refused(built, tmp_path):
    with pytest.raises(IndexExists, match="is there already"):
        save_index(built, tmp_path)
    assert not everything(tmp_path)


@pytest.mark.parametrize("name", ["index.faiss", "lists.bin", "centre.npy", "index.json"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_saving_leaves_nothing(built, tmp_path, monkeypatch, name, error):
    real = os.fsync

    def stop_at(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name):
            raise error("stopped")
        real(descriptor)

    monkeypatch.setattr("os.fsync", stop_at)
    with pytest.raises(error, match="stopped"):
        save_index(built, tmp_path / "index")
    assert not everything(tmp_path)


def test_full_disk_is_an_error_of_the_disk(built, tmp_path, monkeypatch):
    def full(write):
        write(b"begun")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(built.native, "write", full)
    with pytest.raises(OSError, match="No space left"):
        save_index(built, tmp_path / "index")
    assert not everything(tmp_path)


def test_error_of_a_writer_comes_through_faiss(built):
    def full(piece):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        built.native.write(full)


def test_ctrl_c_while_building_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr("index.build.BLOCK_BYTES", 4 * 8 * 100)
    monkeypatch.chdir(tmp_path)

    def stop(done, total):
        if done >= 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(source, "IVF8,Flat", progress=stop)
    assert not everything(tmp_path)


@pytest.mark.parametrize("name", ["index.faiss", "lists.bin", "centre.npy"])
def test_missing_and_short_files_are_named(saved, source, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    for check in (verify, lambda folder: open_index(folder, source)):
        with pytest.raises(
            CorruptIndex, match=rf"{name}: its size in bytes is {len(content) // 2}, but {len(content)}"
        ):
            check(saved)
    (saved / name).unlink()
    for check in (verify, lambda folder: open_index(folder, source)):
        with pytest.raises(CorruptIndex, match=f"{name} is missing"):
            check(saved)


@pytest.mark.parametrize("name", ["index.faiss", "lists.bin", "centre.npy"])
def test_a_changed_bit_is_found_by_verify(saved, name):
    verify(saved)
    content = bytearray((saved / name).read_bytes())
    content[-1] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(CorruptIndex, match=f"{name} was changed"):
        verify(saved)


@pytest.mark.parametrize("name", ["index.faiss", "lists.bin", "centre.npy"])
def test_rubbish_of_the_right_size_is_refused(saved, source, name):
    (saved / name).write_bytes(b"x" * (saved / name).stat().st_size)
    with pytest.raises(CorruptIndex, match=name):
        open_index(saved, source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"format": "vector-index-99"}', "vector-index-99"),
    ],
)
def test_unreadable_manifest(saved, source, text, message):
    (saved / "index.json").write_text(text)
    with pytest.raises(CorruptIndex, match=message) as caught:
        open_index(saved, source)
    assert "\n" not in str(caught.value)


def test_manifest_may_not_name_files_elsewhere(saved, source):
    edit(saved, files={"../index.faiss": {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(CorruptIndex, match="files are"):
        verify(saved)


def test_folder_without_manifest_is_no_index(tmp_path, source):
    with pytest.raises(CorruptIndex, match=r"no index\.json"):
        open_index(tmp_path, source)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (clustered(401, 8, dtype=np.float16), "number of keys is 400, but 401"),
        (clustered(400, 9, dtype=np.float16), "dimension is 8, but 9"),
        (clustered(400, 8, dtype=np.float16, seed=5), "fingerprint of keys"),
    ],
)
def test_other_keys_are_refused(saved, other, message):
    with pytest.raises(CorruptIndex, match=message):
        open_index(saved, ArraySource(other))


def test_another_metric_is_refused(saved, source):
    with pytest.raises(CorruptIndex, match="metric is l2, but ip"):
        open_index(saved, source, metric=Metric.IP)


@pytest.mark.parametrize(
    ("spec", "keys", "metric", "message"),
    [
        ("IVF8,Flat", 400, "ip", "metric is ip, but l2"),
        ("IVF8,Flat", 300, "l2", "number of keys is 300, but 400"),
        ("IVF4,Flat", 400, "l2", "kind is IndexIVFFlat with 4 lists .*, but IndexIVFFlat with 8 lists"),
        ("IVF8,SQ8", 400, "l2", "kind is IndexIVFScalarQuantizer with"),
        ("HNSW8,Flat", 400, "l2", "kind is IndexHNSWFlat with"),
    ],
)
def test_manifest_and_faiss_file_must_agree(saved, source, tmp_path, spec, keys, metric, message):
    other = build_index(ArraySource(clustered(keys, 8)), spec, k=10, metric=Metric(metric))
    files = {name: vars(one) for name, one in save_index(other, tmp_path / "other").files.items()}
    (tmp_path / "other" / "index.faiss").replace(saved / "index.faiss")
    rewrite(saved / "index.json", lambda one: one["files"].update({"index.faiss": files["index.faiss"]}))
    with pytest.raises(CorruptIndex, match=rf"index\.faiss: its {message}"):
        open_index(saved, source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sizes: sizes + (np.arange(8) == 0), "has 401 keys, but 400 are wanted"),
        (lambda sizes: sizes + 1000, "but its lists need"),
        (lambda sizes: sizes - 500, "impossible sizes"),
    ],
)
def test_lists_that_cannot_be_are_refused(saved, source, change, message):
    path = saved / "lists.bin"
    data = bytearray(path.read_bytes())
    data[:64] = change(np.frombuffer(data[:64], "<i8")).tobytes()
    path.write_bytes(data)
    rewrite(saved / "index.json", lambda one: one["files"]["lists.bin"].update(sha256=sha256(data).hexdigest()))
    with pytest.raises(CorruptIndex, match=rf"lists\.bin .*{message}") as caught:
        open_index(saved, source)
    assert "\n" not in str(caught.value)


def test_lists_come_with_the_kinds_that_have_them(saved, built, source, tmp_path):
    rewrite(saved / "index.json", lambda one: one["files"].pop("lists.bin"))
    with pytest.raises(CorruptIndex, match=r"lists\.bin is missing"):
        open_index(saved, source)
    save_index(build_index(source, "PQ4x4", k=10), tmp_path / "other")
    (tmp_path / "other" / "lists.bin").write_bytes(built.native.lists.tobytes())
    lists = {"bytes": built.native.lists.size, "sha256": sha256(built.native.lists).hexdigest()}
    rewrite(tmp_path / "other" / "index.json", lambda one: one["files"].update({"lists.bin": lists}))
    with pytest.raises(CorruptIndex, match=r"lists\.bin is of another index"):
        open_index(tmp_path / "other", source)


@pytest.mark.parametrize("name", ["index.faiss", "lists.bin", "centre.npy", "index.json"])
def test_a_flipped_bit_is_refused_when_the_index_is_opened(saved, source, name):
    data, rng = (saved / name).read_bytes(), random.Random(0)
    queries_QD = source.take(np.arange(5))
    expected = open_index(saved, source).search(queries_QD, 3)
    for _ in range(60):
        flip_bit(saved / name, rng)
        try:  # what JSON does not care for, such as white space, may differ
            assert np.array_equal(open_index(saved, source).search(queries_QD, 3).ids_QK, expected.ids_QK)
            assert name == "index.json"
        except CorruptIndex as error:
            assert str(error).isprintable()
        (saved / name).write_bytes(data)


def test_an_opened_index_outlives_its_folder(saved, source):
    opened = SavedIndex.open(saved)
    expected = open_index(opened, source).search(source.take(np.arange(5)), 3)
    shutil.rmtree(saved)
    assert np.array_equal(open_index(opened, source).search(source.take(np.arange(5)), 3).ids_QK, expected.ids_QK)


def test_manifest_has_a_checksum_of_itself(saved):
    document = json.loads((saved / "index.json").read_text())
    checksum = document.pop("checksum")
    assert checksum == sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    edit(saved, dim=9)
    rewrite(saved / "index.json", lambda one: one.update(dim=8), seal=False)
    with pytest.raises(CorruptIndex, match="changed after it was written"):
        read_manifest(saved)
    rewrite(saved / "index.json", lambda one: one.pop("checksum"))
    with pytest.raises(CorruptIndex, match="no 'checksum' of itself"):
        read_manifest(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": None}, "parameters is None, but must be an object"),
        ({"parameters": {"nprobe": 8}}, "parameters are 'nprobe', but must be overfetch"),
        ({"parameters": {"nprobe": "x", "overfetch": 1.0}}, "'nprobe'. is 'x', but must be a number"),
        ({"parameters": {"nprobe": 1.5, "overfetch": 1.0}}, "nprobe is 1.5"),
        ({"parameters": {"overfetch": -1}}, "overfetch is -1"),
        ({"parameters": {"overfetch": 1, "x": 1}}, "'overfetch', 'x'"),
        ({"files": {}}, "files are a list of 0"),
        ({"files": {"index.faiss": {"bytes": 1, "sha256": "x"}, "centre.npy": None}}, "'x', which is no SHA-256"),
        ({"recall": {"recall": 0.5}}, "no 'k' in recall"),
        ({"recall": []}, "recall is a list"),
        ({"metric": "cosine"}, "metric is 'cosine', but must be l2 or ip"),
        ({"dim": 0}, "dim is 0"),
        ({"spec": ""}, "index is ''"),
        ({"spec": "\x1b[2J"}, "index is '.x1b.2J'"),
        ({"spec": "IVF8,Falt"}, "index.json .*FAISS says"),
        ({"spec": "IVF0,Flat"}, "index.json .*no size in it may be 0"),
        ({"spec": "IVF99999999,Flat"}, "index.json .*needs at least 99999999 keys"),
        ({"spec": "auto"}, "spec is 'auto'"),
        ({"parameters": {"efSearch": 8, "overfetch": 1.0}}, "index.json .*FAISS says"),
    ],
)
def test_fields_that_cannot_be_are_refused(saved, source, changes, message):
    edit(saved, **changes)
    with pytest.raises(VectorIndexError, match=message) as caught:
        open_index(saved, source)
    assert str(caught.value).isprintable()


def test_damaged_documents_are_refused_or_whole(saved, source):
    document, path, refused = json.loads((saved / "index.json").read_text()), saved / "index.json", 0
    for text in (*TEXTS, *damaged_documents(document, random.Random(0), 400)):
        path.write_text(text)
        try:
            assert len(open_index(saved, source).search(source.take(np.arange(2)), 3).ids_QK) == 2
        except VectorIndexError as error:
            assert str(error).isprintable()
            refused += 1
    assert refused > 300

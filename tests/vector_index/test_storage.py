"""An index on disk: whole or absent, and opened only over its own keys."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from index.build import build_index
from index.errors import CorruptIndex, IndexExists
from index.exact import ExactIndex
from index.metric import Metric
from index.recall import Recall
from index.source import ArraySource
from index.storage import open_index, read_manifest, save_index, verify
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
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_manifest_tells_all_that_opening_needs(saved, built):
    manifest = read_manifest(saved)
    assert (manifest.spec, manifest.metric, manifest.dim, manifest.count) == ("IVF8,Flat", "l2", 8, 400)
    assert manifest.recall == RECALL
    assert manifest.parameters == {"nprobe": built.effort.value, "overfetch": 1.0}
    assert set(manifest.files) == {"index.faiss", "centre.npy"} == set(everything(saved)) - {"index.json"}
    assert manifest.files["index.faiss"].bytes == built.size_bytes


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


@pytest.mark.parametrize("name", ["index.faiss", "centre.npy", "index.json"])
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


@pytest.mark.parametrize("name", ["index.faiss", "centre.npy"])
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


@pytest.mark.parametrize("name", ["index.faiss", "centre.npy"])
def test_a_changed_bit_is_found_by_verify(saved, name):
    verify(saved)
    content = bytearray((saved / name).read_bytes())
    content[-1] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(CorruptIndex, match=f"{name} was changed"):
        verify(saved)


@pytest.mark.parametrize("name", ["index.faiss", "centre.npy"])
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
    edit(saved, files={"../index.faiss": {"bytes": 1, "sha256": ""}})
    with pytest.raises(CorruptIndex, match="outside its folder"):
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


@pytest.mark.parametrize(("field", "value"), [("metric", "ip"), ("count", 400)])
def test_manifest_and_faiss_file_must_agree(saved, source, tmp_path, field, value):
    other = build_index(ArraySource(clustered(300, 8)), "IVF8,Flat", k=10)
    if field == "count":
        save_index(other, tmp_path / "other")
        (tmp_path / "other" / "index.faiss").replace(saved / "index.faiss")
        edit(saved, files={})
    else:
        edit(saved, metric=value)
    with pytest.raises(CorruptIndex, match=r"index\.faiss: its (metric is l2, but ip|number of keys is 300, but 400)"):
        open_index(saved, source)

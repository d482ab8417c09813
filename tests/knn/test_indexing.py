"""Changes of one datastore by several: none loses what another has written."""

from __future__ import annotations

import errno
import fcntl
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from index.errors import IndexExists
from index.storage import read_manifest as read_index_manifest
from knnlm.config import KNNConfig, Settings
from knnlm.errors import DatastoreMismatch
from knnlm.knn.indexing import index_layer, verify_store
from knnlm.locks import locked
from knnlm.progress import Silent
from knnlm.store.datastore import Datastore
from knnlm.store.writer import DatastoreWriter

LAYERS = ("0.ffn_input", "1.ffn_input", "final_norm")
FITTED = {"k": 8, "lambda": 0.5, "temperature": 2.0, "gate": None}
SETTINGS = Settings(knn=KNNConfig(k=4, index="exact"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "store", 0)


def write(folder: Path, seed: int) -> Path:
    folder.mkdir()
    rows = np.random.default_rng(seed).normal(size=(40, 4)).astype(np.float32)
    with DatastoreWriter(folder, dict.fromkeys(LAYERS, 4), fingerprint={}, context=8, stride=4) as writer:
        writer.begin_document(0, "a", 1)
        writer.append_values(np.arange(40))
        for layer in LAYERS:
            writer.append_keys(layer, rows)
        writer.finish()
    return folder


def test_indexes_from_stores_that_were_opened_before_join(folder: Path) -> None:
    stores = [Datastore.open(folder) for _ in LAYERS]
    for store, layer in zip(stores, LAYERS, strict=True):
        index_layer(store, layer, SETTINGS)
    assert tuple(Datastore.open(folder).manifest.indexes) == LAYERS == tuple(stores[-1].manifest.indexes)
    assert verify_store(folder, Silent()) == ()


def test_fitted_settings_and_indexes_from_stores_that_were_opened_before_join(folder: Path) -> None:
    one, other = Datastore.open(folder), Datastore.open(folder)
    index_layer(one, "final_norm", SETTINGS)
    other.update_manifest(fitted={"final_norm": FITTED})
    now = Datastore.open(folder).manifest
    assert (now.fitted, tuple(now.indexes)) == ({"final_norm": FITTED}, ("final_norm",))


def test_indexes_that_are_made_at_once_join(folder: Path) -> None:
    stores = [Datastore.open(folder) for _ in LAYERS]
    with ThreadPoolExecutor(len(LAYERS)) as threads:
        list(threads.map(index_layer, stores, LAYERS, [SETTINGS] * len(LAYERS)))
    assert set(Datastore.open(folder).manifest.indexes) == set(LAYERS)


def test_changes_wait_for_each_other(folder: Path) -> None:
    store = Datastore.open(folder)
    with locked(folder):
        waiting = threading.Thread(target=store.update_manifest, kwargs={"fitted": {"final_norm": FITTED}})
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and Datastore.open(folder).manifest.fitted is None
    waiting.join(30)
    assert Datastore.open(folder).manifest.fitted == {"final_norm": FITTED}


def test_second_index_of_a_layer_leaves_the_first_as_it_is(folder: Path) -> None:
    one, other = Datastore.open(folder), Datastore.open(folder)
    index_layer(one, "final_norm", SETTINGS)
    before = read_index_manifest(one.index_folder("final_norm"))
    with pytest.raises(Exception, match="there already"):
        index_layer(other, "final_norm", SETTINGS)
    assert read_index_manifest(one.index_folder("final_norm")) == before


LEFTOVERS = (".datastore.json.partial-0123abcd", "index/.1.ffn_input.partial-0123abcd/index.faiss")


def leave(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")


def test_leftovers_of_a_killed_change_are_removed_and_no_others(folder: Path) -> None:
    others = (".datastore.json.partial-mine", "index/.1.ffn_input.partial-mine/a", "index/.else.partial-0123abcd/a")
    leave(folder, *LEFTOVERS, *others)
    index_layer(Datastore.open(folder), "final_norm", SETTINGS)
    assert [name for name in LEFTOVERS if (folder / name).exists()] == []
    assert all((folder / name).exists() for name in others)


def test_file_system_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    leave(folder, *LEFTOVERS)  # perhaps somebody is at work on them
    for store, layer in [(Datastore.open(folder), layer) for layer in LAYERS]:
        index_layer(store, layer, SETTINGS)
    assert tuple(Datastore.open(folder).manifest.indexes) == LAYERS
    assert all((folder / name).exists() for name in LEFTOVERS)


def test_another_datastore_in_the_same_place_is_not_changed(folder: Path) -> None:
    store = Datastore.open(folder)
    shutil.rmtree(folder)
    before = (write(folder, 1) / "datastore.json").read_bytes()
    with pytest.raises(DatastoreMismatch, match="is another datastore than the one that was opened; open it again"):
        index_layer(store, "final_norm", SETTINGS)
    assert (folder / "datastore.json").read_bytes() == before and not (folder / "index").exists()


def test_files_of_others_in_the_place_of_an_index_are_kept(folder: Path) -> None:
    place = folder / "index" / "final_norm"
    place.mkdir(parents=True)
    (place / "index.json").write_text("of a run that was stopped")
    index_layer(folder, "final_norm", SETTINGS)
    assert read_index_manifest(place).is_exact
    beside = folder / "index" / "final_norm~mine"
    beside.mkdir()
    (beside / "notes.txt").write_text("mine")
    other = folder / "index" / "0.ffn_input"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(IndexExists, match=r"0\.ffn_input is there already"):
        index_layer(folder, "0.ffn_input", SETTINGS)
    assert [one.name for place in (other, beside) for one in place.iterdir()] == ["notes.txt"] * 2

"""Datastores named `hf:USER/NAME`, read through the real huggingface_hub from a stand-in for the hub."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest

from knnlm.config import KNNConfig, Settings
from knnlm.errors import DatastoreCorrupt, DatastoreError, InputError
from knnlm.knn.indexing import index_layer
from knnlm.places import DATASTORE, HUB_PREFIX
from knnlm.store.datastore import Datastore, as_datastore, open_datastore
from knnlm.store.hub import HUB_STORE
from tests.damage import flip_bit
from tests.hub_server import Hub, fill

REPO = "ann/nursing"
NAME = f"hf:{REPO}"


@pytest.fixture
def commit(hub: Hub, store_folder: Path) -> str:
    """A datastore is on the hub."""
    return fill(hub, REPO, store_folder)


@pytest.fixture
def keys_file(store_folder: Path) -> str:
    """The name of a file with keys."""
    return next(
        path.relative_to(store_folder).as_posix()
        for path in sorted(store_folder.rglob("*.npy"))
        if "keys" in path.parts
    )


def bytes_in(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items()}


@pytest.mark.parametrize("opened", [open_datastore, as_datastore, Datastore.open, Datastore.look])
def test_a_name_on_the_hub_opens_what_is_there(opened, commit, store_folder):
    store = opened(NAME)
    assert bytes_in(store.folder) == bytes_in(store_folder)
    assert store.manifest == Datastore.open(store_folder).manifest
    assert store.folder.name == commit


def test_a_path_object_may_hold_the_name(commit):
    assert Datastore.open(Path(NAME)).folder.name == commit


def test_what_was_fetched_is_not_fetched_or_checked_again(hub, commit, monkeypatch):
    Datastore.open(NAME)
    fetched = dict(hub.fetched)
    monkeypatch.setattr(Datastore, "verify", lambda store: pytest.fail("checked again"))
    Datastore.open(NAME)
    assert hub.fetched == fetched and set(fetched.values()) == {1}


def test_what_was_fetched_is_read_without_the_hub(commit, offline):
    Datastore.open(NAME)
    with offline():
        assert Datastore.open(NAME).folder.name == commit


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, commit, store_folder, tmp_path):
    hub.repos[REPO].refs["v1"] = commit
    newer = shutil.copytree(store_folder, tmp_path / "newer")
    Datastore.open(newer).update_manifest(fitted={"2.ffn_input": {"k": 8, "temperature": 4.0, "lambda": 0.5}})
    second = fill(hub, REPO, newer)
    for revision, expected in [("v1", commit), (commit, commit), ("main", second), (second, second)]:
        assert Datastore.open(f"{NAME}@{revision}").folder.name == expected
    assert Datastore.open(NAME).manifest.fitted is not None
    # A new revision fetches what it does not share with the old one.
    assert {name for name, times in hub.fetched.items() if times > 1} == {DATASTORE}


# Damage


@pytest.mark.parametrize("whose", ["keys", DATASTORE])
def test_a_file_damaged_on_the_way_is_fetched_anew(whose, hub, commit, keys_file, store_folder):
    damaged = keys_file if whose == "keys" else DATASTORE
    hub.damage[damaged] = 1
    store = Datastore.open(NAME)
    assert store.verify() == () and bytes_in(store.folder) == bytes_in(store_folder)
    assert {name for name, times in hub.fetched.items() if times > 1} == {damaged}


def test_damage_that_stays_is_refused_until_it_is_gone(hub, commit, keys_file):
    hub.damage[keys_file] = 2
    with pytest.raises(DatastoreCorrupt, match=rf"^{NAME} is damaged: .*{keys_file} has changed"):
        Datastore.open(NAME)
    assert Datastore.open(NAME).verify() == ()
    assert hub.fetched[keys_file] == 3


def test_a_datastore_that_is_damaged_on_the_hub_is_refused(hub, store_folder, tmp_path, keys_file):
    broken = shutil.copytree(store_folder, tmp_path / "broken")
    flip_bit(broken / keys_file, random.Random(0))
    fill(hub, REPO, broken)
    for _ in range(2):
        with pytest.raises(DatastoreCorrupt, match=rf"^{NAME} is damaged: .*{keys_file}"):
            Datastore.open(NAME)
    assert hub.fetched[keys_file] == 1


def test_a_damaged_index_is_refused(hub, store_folder, tmp_path):
    broken = shutil.copytree(store_folder, tmp_path / "broken")
    index_layer(broken, "1.ffn_input", Settings(knn=KNNConfig(index="IVF4,Flat")))
    flip_bit(broken / "index" / "1.ffn_input" / "index.faiss", random.Random(0))
    fill(hub, REPO, broken)
    with pytest.raises(DatastoreCorrupt, match=r"index\.faiss was changed"):
        Datastore.open(NAME)


def test_a_file_that_changed_in_the_cache_is_checked_again(hub, commit, keys_file):
    path = Datastore.open(NAME).folder / keys_file
    flip_bit(path, random.Random(0))
    assert Datastore.open(NAME).verify() == () and hub.fetched[keys_file] == 2


def test_a_stop_between_fetching_and_checking_leaves_nothing_trusted(hub, commit, keys_file, monkeypatch):
    def stopped(store: Datastore) -> tuple[str, ...]:
        raise KeyboardInterrupt

    hub.damage[keys_file] = 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Datastore, "verify", stopped)
        Datastore.open(NAME)
    assert Datastore.open(NAME).verify() == () and hub.fetched[keys_file] == 2


# What cannot be read


@pytest.mark.parametrize(
    "name", ["hf:", "hf:nursing", "hf:ann/nursing@", "hf:ann/nursing:train", "hf:a/b/c", "hf:ann/x y"]
)
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(InputError, match=re.escape(f"{name!r} is no datastore on the hub; write hf:USER/NAME")):
        Datastore.open(name)


def test_what_is_not_there_is_told_in_one_line(hub, commit, store_folder, tmp_path, offline):
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.jsonl").write_text("{}")
    fill(hub, "ann/text", text)
    fill(hub, "ann/secret", store_folder, private=True)
    for name, fact in {
        "hf:ann/nothing": "is not on the hub, or not for everybody",
        "hf:ann/secret": "is not on the hub, or not for everybody",
        "hf:ann/text": "is no datastore, or not all of it was sent: it has no datastore.json",
        f"{NAME}@v9": "is no revision on the hub",
    }.items():
        with pytest.raises(DatastoreError, match=rf"^{name} {fact}; [^\n]*$"):
            Datastore.open(name)
    with (
        offline(),
        pytest.raises(DatastoreError, match=rf"^{NAME} is not on this machine, and the hub was not reached;"),
    ):
        Datastore.open(NAME)


def test_a_datastore_of_a_newer_knnlm_is_refused_before_its_keys_are_fetched(hub, store_folder, tmp_path):
    newer = shutil.copytree(store_folder, tmp_path / "newer")
    manifest = newer / DATASTORE
    manifest.write_text(re.sub(r'"version": \d+', '"version": 99', manifest.read_text()))
    fill(hub, REPO, newer)
    with pytest.raises(DatastoreError, match="newer knnlm"):
        Datastore.open(NAME)
    assert set(hub.fetched) == {DATASTORE}


# The hub's copy is not changed


def test_a_copy_of_the_hub_is_not_changed(commit, tmp_path):
    store = Datastore.open(NAME)
    before = bytes_in(store.folder)
    line = rf"^hf:{REPO}@{commit[:8]} is a copy of what is on the hub, and is not changed; copy it \(docs/share\.md\)$"
    for change in (lambda: store.update_manifest(fitted={}), lambda: index_layer(NAME, store.layers[0])):
        with pytest.raises(DatastoreError, match=line):
            change()
    assert bytes_in(store.folder) == before
    own = Datastore.open(shutil.copytree(store.folder, tmp_path / "own"))
    own.update_manifest(fitted={})
    assert Datastore.open(own.folder).manifest.fitted == {} and bytes_in(store.folder) == before


def test_the_pattern_of_names_begins_with_the_prefix():
    assert HUB_STORE.pattern.startswith(HUB_PREFIX)

"""Where a verb may write: only what a manifest lists is knnlm's, and what is read is never written over."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from knnlm.errors import DatastoreExists, InputError
from knnlm.files import new_folder, write_json
from knnlm.places import (
    TRAINED,
    check_new_file,
    check_new_folder,
    check_scores_file,
    is_ours,
    refuse_existing,
    refuse_inputs,
    work_of,
)
from knnlm.store.writer import DatastoreWriter


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A datastore of two layers, one with an index."""
    folder = tmp_path / "store"
    folder.mkdir()
    with DatastoreWriter(folder, {"0.ffn_input": 4, "final_norm": 4}, fingerprint={}, context=8, stride=4) as writer:
        writer.begin_document(0, "a", 1)
        writer.append_values(np.arange(8))
        for layer in ("0.ffn_input", "final_norm"):
            writer.append_keys(layer, np.ones((8, 4), np.float32))
        writer.finish()
    (folder / "index" / "final_norm").mkdir(parents=True)
    (folder / "index" / "final_norm" / "index.json").write_text("{}")
    write_json(folder / "report.json", {"format": "knnlm-report", "kind": "eval"})
    (folder / "report.html").write_text("a page")
    return folder


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(folder: Path, words: str, manifest: str = "datastore.json") -> None:
    before = everything(folder.parent)
    with pytest.raises(DatastoreExists) as raised:
        with new_folder(folder, overwrite=True, manifest=manifest):
            pytest.fail("the block ran")
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert everything(folder.parent) == before


def test_all_of_a_datastore_is_ours(store: Path) -> None:
    assert is_ours(store)
    with new_folder(store, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in store.parent.rglob("*")] == ["store", "new"]


@pytest.mark.parametrize(
    "name",
    [
        *("notes.txt", ".git/config", "nested/datastore.json", "keys/mine.npy", "frame/mine.npy"),
        *("index/mine", "index/final_norm/mine", "index/.final_norm.partial-mine/x", "empty/", "frame/empty/"),
        *(".datastore.json.partial-7", "parts/mine", "parts/00001-0123abc/values.npy", "parts/00001-0123abcd/mine"),
        "parts/00001-0123abcd/keys/mine.npy",
    ],
)
def test_what_the_manifest_does_not_list_is_kept(store: Path, name: str) -> None:
    mine = store / name
    (mine if name.endswith("/") else mine.parent).mkdir(parents=True, exist_ok=True)
    if not name.endswith("/"):
        mine.write_text("mine")
    assert not is_ours(store)
    refused(store, "which knnlm did not make; move that, or choose another `out`")


def test_first_three_names_are_said(store: Path) -> None:
    (store / ".git").mkdir()
    for name in ("thesis.tex", "notes.txt", "zebra.txt", ".hidden"):
        (store / name).write_text("mine")
    refused(store, "holds notes.txt, thesis.tex, zebra.txt, which knnlm did not make")
    (store / "zebra.txt").unlink()
    refused(store, "holds notes.txt, thesis.tex, .git, which knnlm did not make")


@pytest.mark.parametrize("kind", ["link", "link to a folder", "fifo", "folder"])
def test_what_is_no_regular_file_is_not_ours(store: Path, tmp_path: Path, kind: str) -> None:
    place = store / ("parts" if kind == "link to a folder" else "frame/final_norm.npy")
    place.rename(tmp_path / "elsewhere")
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(tmp_path / "elsewhere")
    refused(store, f"holds {place.relative_to(store)}, which")


def test_leftovers_of_a_killed_process_inside_a_datastore_are_ours(store: Path) -> None:
    (store / ".datastore.json.partial-0123abcd").write_text("{")
    (store / "index" / ".0.ffn_input.partial-0123abcd").mkdir()
    (store / "index" / ".0.ffn_input.partial-0123abcd" / "index.faiss").write_text("half")
    (store / ".knnlm-lock").write_text("")
    for name in ("00001-0123abcd", ".00002-00000000.partial-0123abcd"):
        (store / "parts" / name / "keys").mkdir(parents=True)
        (store / "parts" / name / "keys" / "final_norm.npy").write_text("half")
    with new_folder(store, overwrite=True):
        pass
    assert [path.name for path in store.parent.rglob("*")] == ["store"]


@pytest.mark.parametrize("name", ["report.json", "train.json", "datastore.json"])
def test_one_file_of_ours_does_not_make_a_folder_ours(tmp_path: Path, name: str) -> None:
    """`score --out thesis/report.json`, then `build --out thesis --overwrite`."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    write_json(tmp_path / "thesis" / name, {"format": f"knnlm-{name.split('.')[0]}", "kind": "score"})
    refused(tmp_path / "thesis", "thesis.tex")


@pytest.mark.parametrize(
    "content", ["[" * 4000, '{"layers": ' * 3000, '{"format": "knnlm-datastore", "layers": 3}', "\0"]
)
def test_damaged_manifest_is_of_no_datastore(tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "datastore.json").write_text(content)
    refused(tmp_path / "out", "is no datastore and is kept despite `overwrite=True`: it holds datastore.json")


def test_manifest_that_names_files_elsewhere_removes_none_of_them(store: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    manifest = json.loads((store / "datastore.json").read_text())
    manifest["parts"].append({"name": "../../mine"})
    manifest["layers"] |= {"../../mine": {}, str(tmp_path / "mine"): {}}
    write_json(store / "datastore.json", manifest)
    with new_folder(store, overwrite=True):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "store"]


def test_model_and_datastore_never_take_each_others_place(store: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_text("weights")
    write_json(model / "train.json", {"format": "knnlm-train", "files": ["model.safetensors", "train.json"]})
    assert is_ours(model, TRAINED)
    refused(model, "model is no datastore and is kept despite `overwrite=True`: it holds model.safetensors, train.json")
    refused(store, "store is no model that knnlm trained and is kept", TRAINED)
    with new_folder(model, overwrite=True, manifest=TRAINED):
        pass
    (model / "model.safetensors").write_text("another")
    write_json(model / "train.json", {"format": "knnlm-train", "files": ["train.json"]})
    refused(model, "holds model.safetensors, which knnlm did not make", TRAINED)


def test_overwrite_is_advised_where_it_helps(store: Path) -> None:
    with pytest.raises(DatastoreExists, match=r"choose another `out`, or add `overwrite=True`$"):
        refuse_existing(store)
    (store / "mine").write_text("mine")
    with pytest.raises(DatastoreExists, match=r"choose another `out`$"):
        refuse_existing(store)


# What is read


@pytest.mark.parametrize(
    ("out", "relation"),
    [
        *(("model", "is"), ("a", "holds"), ("model/out", "lies in"), ("model/x/y", "lies in"), ("link", "is")),
        *(("link/out", "lies in"), ("blobs", "holds"), ("model/../model", "is")),
    ],
)
def test_place_of_what_is_read(tmp_path: Path, out: str, relation: str) -> None:
    """`a` is a link to the folder above; a file of the model is a link into `blobs`, as in the hub's cache."""
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("weights")
    (model / "weights").symlink_to("../blobs/1")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "a").symlink_to(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(DatastoreExists, match=rf"`out` .* {relation} .*model, which is read; choose another `out`"):
        with new_folder(tmp_path / out, overwrite=True, inputs=[tmp_path / "link" / ".." / "model"]):
            pytest.fail("the block ran")
    assert everything(tmp_path) == before


def test_place_beside_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a")
    refuse_inputs(
        tmp_path / "text.txt.knn", [tmp_path / "text.txt", "gpt2", "hf:wikitext", "a" * 5000, tmp_path / "no"]
    )
    with pytest.raises(DatastoreExists, match=r"holds .*text\.txt"):
        check_new_folder(tmp_path, overwrite=True, inputs=["gpt2", tmp_path / "text.txt"])
    os.link(tmp_path / "text.txt", tmp_path / "same.txt")
    with pytest.raises(DatastoreExists, match=r"is .*text\.txt, which is read"):
        check_new_file(tmp_path / "same.txt", overwrite=True, inputs=[tmp_path / "text.txt"])


@pytest.mark.parametrize(
    "content", ["mine", '{"format": "knnlm-report", "kind": "eval"}', '{"format": "knnlm-datastore"}']
)
def test_file_that_holds_no_scores_is_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match="holds no scores of knnlm and is not replaced"):
        check_scores_file(tmp_path / "a.json", overwrite=True)
    write_json(tmp_path / "a.json", {"format": "knnlm-report", "kind": "vectors"})
    check_scores_file(tmp_path / "a.json", overwrite=True)


def test_work_is_told_by_all_that_is_given() -> None:
    same = work_of("run", "gpt2", ["a", "b"], None)
    assert same == work_of("run", "gpt2", (Path("a"), "b"), None)
    others = [("build", "gpt2", ["a", "b"], None), ("run", "gpt", ["a", "b"], None), ("run", "gpt2", ["a"], ["b"])]
    assert same not in [work_of(*other) for other in others]


def test_a_copy_of_a_datastore_is_as_much_ours(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    assert is_ours(tmp_path / "copy")

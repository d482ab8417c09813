"""The place of a datastore's model, relative to the datastore."""

from __future__ import annotations

from pathlib import Path

import pytest

from knnlm.store.model_place import absolute_place, relative_place


@pytest.mark.parametrize(
    ("model", "store", "kept"),
    [
        ("models/m", "stores/book.knn", "../../models/m"),
        ("m.gguf", "book.knn", "../m.gguf"),
        ("m", "m/book.knn", ".."),
        ("book.knn/..m", "book.knn", "./..m"),
    ],
)
def test_a_path_is_kept_relative_and_found_after_both_have_moved(
    model: str, store: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    (before / model).mkdir(parents=True)
    (before / store).mkdir(parents=True, exist_ok=True)
    assert relative_place(str(before / model), before / store) == kept
    monkeypatch.chdir(before)
    assert relative_place(model, Path(store)) == kept
    before.rename(after)
    monkeypatch.chdir(tmp_path)
    assert Path(absolute_place(kept, after / store)) == after / model


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "tiny (random)"])
def test_an_id_is_kept_as_it_is(name: str, tmp_path: Path) -> None:
    assert relative_place(name, tmp_path) == absolute_place(name, tmp_path) == name


def test_links_are_followed_to_the_folder_and_not_from_the_model(tmp_path: Path) -> None:
    """A folder reached by a link has another parent, and a file of the hub's cache another name where it leads."""
    (tmp_path / "disk" / "stores" / "book.knn").mkdir(parents=True)
    (tmp_path / "disk" / "blob").write_text("")
    (tmp_path / "disk" / "m.gguf").symlink_to("blob")
    (tmp_path / "link").symlink_to("disk/stores")
    kept = relative_place(str(tmp_path / "disk" / "m.gguf"), tmp_path / "link" / "book.knn")
    assert kept == "../../m.gguf"
    assert absolute_place(kept, tmp_path / "link" / "book.knn") == str(tmp_path / "disk" / "m.gguf")

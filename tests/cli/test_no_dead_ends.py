"""After `build`, every other verb works with nothing else given, wherever store and model have moved together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

WINDOWS = ("--context", 32, "--stride", 16)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what was built once lies."""
    return tmp_path_factory.mktemp("moved") / "kept"


@pytest.fixture
def moved(
    call, kept: Path, gpt2_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with a model and a datastore of it, made in another place, of which nothing is left."""
    if not kept.exists():
        shutil.copytree(gpt2_folder, tmp_path / "before" / "model")
        monkeypatch.chdir(tmp_path / "before")
        built = call("build", "--model", "model", "--text", text_file, "--out", "store", *WINDOWS)
        assert built.status == 0, built.errors
        (tmp_path / "before").rename(kept)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(kept, tmp_path / "after"))


def test_every_verb_works_with_nothing_else_given(call, moved: Path, text_file: Path) -> None:
    store = moved / "store"
    texts = (("generate", "--prompt", "the nurse"), ("explain", "--text", "the nurse counts a pulse"))
    setting = json.loads((store / "datastore.json").read_text())["fitted"]
    (layer,) = setting
    for verb, *given in (*texts, ("eval", "--eval-text", str(text_file), "--eval-tokens", "600"), *texts):
        done = call(verb, store, *given, "--json")
        assert done.status == 0, done.errors
        told = json.loads(done.out)
        if verb != "eval":
            fitted = json.loads((store / "datastore.json").read_text())["fitted"][layer]
            assert {name: told[name] for name in fitted} == fitted
    assert done.errors == ()
    assert json.loads((store / "datastore.json").read_text())["fitted"] != setting


def test_lm_eval_works_with_nothing_else_given(moved: Path) -> None:
    from knnlm.inference.harness import HarnessModel

    model = HarnessModel(store=moved / "store")
    assert str(model.model.name_or_path) == str(moved / "model")


@pytest.mark.parametrize("verb", ["eval", "generate", "explain", "serve"])
def test_a_model_that_is_gone_is_named_with_the_datastore_and_the_option(
    verb: str, call, moved: Path, text_file: Path
) -> None:
    (moved / "model").rename(moved / "elsewhere")
    given = {
        "eval": ("--eval-text", text_file, "--eval-tokens", 600),
        "generate": ("--prompt", "a"),
        "explain": ("--text", "the nurse counts"),
        "serve": ("--port", 0),
    }[verb]
    refused = call(verb, moved / "store", *given)
    assert (refused.status, len(refused.errors)) == (2, 1)
    for words in (f"there is no folder {moved / 'model'};", f"{moved / 'store'} was made with", "give it as --model"):
        assert words in refused.errors[0]
    if verb != "serve":
        assert call(verb, moved / "store", *given, "--model", moved / "elsewhere").status == 0


def test_a_model_that_is_gone_is_named_in_python(moved: Path) -> None:
    from knnlm import KNNLM, ModelError

    (moved / "model").rename(moved / "elsewhere")
    with pytest.raises(ModelError, match=r"no folder .*model; .*store was made with this model: .* give it as `lm`"):
        KNNLM.from_store(moved / "store")

"""Names on the hub, looked up in a cache: models, and adapters whose base is on the hub or in a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from knnlm.errors import ModelError
from knnlm.model.loading import load_model, load_tokenizer, model_file, read_outline
from tests.model.test_sources import IDS, random_adapter
from tests.source_files import ROOT
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

pytest.importorskip("peft")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_in_cache(cache: Path, name: str, folder: Path, revision: str = "main") -> Path:
    """Copy a folder to where the hub's client keeps a revision of a repository; return its place there."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = COMMIT if revision == "main" else COMMIT[::-1]
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return Path(shutil.copytree(folder, repository / "snapshots" / commit))


def name_base(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub in place of the user's."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def adapter(cache, tmp_path):
    """The cache with `ann/base` and its adapter `ann/adapter`; returns the adapted model."""
    save_tiny("llama", tmp_path / "base")
    adapted = random_adapter(tiny_model("llama"), tmp_path / "adapter")
    name_base(tmp_path / "adapter", base_model_name_or_path="ann/base")
    put_in_cache(cache, "ann/base", tmp_path / "base")
    put_in_cache(cache, "ann/adapter", tmp_path / "adapter")
    return adapted


def test_adapter_on_the_hub_is_its_base_with_the_changes(adapter, tmp_path):
    lm = load_model("ann/adapter", device="cpu")
    name_base(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    local = load_model(tmp_path / "adapter", device="cpu")
    with torch.inference_mode():
        torch.testing.assert_close(lm.model(IDS).logits, adapter(IDS).logits, atol=1e-4, rtol=1e-4)
        assert (lm.model(IDS).logits == local.model(IDS).logits).all()
    assert lm.name == "ann/adapter" and lm.fingerprint["config"] == local.fingerprint["config"]
    assert read_outline("ann/adapter").layer_names == lm.layer_names
    assert load_tokenizer("ann/adapter")("the nurse")["input_ids"] == lm.encode("the nurse").tolist()


def test_files_of_an_adapter_are_its_own(adapter):
    # `rank-models` reads files by name: it must not rank the base in the place of its adapter.
    assert model_file("ann/adapter", "config.json") is None
    assert model_file("ann/adapter", "adapter_config.json").is_file()
    assert model_file("ann/base", "config.json").is_file()


def test_adapter_on_the_hub_has_its_own_tokenizer_if_there_is_one(adapter, cache, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "of the adapter"
    tokenizer.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(cache / "models--ann--adapter")
    for base in ("ann/base", str(tmp_path / "base")):
        shutil.rmtree(cache / "models--ann--adapter", ignore_errors=True)
        name_base(tmp_path / "adapter", base_model_name_or_path=base)
        put_in_cache(cache, "ann/adapter", tmp_path / "adapter")
        assert load_model("ann/adapter", device="cpu").tokenizer.chat_template == "of the adapter"


def test_adapter_of_a_revision_of_its_base(adapter, cache, tmp_path):
    other = tiny_model("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    put_in_cache(cache, "ann/base", tmp_path / "other", revision="v2")
    main = load_model("ann/adapter", device="cpu")
    place = cache / "models--ann--adapter" / "snapshots" / COMMIT
    name_base(place, revision="v2")
    weight = load_model("ann/adapter", device="cpu").model.lm_head.weight
    assert not torch.allclose(weight, main.model.lm_head.weight)


def test_adapter_on_the_hub_that_cannot_be_loaded_is_one_line(adapter, cache, tmp_path):
    def refusal() -> str:
        with pytest.raises(ModelError) as caught:
            load_model("ann/adapter", device="cpu")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    place = cache / "models--ann--adapter" / "snapshots" / COMMIT
    name_base(place, base_model_name_or_path="ann/adapter2")
    put_in_cache(cache, "ann/adapter2", tmp_path / "adapter")
    assert "ann/adapter is an adapter of the adapter ann/adapter2; merge that one" in refusal()
    name_base(place, base_model_name_or_path="ann/gone")
    assert refusal() == (
        "ann/gone, the base of the adapter ann/adapter, could not be read as a model: it is not on this machine, and "
        "the hub was not reached; connect, or give a folder"
    )
    (place / "adapter_model.safetensors").unlink()
    assert "ann/adapter is an adapter without adapter_model.safetensors" in refusal()
    (place / "adapter_config.json").write_text("[]")
    assert "names no base model" in refusal()


def test_the_cache_of_the_environment_is_used(adapter, cache):
    """By the command line, in a process of its own, as a user runs it offline."""
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    code = "from knnlm import load_model; print(load_model('ann/adapter', device='cpu').fingerprint['weights'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == load_model("ann/adapter", device="cpu").fingerprint["weights"]

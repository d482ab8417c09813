"""Vectors that another program exported: `transformers` itself, against `build`'s own datastore."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import knnlm
from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.errors import InputError, LayerError
from knnlm.extraction.hidden_states import HiddenStates
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import build, build_from_vectors, evaluate
from knnlm.store import writer as store_writer
from knnlm.store.datastore import Datastore
from knnlm.text.windows import WindowConfig, windows
from knnlm.text.windows import batches as batches_of
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import VOCABULARY, tiny_model, tiny_tokenizer

LAYERS = ("0.block_output", "1.block_output", "final_norm")
SETTINGS = Settings(
    text=TextConfig(context=128, stride=64),
    layers=LayerConfig(layers=",".join(LAYERS), select="1.block_output"),
    knn=KNNConfig(index="exact", max_k=16),
    evaluation=EvalConfig(eval_tokens=200, examples=1),
    key_dtype="float32",
)
SHORT = [text[:120] for text in texts(0, 8)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.from_model(tiny_model("llama"), tiny_tokenizer(), name="tiny")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def export(lm: LanguageModel, text: str) -> dict[str, np.ndarray]:
    """Token ids and hidden states of a document, as `transformers` gives them; of knnlm nothing but the names."""
    ids = lm.tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids.shape[1] <= 128
    with torch.no_grad():
        states = lm.model(ids, output_hidden_states=True).hidden_states
    # The first is the embedding, the last is behind the final norm.
    named = {"0.block_output": states[1], "1.block_output": states[2], "final_norm": states[-1]}
    return {"token_ids": ids[0].numpy(), **{name: one[0].numpy() for name, one in named.items()}}


def save(folder: Path, exported: list[dict[str, np.ndarray]], kind: str = ".npz") -> Path:
    folder.mkdir()
    for number, arrays in enumerate(exported):
        path = folder / f"{number:03d}{kind}"
        if kind == ".npz":
            np.savez_compressed(path, **arrays) if number % 2 else np.savez(path, **arrays)
        else:
            save_file({name: torch.from_numpy(array).contiguous() for name, array in arrays.items()}, path)
    return folder


@pytest.fixture(scope="module")
def exported(lm) -> list[dict[str, np.ndarray]]:
    return [export(lm, text) for text in SHORT]


@pytest.mark.parametrize("kind", [".npz", ".safetensors"])
def test_store_is_that_of_build_and_an_evaluation_of_it_too(lm, exported, kind, tmp_path):
    held_out = [write_jsonl(tmp_path / "held-out.jsonl", texts(1, 3))]
    own = build(
        lm, [write_jsonl(tmp_path / "text.jsonl", SHORT)], tmp_path / "own", settings=SETTINGS, eval_text=held_out
    )
    folder = save(tmp_path / "states", exported, kind)
    store = build_from_vectors(lm, folder, tmp_path / "given", settings=SETTINGS, eval_text=held_out)
    assert store.verify() == () and store.layers == own.layers == LAYERS
    assert np.array_equal(store.values, own.values)
    assert np.array_equal(store.documents[:, :2], own.documents[:, :2])
    for layer in LAYERS:
        ours, theirs = own.keys(layer), store.keys(layer)
        whole = [one.read(0, store.count) + one.centre for one in (ours, theirs)]
        np.testing.assert_allclose(*whole, atol=2e-5)
    assert store.sources == tuple(f"{number:03d}{kind}" for number in range(8)) and store.document_of(0)[1] == 1
    assert store.manifest.fingerprint == own.manifest.fingerprint
    assert store.manifest.scores["choice"]["layer"] == "1.block_output"
    same = [one.manifest.fitted["1.block_output"]["lambda"] for one in (own, store)]
    assert same[0] == pytest.approx(same[1], rel=1e-3)
    one, other = (evaluate(lm, given, held_out, settings=SETTINGS) for given in (own, store))
    for ours, theirs in zip(one.layers, other.layers, strict=True):
        assert ours.layer == theirs.layer and ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-4)


def test_key_is_the_vector_at_t_and_its_value_the_token_after(lm, tmp_path):
    """Vectors that say where they are from: row t of document d is (d, t, 0, …)."""
    dim, lengths, rng = lm.dims["0.ffn_input"], (5, 1, 2, 9000), np.random.default_rng(0)
    tokens, given = [rng.integers(0, VOCABULARY, length) for length in lengths], []
    for number, ids in enumerate(tokens):
        vectors = np.zeros((len(ids), dim), np.float16)
        vectors[:, 0], vectors[:, 1], vectors[:, 2] = number + 1, np.arange(len(ids)) // 100, np.arange(len(ids)) % 100
        given.append({"token_ids": ids.astype(np.uint16), "0.ffn_input": vectors})
    settings = Settings(key_dtype="float32", knn=KNNConfig(index="exact"))
    store = build_from_vectors(lm, save(tmp_path / "states", given), tmp_path / "out", settings=settings)
    keys = store.keys("0.ffn_input")
    found = np.rint(keys.read(0, store.count) + keys.centre)[:, :3].astype(int)
    expected = [(d + 1, t // 100, t % 100, ids[t + 1]) for d, ids in enumerate(tokens) for t in range(len(ids) - 1)]
    assert np.array_equal(np.column_stack([found, store.values]), expected)
    assert store.documents[:, 1].tolist() == [tokens[0][0], tokens[2][0], tokens[3][0]]
    assert store.context(0, 9).tolist() == [tokens[0][0]]


def test_choice_is_among_the_given_layers(lm, exported, tmp_path):
    folder = save(tmp_path / "states", exported)
    free = Settings(knn=KNNConfig(index="exact"))
    store = build_from_vectors(lm, folder, tmp_path / "out", settings=free)
    assert store.layers == LAYERS and store.manifest.scores["choice"]["layer"] in LAYERS
    dispersion = {one["layer"]: one["dispersion"] for one in store.manifest.scores["layers"]}
    for layer in LAYERS:
        rows = np.concatenate([one[layer][:-1] for one in exported]).astype(np.float64)
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosines = unit @ unit.T
        own = 1 - cosines[np.triu_indices(len(rows), 1)].mean()
        assert dispersion[layer] == pytest.approx(own, rel=1e-3)
    # Without the head's vectors there is no pilot, and the choice goes without it.
    some = [{name: array for name, array in one.items() if name != "final_norm"} for one in exported]
    named = Settings(layers=LayerConfig(layers="*.block_output"), knn=KNNConfig(index="exact"))
    chosen = build_from_vectors(lm, save(tmp_path / "some", some), tmp_path / "out2", settings=named)
    assert chosen.layers == LAYERS[:2] and chosen.manifest.scores["choice"]["layer"] in LAYERS[:2]
    with pytest.raises(LayerError, match="no layer fits"):
        build_from_vectors(lm, folder, tmp_path / "out3", settings=Settings(layers=LayerConfig(layers="0.ffn_input")))


def test_a_bound_of_memory_that_cannot_be_kept_is_told_before_any_work(lm, exported, tmp_path):
    folder = save(tmp_path / "states", exported)
    with pytest.raises(InputError, match=r"`memory` is 0\.0 GB, but the model and libraries take"):
        build_from_vectors(lm, folder, tmp_path / "out", settings=Settings(memory=1e6))
    assert [path.name for path in tmp_path.iterdir()] == ["states"]


def test_bfloat16_and_folders_inside(lm, exported, tmp_path):
    (tmp_path / "states" / "b").mkdir(parents=True)
    for name, arrays in (("b/1.safetensors", exported[0]), ("a.safetensors", exported[1])):
        tensors = {layer: torch.from_numpy(arrays[layer]).bfloat16().contiguous() for layer in LAYERS}
        save_file({"token_ids": torch.from_numpy(arrays["token_ids"]), **tensors}, tmp_path / "states" / name)
    store = build_from_vectors(
        lm, tmp_path / "states", tmp_path / "out", settings=Settings(knn=KNNConfig(index="exact"))
    )
    assert store.sources == ("a.safetensors", "b/1.safetensors")
    keys = store.keys("final_norm")
    expected = torch.from_numpy(exported[1]["final_norm"]).bfloat16().float().numpy()[:-1]
    np.testing.assert_allclose(keys.read(0, len(expected)) + keys.centre, expected, atol=5e-3)


class Killed(BaseException):
    """Nothing is done after it."""


def test_killed_it_goes_on_to_the_same_bytes(lm, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "PART_ROWS", 200)
    folder = save(tmp_path / "states", exported)
    whole = build_from_vectors(lm, folder, tmp_path / "whole", settings=SETTINGS)
    assert len(whole.manifest.parts) > 2
    append, made = store_writer.DatastoreWriter.append_values, []

    def counted(self, tokens):
        made.append(len(tokens))
        if len(made) == 6:
            raise Killed
        append(self, tokens)

    monkeypatch.setattr(store_writer.DatastoreWriter, "append_values", counted)
    with pytest.raises(Killed):
        build_from_vectors(lm, folder, tmp_path / "out", settings=SETTINGS)
    store = build_from_vectors(lm, folder, tmp_path / "out", settings=SETTINGS)
    assert [one.checksum for one in store.manifest.parts] == [one.checksum for one in whole.manifest.parts]
    assert store.manifest.scores["layers"] == whole.manifest.scores["layers"]


# What does not fit


def bad(lm, name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    changed = dict(arrays)
    length, dim = changed["final_norm"].shape
    if name == "nan":
        changed["0.block_output"] = changed["0.block_output"].copy()
        changed["0.block_output"][3, 2] = np.nan
    elif name == "missing":
        del changed["0.block_output"]
    elif name == "more":
        changed["0.ffn_input"] = changed["0.block_output"].copy()
    elif name == "unknown":
        changed["99.block_output"] = changed["0.block_output"].copy()
    elif name == "length":
        changed["0.block_output"] = changed["0.block_output"][:-1]
    elif name == "dimension":
        changed["0.block_output"] = np.zeros((length, dim + 1), np.float32)
    elif name == "integers":
        changed["0.block_output"] = np.zeros((length, dim), np.int64)
    elif name == "no tokens":
        del changed["token_ids"]
    elif name == "float tokens":
        changed["token_ids"] = changed["token_ids"].astype(np.float32)
    elif name == "batch":
        changed["token_ids"] = changed["token_ids"][None]
    elif name == "vocabulary":
        changed["token_ids"] = changed["token_ids"].copy()
        changed["token_ids"][4] = lm.vocabulary
    elif name == "negative":
        changed["token_ids"] = changed["token_ids"].copy()
        changed["token_ids"][1] = -1
    return changed


@pytest.mark.parametrize("kind", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nan", r"0.block_output has NaN or infinity at token 3; "),
        ("missing", r"has no array 0.block_output; it has "),
        ("more", r"has 0.ffn_input, which 000\.\w+ has not; "),
        ("unknown", r"has 99.block_output, but no layer of tiny; there are 0-"),
        ("length", r"0.block_output is \S+ \[\d+, \d+\], but must be floating-point \[\d+, \d+\]"),
        ("dimension", r"0.block_output is \S+ \[\d+, \d+\], but must be floating-point \[\d+, \d+\]"),
        ("integers", r"0.block_output is \S+ \[\d+, \d+\], but must be floating-point"),
        ("no tokens", r"has no array token_ids; it has "),
        ("float tokens", r"token_ids is \S+ \[\d+\], but must be whole numbers \[T\]"),
        ("batch", r"token_ids is \S+ \[1, \d+\], but must be whole numbers \[T\]"),
        ("vocabulary", rf"token_ids has {VOCABULARY} at token 4, but tiny has 0 to {VOCABULARY - 1}; "),
        ("negative", r"token_ids has -1 at token 1, but tiny has 0 to"),
    ],
)
def test_one_line_names_file_and_place(lm, exported, name, words, kind, tmp_path):
    assert lm.vocabulary == VOCABULARY
    folder = save(tmp_path / "states", [exported[0], bad(lm, name, exported[1]), exported[2]], kind)
    with pytest.raises(InputError, match=words) as found:
        build_from_vectors(lm, folder, tmp_path / "out", settings=SETTINGS)
    assert f"001{kind}" in str(found.value) and "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()


def test_damaged_and_pickled_files_are_told(lm, exported, tmp_path):
    folder = save(tmp_path / "states", exported[:2])
    data = (folder / "001.npz").read_bytes()
    for name, content in (("cut", data[:-100]), ("text", b"hello"), ("empty", b"")):
        (folder / "001.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"001.npz cannot be read \(.*\); write it again"):
            build_from_vectors(lm, folder, tmp_path / name, settings=SETTINGS)
    objects = {**exported[0], "final_norm": np.array([{}, []], object)}
    np.savez(folder / "001.npz", **objects)
    with pytest.raises(InputError, match="holds Python objects, which are not unpickled"):
        build_from_vectors(lm, folder, tmp_path / "out", settings=SETTINGS)
    (folder / "001.npz").unlink()
    (folder / "x.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(InputError, match=r"x.safetensors cannot be read"):
        build_from_vectors(lm, folder, tmp_path / "out", settings=SETTINGS)
    with pytest.raises(InputError, match=r"has no .npz or .safetensors files"):
        build_from_vectors(lm, tmp_path / "nowhere", tmp_path / "out", settings=SETTINGS)
    with pytest.raises(InputError, match="`max_tokens`"):
        build_from_vectors(lm, folder, tmp_path / "out", settings=Settings(text=TextConfig(max_tokens=9)))
    only = save(tmp_path / "only", [{"token_ids": np.arange(4)}])
    with pytest.raises(InputError, match="has token_ids only"):
        build_from_vectors(lm, only, tmp_path / "out", settings=SETTINGS)
    assert zipfile.is_zipfile(only / "000.npz")


@pytest.mark.parametrize("kind", [".npz", ".safetensors"])
def test_a_file_that_is_gone_when_its_vectors_are_read_is_told(lm, exported, kind, tmp_path):
    folder = save(tmp_path / "states", exported[:2], kind)
    given = HiddenStates(folder, lm)
    batches = list(batches_of(windows(given.documents(), WindowConfig(64, 64)), 64))
    (folder / f"001{kind}").unlink()
    with pytest.raises(InputError, match=rf"001{kind} cannot be read \(.*\); write it again") as found:
        for batch in batches:
            given.give(batch, LAYERS, lambda *_: None)
    assert "\n" not in str(found.value)


def test_command_line(call, gpt2_folder, text_file, tmp_path):
    model = knnlm.load_model(gpt2_folder)
    given = []
    for text in texts(0, 6):
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"][:, :100]
        with torch.no_grad():
            states = model.model(ids, output_hidden_states=True).hidden_states
        given.append({"token_ids": ids[0].numpy(), "0.block_output": states[1][0].numpy()})
    folder = save(tmp_path / "states", given)
    ended = call(
        "build", "--model", gpt2_folder, "--hidden-states", folder, "--out", tmp_path / "out", "--index", "exact"
    )
    assert ended.status == 0, ended.errors
    assert Datastore.open(tmp_path / "out").count == sum(len(one["token_ids"]) - 1 for one in given)
    assert any("--eval-text" in line and "knnlm eval" in line for line in ended.errors)
    options = ("build", "--model", gpt2_folder, "--out", tmp_path / "no")
    for more, words in (
        ((), "--text, --hidden-states"),
        (("--text", text_file, "--hidden-states", folder), "--text, --hidden-states"),
        (("--hidden-states", folder, "--frame", tmp_path / "out"), "--frame"),
        (("--hidden-states", tmp_path / "nowhere"), "is no folder"),
    ):
        refused = call(*options, *more)
        assert refused.status == 2 and words in " ".join(refused.errors)

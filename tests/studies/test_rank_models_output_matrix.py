"""Rows of the output matrix against the loaded model's own; damaged and foreign checkpoints; what is read of a file."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from knnlm.errors import InputError, ModelError
from knnlm.studies.rank_models.output_matrix import OutputMatrix, find_output_matrix
from tests.tiny_models import KINDS, VOCABULARY, WIDTH, save_tiny, tiny_model

TOKENS = [0, 5, 287, 5, 100]


def head_of(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.get_output_embeddings().weight.detach().double().numpy()


def rewrite(folder: Path, change) -> Path:
    """Load the tensors of a model folder, let `change` edit them, and write them back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **fields) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in {**config, **fields}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write(folder: Path, tensors: dict[str, tuple[int, ...]], **config) -> Path:
    """A checkpoint of zeros with tensors of these shapes."""
    folder.mkdir()
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "llama")


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return save_tiny("gpt2", tmp_path / "gpt2")


# The right rows


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    found = find_output_matrix(tmp_path)
    expected = model.get_output_embeddings().weight.detach().double().numpy()
    assert found.shape == expected.shape
    assert found.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert np.array_equal(found.rows(TOKENS), expected[TOKENS])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_types(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model(kind).to(dtype).save_pretrained(tmp_path)
    rows = find_output_matrix(tmp_path).rows(TOKENS)
    assert rows.dtype == np.float64
    assert np.array_equal(rows, head_of(tmp_path)[TOKENS])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt-neox", "opt"])
def test_shards(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert np.array_equal(find_output_matrix(tmp_path).rows(TOKENS), head_of(tmp_path)[TOKENS])


@pytest.mark.parametrize("tied", [True, False])
def test_configuration_says_whether_llama_is_tied(tied: bool, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tie_word_embeddings=tied)
    found = find_output_matrix(tmp_path)
    assert (found.tied, found.tensor) == (tied, "model.embed_tokens.weight" if tied else "lm_head.weight")
    assert np.array_equal(found.rows(TOKENS), head_of(tmp_path)[TOKENS])


def test_stored_head_counts_even_where_the_configuration_says_tied(llama: Path) -> None:
    # transformers 5 does not tie two tensors that differ.
    edit_config(llama, tie_word_embeddings=True)
    found = find_output_matrix(llama)
    assert not found.tied
    assert np.array_equal(found.rows(TOKENS), head_of(llama)[TOKENS])


@pytest.mark.parametrize("says", [True, None])
def test_without_a_head_the_input_embeddings_serve(says: bool | None, llama: Path) -> None:
    edit_config(rewrite(llama, lambda tensors: tensors.pop("lm_head.weight")), tie_word_embeddings=says)
    assert find_output_matrix(llama).tensor == "model.embed_tokens.weight"


def test_fields_of_the_text_part_count(tmp_path: Path) -> None:
    shapes = {"language_model.model.embed_tokens.weight": (9, 4), "vision.embed_tokens.weight": (7, 4)}
    folder = write(tmp_path / "m", shapes, text_config={"vocab_size": 9, "tie_word_embeddings": True})
    assert find_output_matrix(folder).shape == (9, 4)


def test_matrix_of_another_height_is_not_the_head(tmp_path: Path) -> None:
    # `output` ends many names.
    shapes = {"layers.0.attention.output.weight": (4, 4), "output.weight": (9, 4), "tok_embeddings.weight": (9, 4)}
    assert find_output_matrix(write(tmp_path / "m", shapes, vocab_size=9)).tensor == "output.weight"


# Nothing else is read


def test_only_the_rows_are_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_output_matrix(llama)
    places = []

    class Counting(io.FileIO):
        def readinto(self, buffer):
            places.append((self.tell(), len(memoryview(buffer).cast("B"))))
            return super().readinto(buffer)

        read = readall = None

    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Counting(path))
    found.rows([7, 3])
    row = 4 * WIDTH
    assert places == [(found.offset + 7 * row, row), (found.offset + 3 * row, row)]


def test_a_matrix_of_gigabytes_costs_its_rows(tmp_path: Path) -> None:
    # A file with a hole: 100 GB that no disk here holds and no memory.
    shape = (200_000, 262_144)
    entry = {"dtype": "F16", "shape": shape, "data_offsets": [0, 2 * shape[0] * shape[1]]}
    header = json.dumps({"lm_head.weight": entry}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + entry["data_offsets"][1])
        file.seek(-2, io.SEEK_END)
        file.write(np.float16(3).tobytes())
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": shape[0]}))
    rows = find_output_matrix(tmp_path).rows([5, shape[0] - 1])
    assert rows.shape == (2, shape[1]) and rows.sum() == 3


# What cannot be read


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_output_matrix(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_token_out_of_range(token: int, gpt2: Path) -> None:
    with pytest.raises(InputError, match=f"token {token} is none of the 288 of .*gpt2; take ids from 0 to 287"):
        find_output_matrix(gpt2).rows([0, token])


def test_pickles_are_never_read(gpt2: Path) -> None:
    (gpt2 / "model.safetensors").unlink()
    # Whoever unpickled this would fail the test.
    (gpt2 / "pytorch_model.bin").write_bytes(b"cbuiltins\nexit\n(S'unpickled'\ntR.")
    refused(gpt2, "has no model.safetensors", ".bin files are pickles", "save_pretrained")


def test_no_known_name(tmp_path: Path) -> None:
    shapes = {"strange.table.weight": (9, 4), "block.weight": (4, 4), "norm": (4,)}
    refused(
        write(tmp_path / "m", shapes, vocab_size=9), "no tensor that is known", "of 9 tokens", "strange.table.weight"
    )
    refused(write(tmp_path / "n", {"norm": (4,)}), "of ? tokens", "no matrix at all")


def test_untied_model_without_its_head(llama: Path) -> None:
    # transformers would draw one at random.
    rewrite(llama, lambda tensors: tensors.pop("lm_head.weight"))
    refused(llama, "no tensor that is known", "model.embed_tokens.weight [288, 32]")


def test_two_tensors_that_could_be_it(tmp_path: Path) -> None:
    shapes = {"encoder.embed_tokens.weight": (9, 4), "decoder.embed_tokens.weight": (9, 4)}
    refused(write(tmp_path / "m", shapes, vocab_size=9), "or several", "encoder.embed_tokens", "decoder.embed_tokens")


def test_type_without_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write(folder, {}, vocab_size=9)
    save_file({"lm_head.weight": torch.zeros(9, 4, dtype=torch.int8)}, folder / "model.safetensors")
    refused(folder, "lm_head.weight", "stored as I8", "F64, F32, F16, BF16")


def test_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "is an adapter", "merge_and_unload")


def test_no_model(tmp_path: Path) -> None:
    refused(tmp_path, "is not a model", "config.json")
    refused(tmp_path / "gone", "there is no folder")
    refused(Path("no-such/model"), "no-such/model has no config.json on the hub", "check the name")


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_damaged_configuration(content: str, gpt2: Path) -> None:
    (gpt2 / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(gpt2, "config.json", "JSON", "save or download")


@pytest.mark.parametrize("length", [0, 4, 8, 500, 40_000])
def test_short_file(length: int, gpt2: Path) -> None:
    whole = (gpt2 / "model.safetensors").read_bytes()
    (gpt2 / "model.safetensors").write_bytes(whole[:length])
    refused(gpt2, "is not a whole safetensors file", "save or download")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"not JSON", "its header is not JSON"),
        (b"[1]", "no JSON object"),
        (b'{"lm_head.weight": 3}', "lm_head.weight is not described"),
        (b'{"lm_head.weight": {"dtype": "F32", "shape": [9, 4], "data_offsets": [0, 9]}}', "said to have 9 bytes"),
        (b'{"lm_head.weight": {"dtype": "F32", "shape": [9, 4], "data_offsets": [0, 144]}}', "ends at byte"),
        (b'{"lm_head.weight": {"dtype": "F32", "shape": [9, "x"], "data_offsets": [0, 144]}}', "is not described"),
    ],
)
def test_header_of_garbage(header: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(tmp_path, words, "not a whole safetensors file")


def test_shard_that_is_missing(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path, max_shard_size="60KB")
    Path(tmp_path, find_output_matrix(tmp_path).file.name).unlink()
    refused(tmp_path, "which its index names")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {"a": 3}}', "garbage"])
def test_index_of_garbage(index: str, gpt2: Path) -> None:
    (gpt2 / "model.safetensors").unlink()
    (gpt2 / "model.safetensors.index.json").write_text(index)
    refused(gpt2, "model.safetensors.index.json", "save or download")


def test_file_cut_after_it_was_found(gpt2: Path) -> None:
    found = find_output_matrix(gpt2)
    assert isinstance(found, OutputMatrix)
    found.file.write_bytes(found.file.read_bytes()[: found.offset + 4])
    with pytest.raises(ModelError, match=r"it ends inside transformer\.wte\.weight"):
        found.rows([0])

"""Models that are no plain folder: LoRA adapters, GGUF files, formats that are not read, the hub out of reach."""

from __future__ import annotations

import importlib.util
import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from knnlm.errors import ModelError
from knnlm.model import sources
from knnlm.model.adapters import add_lora
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model, read_outline
from tests.damage import flip_bit
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer
from tests.tokenizers_of_all_kinds import letters

IDS = torch.tensor([[5, 17, 200, 3, 44]])


def random_adapter(model, folder):
    """An adapter as peft saves it, of which no weight is zero; returns the adapted model."""
    adapted = add_lora(model, 2, 0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    adapted.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(folder.parent / "base")}))
    return adapted.eval()


@pytest.fixture
def adapter(tmp_path):
    pytest.importorskip("peft")
    save_tiny("llama", tmp_path / "base")
    return random_adapter(tiny_model("llama"), tmp_path / "adapter")


def test_adapter_is_its_base_with_the_changes(adapter, tmp_path):
    lm = load_model(tmp_path / "adapter", dtype="float32", device="cpu")
    with torch.inference_mode():
        expected = adapter(IDS).logits
        torch.testing.assert_close(lm.model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
        assert (tiny_model("llama")(IDS).logits - expected).abs().max() > 0.01
    base = load_model(tmp_path / "base", dtype="float32", device="cpu")
    assert lm.layer_names == base.layer_names == read_outline(tmp_path / "adapter").layer_names
    assert lm.name == str(tmp_path / "adapter") and lm.encode("the nurse").tolist() == base.encode("the nurse").tolist()


def test_every_change_of_an_adapter_changes_the_fingerprint(adapter, tmp_path):
    def weights(folder):
        return load_model(tmp_path / folder, device="cpu").fingerprint["weights"]

    before, file = weights("adapter"), tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] += 1e-6
    save_file(tensors, file, metadata={"format": "pt"})
    assert len({weights("base"), before, weights("adapter")}) == 3


def test_adapter_that_cannot_be_loaded_is_one_line(adapter, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"

    def refusal():
        with pytest.raises(ModelError) as caught:
            load_model(folder, device="cpu")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "find_spec", lambda name: None)
        assert "needs peft, which is not installed; pip install '.[train]'" in refusal()
    save_tiny("llama", tmp_path / "base", hidden_size=16)
    assert "could not be loaded as an adapter of its base" in refusal()
    (tmp_path / "base").rename(tmp_path / "gone")
    assert f"is an adapter of {tmp_path / 'base'}: there is no folder" in refusal()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "is an adapter without adapter_model.safetensors" in refusal()
    for text in ("[", "[]", "{}", '{"base_model_name_or_path": null}'):
        (folder / "adapter_config.json").write_text(text)
        assert "names no base model" in refusal()


# GGUF


def write_gguf(path, model, tokenizer):
    """A Llama as llama.cpp's converter writes it: other names, and q and k in the order of interleaved rotations."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer.get_vocab()
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([1] * (len(vocabulary) - 1) + [3])
    writer.add_token_merges([" ".join(pair) for pair in rules["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    inner |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    inner |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, tensor in model.state_dict().items():
        bare, array = name.removesuffix(".weight"), tensor.numpy().astype(np.float32)
        if (count := heads.get(bare.rpartition(".")[2])) is not None:
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        new = outer.get(bare) or "blk.{}.{}".format(bare.split(".")[2], inner[bare.split(".", 3)[3]])
        writer.add_tensor(f"{new}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_is_the_model_that_it_was_made_of(tmp_path, capsys):
    pytest.importorskip("gguf")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    write_gguf(tmp_path / "a.gguf", model, tokenizer)
    lm = load_model(tmp_path / "a.gguf", device="cpu")
    with torch.inference_mode():
        torch.testing.assert_close(lm.model(IDS).logits, model(IDS).logits)
    assert lm.encode("the nurse's ward").tolist() == tokenizer("the nurse's ward")["input_ids"]
    assert (lm.context_limit, lm.name, lm.dtype) == (128, str(tmp_path / "a.gguf"), torch.float32)
    assert read_outline(tmp_path / "a.gguf").layer_names == lm.layer_names
    assert "Converting" not in capsys.readouterr().err


def test_gguf_file_is_parsed_once(tmp_path, monkeypatch):
    """transformers alone does it four times, seconds each with a real vocabulary."""
    gguf = pytest.importorskip("gguf")
    write_gguf(tmp_path / "a.gguf", tiny_model("llama"), tiny_tokenizer())
    parsed = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path):
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    names = gguf.get_tensor_name_map
    load_model(tmp_path / "a.gguf", device="cpu")
    assert len(parsed) == 1
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (Counted, names)


def test_flipped_bit_of_a_gguf_file_is_one_line_or_a_model(tmp_path, capsys):
    pytest.importorskip("gguf")
    path, rng, seen = tmp_path / "a.gguf", random.Random(0), set()
    write_gguf(path, tiny_model("llama"), tiny_tokenizer())
    whole = path.read_bytes()
    for number in range(24):
        path.write_bytes(whole)
        flip_bit(path, rng, within=(600, 12_000, None)[number % 3])
        try:
            seen.add(type(load_model(path, device="cpu")))
        except ModelError as error:
            seen.add(type(error))
            assert "\n" not in str(error) and str(path) in str(error)
    assert seen == {LanguageModel, ModelError} and capsys.readouterr().out == ""


def test_gguf_file_has_the_fingerprint_of_its_model_whatever_its_name(tmp_path):
    pytest.importorskip("gguf")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    write_gguf(tmp_path / "a.gguf", model, tokenizer)
    parts = {key: value for key, value in load_model(tmp_path / "a.gguf").fingerprint.items() if key != "model"}
    (tmp_path / "a.gguf").rename(tmp_path / "b.gguf")
    assert load_model(tmp_path / "b.gguf").fingerprint == {"model": str(tmp_path / "b.gguf"), **parts}
    assert parts["weights"] == load_model(save_tiny("llama", tmp_path / "folder")).fingerprint["weights"]


@pytest.mark.parametrize(("file_type", "dtype"), [(0, torch.float32), (1, torch.float32), (3, torch.bfloat16)])
def test_quantized_gguf_file_is_computed_in_bfloat16_where_that_is_fast(file_type, dtype, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr("knnlm.model.hardware.bfloat16_speed", lambda: 2.0)
    monkeypatch.setattr(gguf.GGUFWriter, "add_vocab_size", lambda self, _: self.add_file_type(file_type))
    write_gguf(tmp_path / "a.gguf", tiny_model("llama"), tiny_tokenizer())
    assert load_model(tmp_path / "a.gguf", device="cpu").dtype == dtype


def test_gguf_file_without_its_library_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"is a GGUF file, .* needs gguf, .* pip install '\.\[gguf\]'"):
        load_model(tmp_path / "a.gguf")


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
def test_damaged_gguf_file_is_one_line(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(ModelError, match=r"a\.gguf could not be read as a model") as caught:
        load_model(tmp_path / "a.gguf")
    assert "\n" not in str(caught.value)


# Formats that are not read, and the hub


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tf_model.h5", "model.onnx", "last.ckpt"])
@pytest.mark.parametrize("has_config", [True, False])
def test_folder_of_an_unknown_format_says_which_are_known(name, has_config, tmp_path):
    if has_config:
        tiny_model("llama").config.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"cbuiltins\nexit\n(S'unpickled'\ntR.")
    known = (
        r"give a folder made by save_pretrained \(config.json and .safetensors\), a LoRA adapter's folder, or a .gguf"
    )
    with pytest.raises(ModelError, match=f"only {name}; {known}"):
        load_model(tmp_path)


def test_name_on_the_hub_out_of_reach_is_one_short_line(monkeypatch, tmp_path, caplog):
    from transformers import AutoConfig

    def refuse(*args, **options):
        raise OSError(
            "We couldn't connect to 'https://x' to load the files, and\nmore.\nCheck your connection at 'https://y'."
        )

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ModelError) as caught:
        load_model("gpt2")
    assert str(caught.value) == (
        "gpt2 could not be read as a model: it is not on this machine, and the hub was not reached; "
        "connect, or give a folder"
    )


def test_model_of_dna_has_a_tokenizer(tmp_path):
    tiny_model("llama", vocab_size=8).save_pretrained(tmp_path)
    letters("ACGTN").save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").encode("GATTACA").tolist() == [5, 3, 6, 6, 3, 4, 3]


@pytest.mark.parametrize("name", ["", " "])
def test_empty_name_is_not_the_folder_of_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(save_tiny("llama", tmp_path))
    with pytest.raises(ModelError, match="the name of the model is empty"):
        load_model(name)

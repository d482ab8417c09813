"""The language model against `transformers` itself: logits, loss, tokens; loading, and what cannot be loaded."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from knnlm.errors import InputError, LayerError, ModelError
from knnlm.layer_names import FINAL
from knnlm.model import encoding, hardware
from knnlm.model import lm as lm_module
from knnlm.model.decoder import find_decoder
from knnlm.model.fingerprint import digest_tokenizer
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from tests.tiny_models import CONTEXT, KINDS, save_tiny, tiny_bert, tiny_model, tiny_t5, tiny_tokenizer

TOKENS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(2))


def wrap(kind, **overrides):
    return LanguageModel.from_model(tiny_model(kind, **overrides), tiny_tokenizer(), name=kind)


def read(lm, tokens, layers, **options):
    vectors = {}
    lm.forward(tokens, layers, lambda name, v: vectors.__setitem__(name, v.clone()), **options)
    return vectors


def target_log_probs(lm, tokens):
    final = read(lm, tokens, [FINAL])[FINAL][:, :-1]
    return lm.target_log_probs(final.flatten(0, 1), tokens[:, 1:].flatten())


# Forward passes


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_early_changes_no_vector_and_runs_no_block_above(kind):
    lm = wrap(kind)
    layers = [name for name in lm.layer_names if name[0] in "01"]
    decoder, ran = find_decoder(lm.model), []
    full = read(lm, TOKENS, layers, stop_early=False)
    upper = [name for name in lm.layer_names if name not in layers]
    with decoder.attach(upper, lambda name, vectors: ran.append(name)):
        early = read(lm, TOKENS, layers)
    assert ran == []
    assert set(early) == set(full) == set(layers)
    assert all(torch.equal(early[name], full[name]) for name in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_stopping_leave_the_vectors_of_each_text_alone(kind):
    lm = wrap(kind)
    lengths = torch.tensor([24, 9, 15])
    padded = TOKENS.clone()
    padded[1, 9:] = 7
    padded[2, 15:] = 0
    vectors = read(lm, padded, lm.layer_names)
    assert set(vectors) == set(lm.layer_names)
    for row, length in enumerate(lengths.tolist()):
        alone = read(lm, TOKENS[row : row + 1, :length], lm.layer_names)
        for name in lm.layer_names:
            torch.testing.assert_close(vectors[name][row, :length], alone[name][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop_early", [True, False])
def test_head_is_not_run(stop_early):
    lm, calls = wrap("llama"), []
    lm.model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    read(lm, TOKENS, [FINAL, "0.ffn_input"], stop_early=stop_early)
    read(lm, TOKENS, ["1.ffn_input"], stop_early=stop_early)
    assert calls == []
    lm.model(TOKENS)
    assert calls == ["head"]


def test_no_cache_is_built():
    lm, caches = wrap("llama"), []
    lm.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(kwargs["past_key_values"]), with_kwargs=True
    )
    read(lm, TOKENS, [FINAL])
    assert caches == [None]


def test_error_of_the_receiver_passes_and_leaves_no_hook():
    lm = wrap("gpt2")

    def fail(name, vectors):
        raise MemoryError("in the receiver")

    with pytest.raises(MemoryError, match="in the receiver"):
        lm.forward(TOKENS, ["1.ffn_input"], fail)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[1, 288]]), "token 288 is none of the 288 of gpt2"),
        (torch.tensor([[-1, 2]]), "token -1 is none of the 288 of gpt2"),
        (
            torch.zeros(1, CONTEXT + 1, dtype=torch.int64),
            f"{CONTEXT + 1} tokens, but gpt2 takes at most {CONTEXT} at once",
        ),
        (torch.zeros(1, 0, dtype=torch.int64), r"no tokens in a batch of shape \(1, 0\)"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tokens, message):
    with pytest.raises(InputError, match=message):
        read(wrap("gpt2"), tokens, [FINAL])


def test_unknown_layer_is_refused_before_the_model_runs():
    lm, runs = wrap("gpt2"), []
    lm.model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(LayerError, match=r"no layer '3\.ffn_input'; it has 0-2\.attn_input"):
        read(lm, TOKENS, ["3.ffn_input"])
    assert runs == []


# Probabilities


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_that_of_transformers(kind):
    lm = wrap(kind)
    with torch.inference_mode():
        # `loss` is the mean over the targets of all rows: one row each keeps their weights equal.
        loss = np.mean([lm.model(row[None], labels=row[None]).loss.item() for row in TOKENS])
    found = target_log_probs(lm, TOKENS)
    assert found.dtype == torch.float64
    assert math.exp(-found.mean().item()) == pytest.approx(math.exp(loss), rel=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "cohere", "granite", "opt-post-norm"])
def test_target_log_probs_in_chunks_equal_a_float64_log_softmax(kind, monkeypatch):
    lm = wrap(kind)
    monkeypatch.setattr(lm_module, "_HEAD_SCORES", 5 * lm.vocabulary)
    with torch.inference_mode():
        logits = lm.model(TOKENS).logits[:, :-1].double()
    expected = torch.log_softmax(logits, dim=-1)
    targets = TOKENS[:, 1:, None]
    torch.testing.assert_close(
        target_log_probs(lm, TOKENS), expected.gather(-1, targets).flatten(), rtol=1e-6, atol=1e-6
    )
    final = read(lm, TOKENS, [FINAL])[FINAL][:, :-1].flatten(0, 1)
    table = lm.log_probs(final)
    assert table.dtype == torch.float32 and table.shape == (3 * 23, lm.vocabulary)
    torch.testing.assert_close(table.double(), expected.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_head_never_sees_more_rows_than_the_chunk(monkeypatch):
    lm, rows = wrap("gpt2"), []
    monkeypatch.setattr(lm_module, "_HEAD_SCORES", 5 * lm.vocabulary + 1)
    lm.model.lm_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    lm.target_log_probs(torch.zeros(12, 32), torch.zeros(12, dtype=torch.int64))
    assert rows == [5, 5, 2]


def test_vectors_stored_in_half_precision_are_accepted():
    lm = wrap("llama")
    final = read(lm, TOKENS, [FINAL])[FINAL][0]
    half = lm.target_log_probs(final.half(), TOKENS[0])
    torch.testing.assert_close(half, lm.target_log_probs(final, TOKENS[0]), rtol=1e-2, atol=1e-2)


def test_no_rows_give_no_log_probs():
    assert wrap("llama").target_log_probs(torch.zeros(0, 32), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_very_large_scores_stay_exact():
    lm = wrap("llama")
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(1e4)
        logits = lm.model(TOKENS).logits[:, :-1].double()
    expected = torch.log_softmax(logits, dim=-1).gather(-1, TOKENS[:, 1:, None]).flatten()
    torch.testing.assert_close(target_log_probs(lm, TOKENS), expected, rtol=1e-6, atol=1e-2)


def test_head_that_does_more_is_refused():
    class Squared(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits**2
            return output

    model = Squared(tiny_model("llama").config).eval()
    with pytest.raises(ModelError, match="the LM head of Squared is not understood"):
        LanguageModel.from_model(model, tiny_tokenizer(), name="squared")


def test_scaling_of_an_unused_configuration_field_is_not_applied():
    # MPT has a field `logit_scale` that its code in transformers does not read.
    lm = wrap("llama", logit_scale=3.0)
    final = read(lm, TOKENS, [FINAL])[FINAL]
    with torch.inference_mode():
        torch.testing.assert_close(lm.log_probs(final), torch.log_softmax(lm.model(TOKENS).logits, dim=-1))


# What the probe at load finds


def test_facts_about_the_model():
    lm = wrap("opt-post-norm")
    assert lm.layer_names[0] == "0.attn_input" and lm.layer_names[-1] == FINAL
    assert lm.dims["1.ffn_input"] == 32 and lm.dims[FINAL] == 16 and tuple(lm.dims) == lm.layer_names
    assert (lm.vocabulary, lm.context_limit, lm.name, lm.notes) == (288, CONTEXT, "opt-post-norm", ())
    assert lm.dtype == torch.float32 and lm.device == torch.device("cpu")
    assert wrap("bloom").context_limit is None
    assert wrap("mpt").context_limit == wrap("gpt2").context_limit == CONTEXT


def test_model_in_training_mode_is_put_into_evaluation_mode():
    model = tiny_model("gpt2").train()
    lm = LanguageModel.from_model(model, tiny_tokenizer(), name="gpt2")
    assert torch.equal(target_log_probs(lm, TOKENS), target_log_probs(lm, TOKENS))


def test_model_with_a_nan_names_the_first_bad_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"nan-llama gives NaN or infinite values in layer 1\.ffn_output"):
        LanguageModel.from_model(model, tiny_tokenizer(), name="nan-llama")


def test_model_that_sees_later_tokens_is_refused():
    class Bidirectional(transformers.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            everything = torch.zeros(len(input_ids), 1, input_ids.shape[1], input_ids.shape[1])
            return super().forward(input_ids, attention_mask=everything)

    model = Bidirectional(tiny_model("llama").config).eval()
    with pytest.raises(ModelError, match="two-sided sees later tokens, as an encoder does; give"):
        LanguageModel.from_model(model, tiny_tokenizer(), name="two-sided")


def test_layer_that_is_never_computed_is_left_out_with_a_note():
    class Skipping(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            self.model.config.num_hidden_layers = 2  # Llama's own loop takes so many
            return super().forward(*args, **kwargs)

    lm = LanguageModel.from_model(Skipping(tiny_model("llama").config).eval(), tiny_tokenizer(), name="skipping")
    assert lm.layer_names[-2:] == ("1.block_output", FINAL)
    assert lm.notes == (
        "skipping has layers that cannot be read: "
        "2.attn_input, 2.attn_output, 2.ffn_input, 2.ffn_output, 2.block_output",
    )


def test_block_that_is_computed_twice_is_left_out():
    class Looping(transformers.LlamaModel):
        def __init__(self, config):
            super().__init__(config)
            self.layers[1].register_forward_hook(self.again)
            self.calls = 0

        def again(self, module, args, output):
            self.calls += 1
            positions = self.rotary_emb(output, torch.arange(output.shape[1])[None])
            return module(output, position_embeddings=positions) if self.calls % 2 else None

    model = tiny_model("llama")
    model.model = Looping(model.config)
    lm = LanguageModel.from_model(model, tiny_tokenizer(), name="looping")
    assert {name[0] for name in lm.layer_names} == {"0", "2", "f"}
    with pytest.raises(LayerError, match=r"no layer '1\.ffn_input'; it has 0\.attn_input, 2\.attn_input"):
        read(lm, TOKENS, ["1.ffn_input"])


def test_vectors_of_several_streams_are_left_out():
    class Streams(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[1].register_forward_hook(lambda module, args, output: output[:, :, None])
            self.model.layers[2].register_forward_pre_hook(lambda module, args: (args[0][:, :, 0],))

    lm = LanguageModel.from_model(Streams(tiny_model("llama").config).eval(), tiny_tokenizer(), name="streams")
    assert lm.notes == ("streams has layers that cannot be read: 1.block_output",)


# Text


def lines(count):
    generator = np.random.default_rng(0)
    words = [
        "the",
        "nurse's",
        "ward",
        "  ",
        "42",
        "é",
        "…",
        "\n",
        "don't",
        "patient",
        "日本",
        "o'clock",
        "\t",
        "x²",
        "river",
    ]
    return " ".join(generator.choice(words, size=count))


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_pieces_give_the_tokens_of_the_whole_in_byte_level_bpe(piece, monkeypatch):
    text, tokenizer = lines(3000), tiny_tokenizer()
    monkeypatch.setattr(encoding, "PIECE", piece)
    encode = encoding.TextEncoder(tokenizer)
    assert len(list(encode._pieces(text))) > 10
    whole = tokenizer(text, verbose=False)["input_ids"]
    found = encode(text)
    assert found.dtype == np.int32 and found.tolist() == whole


def sentencepiece():
    """Llama-2's shape: a space becomes ▁, and one is put in front of every text."""
    words = ["the", "cat", "sat", "mat", "on"]
    alphabet = ["<unk>", "<s>", *sorted({letter for word in words for letter in word}), "▁"]
    vocabulary, merges = dict.fromkeys(alphabet), []
    for word in ["▁" + word for word in words]:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary[word[:end]] = None
    merges = list(dict.fromkeys(merges))
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("piece", [1, 9])
def test_pieces_give_the_tokens_of_the_whole_in_sentencepiece(piece, monkeypatch):
    tokenizer, text = sentencepiece(), "the cat sat on the mat  on the cat sat " * 20
    monkeypatch.setattr(encoding, "PIECE", piece)
    encode = encoding.TextEncoder(tokenizer)
    assert len(list(encode._pieces(text))) > 10
    found = encode(text).tolist()
    assert found == tokenizer(text)["input_ids"]
    assert found[0] == tokenizer.bos_token_id and found.count(tokenizer.bos_token_id) == 1


def test_text_is_not_cut_where_pieces_would_give_other_tokens(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 1)
    text = "the cat sat on the mat"

    def whole_text_tokenizer(text, **options):
        return {"input_ids": [len(text), *text.encode()]}

    assert encoding.TextEncoder(whole_text_tokenizer)(text).tolist() == [len(text), *text.encode()]


def with_template(single):
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(tokenizer.eos_token, end)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "front"),
    [("$A", 0), ("<|endoftext|> $A", 1), ("$A <|endoftext|>", 0), ("<|endoftext|> <|endoftext|> $A <|endoftext|>", 2)],
)
def test_special_tokens_in_front_are_kept_and_none_is_behind(template, front):
    tokenizer = with_template(template)
    encode = encoding.TextEncoder(tokenizer)
    bare = tiny_tokenizer()("the nurse")["input_ids"]
    assert encode("the nurse").tolist() == [tokenizer.eos_token_id] * front + bare
    assert encode("").tolist() == [tokenizer.eos_token_id] * front


def test_decode_keeps_spaces_and_special_tokens():
    lm = wrap("gpt2")
    text = "  the nurse , isn't here .<|endoftext|> "
    tokens = lm.encode(text)
    assert lm.decode(tokens) == lm.decode(tokens.tolist()) == text
    assert lm.decode([]) == ""


# Loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def test_loaded_model_is_the_saved_one(folder, no_network, capsys):
    lm = load_model(folder)
    assert capsys.readouterr().out == ""
    assert lm.name == str(folder) and lm.dtype == torch.float32 and lm.notes == ()
    assert not lm.model.training and not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert torch.equal(target_log_probs(lm, TOKENS), target_log_probs(wrap("llama"), TOKENS))


@pytest.mark.parametrize("kind", ["gpt2", "opt-post-norm", "bloom", "gpt-neox", "gemma2", "mixtral", "cohere", "mpt"])
def test_architectures_load_without_missing_weights(kind, tmp_path):
    lm = load_model(save_tiny(kind, tmp_path / kind))
    assert torch.equal(target_log_probs(lm, TOKENS), target_log_probs(wrap(kind), TOKENS))
    assert {**lm.fingerprint, "model": kind} == wrap(kind).fingerprint


def test_fingerprint_tells_what_differs_and_no_type_of_computation(folder, tmp_path):
    first = load_model(folder).fingerprint
    assert load_model(folder, dtype="bfloat16").fingerprint == first
    other = LanguageModel.from_model(tiny_model("llama"), tiny_tokenizer(vocabulary=270), name=str(folder)).fingerprint
    assert {key for key in first if first[key] != other[key]} == {"tokenizer"}
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    other = LanguageModel.from_model(model, tiny_tokenizer(), name=str(folder)).fingerprint
    assert {key for key in first if first[key] != other[key]} == {"weights"}
    other = wrap("llama", rms_norm_eps=1e-5).fingerprint
    assert {key for key in first if first[key] != other[key]} == {"model", "config"}


def test_fingerprint_of_the_tokenizer_does_not_change_by_use():
    lm = wrap("llama")
    before = lm.fingerprint["tokenizer"]
    lm.tokenizer("the nurse", truncation=True, max_length=2)
    assert digest_tokenizer(lm.tokenizer) == before


@pytest.fixture(scope="module")
def half_folders(tmp_path_factory):
    folders = {}
    for dtype in (torch.bfloat16, torch.float16):
        folders[dtype] = tmp_path_factory.mktemp("half") / "llama"
        tiny_model("llama").to(dtype).save_pretrained(folders[dtype])
        tiny_tokenizer().save_pretrained(folders[dtype])
    return folders


@pytest.mark.parametrize(
    ("stored", "speed", "computed", "note"),
    [
        (torch.bfloat16, 2.0, torch.bfloat16, None),
        (
            torch.bfloat16,
            1.2,
            torch.float32,
            "bfloat16 and computed in float32, in which this CPU multiplies faster",
        ),
        (torch.bfloat16, 0.003, torch.float32, "in which this CPU multiplies faster"),
        (torch.float16, 2.0, torch.float32, "float16 and computed in float32, which holds its weights exactly"),
        (torch.float16, 0.003, torch.float32, "float16 and computed in float32"),
    ],
)
def test_half_checkpoint_is_computed_in_what_the_cpu_does_fast(
    stored, speed, computed, note, half_folders, monkeypatch
):
    of_a_cpu_that_does_not_say(monkeypatch, speed)
    lm = load_model(half_folders[stored], device="cpu")
    assert lm.dtype == computed
    assert lm.notes == () and ((lm.details == ()) if note is None else (note in lm.details[0]))
    assert torch.isfinite(target_log_probs(lm, TOKENS)).all()


def test_float32_checkpoint_stays_float32_whatever_the_cpu(folder, monkeypatch):
    of_a_cpu_that_does_not_say(monkeypatch, 9.0)
    assert load_model(folder).dtype == torch.float32


def test_checkpoint_whose_configuration_names_no_type(half_folders, tmp_path, monkeypatch):
    of_a_cpu_that_does_not_say(monkeypatch, 0.1)
    copy = shutil.copytree(half_folders[torch.bfloat16], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    del config["dtype"]
    (copy / "config.json").write_text(json.dumps(config))
    lm = load_model(copy)
    assert lm.dtype == torch.float32 and "the checkpoint is bfloat16" in lm.details[0]


def test_dtype_that_is_asked_for_is_taken(folder, half_folders):
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    lm = load_model(half_folders[torch.float16], dtype="float32")
    assert lm.dtype == torch.float32 and lm.notes == ()


def test_half_precision_agrees_with_float32_roughly(folder):
    full, half = load_model(folder), load_model(folder, dtype="bfloat16")
    torch.testing.assert_close(target_log_probs(half, TOKENS), target_log_probs(full, TOKENS), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("flags", "taken"),
    [
        ("fpu avx2 avx512f avx512_bf16", torch.bfloat16),
        ("fpu avx512f amx_tile amx_bf16 amx_int8", torch.bfloat16),
        ("fpu avx2 avx512f avx512_vnni amx_int8", torch.float32),
    ],
)
@pytest.mark.parametrize("speed", [0.05, 9.0])
def test_x86_cpu_is_taken_by_its_word_whatever_a_busy_moment_measures(flags, taken, speed, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: x\nflags\t\t: {flags}\nbugs\t: none\n")
    of_a_cpu_that_does_not_say(monkeypatch, speed)
    monkeypatch.setattr(hardware, "_CPUINFO", cpuinfo)
    assert hardware.pick_dtype_on_cpu(torch.bfloat16)[0] == taken
    assert hardware.pick_dtype_on_cpu(torch.float16)[0] == torch.float32


def of_a_cpu_that_does_not_say(monkeypatch, speed):
    """Such as one of a Mac: no flags, so that its speed is measured."""
    hardware.multiplies_bfloat16.cache_clear()
    monkeypatch.setattr(hardware, "_CPUINFO", Path("nowhere", "cpuinfo"))
    monkeypatch.setattr(hardware, "bfloat16_speed", lambda: speed)


@pytest.fixture(autouse=True)
def _forget_the_cpu():
    yield
    hardware.multiplies_bfloat16.cache_clear()


def test_bfloat16_speed_is_a_plausible_ratio():
    assert 1e-4 < hardware.bfloat16_speed() < 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "`dtype` is 'int8'; take auto, float32, bfloat16, float16"),
        ({"dtype": "float16", "device": "cpu"}, "`dtype='float16'` is not for a CPU"),
        ({"device": "tpu"}, "`device` is 'tpu'; take auto, cpu, cuda or mps"),
    ],
)
def test_wrong_option_is_refused(options, message, folder):
    with pytest.raises(InputError, match=message):
        load_model(folder, **options)


def test_absent_device_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="`device` is 'cuda:0', but this machine has none"):
        load_model(folder, device="cuda:0")


def without_tokenizer(path, kind):
    tiny_model(kind).save_pretrained(path)


def lacking_weights(path):
    save_tiny("llama", path)
    model = tiny_model("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(path, state_dict=state)


def other_shapes(path):
    save_tiny("llama", path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def damaged(path):
    save_tiny("llama", path)
    (path / "model.safetensors").write_bytes(b"no weights")


def saved(make):
    def save(path):
        make().save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)

    return save


def write(name, text):
    def save(path):
        path.mkdir()
        (path / name).write_text(text)

    return save


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: without_tokenizer(path, "gpt2"), "has no tokenizer"),
        (lambda path: without_tokenizer(path, "llama"), "has no tokenizer"),
        (lambda path: path.mkdir(), "is not a model: it has no config.json"),
        (lambda path: path.write_text("text"), "is a file; give the folder of a model"),
        (lambda path: None, "there is no folder"),
        (write("config.json", "not JSON"), "could not be read as a model"),
        (write("config.json", '{"model_type": "no-such-model"}'), "could not be read as a model"),
        (saved(tiny_bert), "is an encoder-only model; give"),
        (saved(tiny_t5), "is an encoder-decoder model; give"),
        (saved(lambda: transformers.ViTModel(transformers.ViTConfig(hidden_size=8, num_hidden_layers=1,
         num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4))), "could not be loaded as a causal"),
        (lacking_weights, "lacks 1 weights of a causal language model, such as model.layers.1.mlp.up_proj.weight"),
        (other_shapes, r"9 weights of other shapes .* model.layers.0.mlp.down_proj.weight: \[32, 48\] for \[32, 64\]"),
        (damaged, "could not be loaded as a causal language model"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused_in_one_line(make, message, tmp_path, no_network, caplog):
    make(tmp_path / "model")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path / "model")
    assert "\n" not in str(caught.value) and str(tmp_path / "model") in str(caught.value) and not caplog.records

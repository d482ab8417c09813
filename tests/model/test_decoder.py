"""Captured vectors are the right ones in every architecture; the oracles are the models' own modules, named by hand."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
import transformers
from torch import Tensor, nn

from knnlm.errors import LayerError, ModelError
from knnlm.layer_names import (
    FINAL,
    PARTS,
    select_layers,
)
from knnlm.model.decoder import find_decoder
from tests.tiny_models import BLOCKS, KINDS, WIDTH, randomized, tiny_bert, tiny_model, tiny_t5

# A block as the architecture's paper draws it: from the block's module and input, attention's and the feed-forward's
# output to the three tensors that are to be captured: attn_input, ffn_input, block_output.
Block = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def sequential(first: str, second: str, multiplier: float = 1.0) -> Block:
    def block(module, x, a, f):
        middle = x + multiplier * a
        return getattr(module, first)(x), getattr(module, second)(middle), middle + multiplier * f

    return block


def parallel(first: str, second: str | None = None) -> Block:
    def block(module, x, a, f):
        return getattr(module, first)(x), getattr(module, second or first)(x), x + a + f

    return block


def post_norm(first: str, second: str) -> Block:
    def block(module, x, a, f):
        middle = getattr(module, first)(x + a)
        return x, middle, getattr(module, second)(middle + f)

    return block


def sandwich(module, x, a, f):
    """Gemma-2 and Gemma-3."""
    middle = x + module.post_attention_layernorm(a)
    output = middle + module.post_feedforward_layernorm(f)
    return module.input_layernorm(x), module.pre_feedforward_layernorm(middle), output


def norm_after(module, x, a, f):
    """OLMo-2."""
    middle = x + module.post_attention_layernorm(a)
    return x, middle, middle + module.post_feedforward_layernorm(f)


def bloom_post_residual(module, x, a, f):
    first = module.input_layernorm(x)
    second = module.post_attention_layernorm(first + a)
    return first, second, second + f


def mlp(module, x):
    return module.mlp(x)


def mlp_adding_residual(module, x):
    return module.mlp(x, torch.zeros_like(x))


def two_linear(module, x):
    return module.fc2(module.activation_fn(module.fc1(x)))


@dataclass(frozen=True)
class Architecture:
    """Where the blocks are, how they compute, and their feed-forward."""

    blocks: str
    block: Block
    feed_forward: Callable[[nn.Module, Tensor], Tensor] = mlp


H, LAYERS = "transformer.h", "model.layers"
PRE_NORM = Architecture(LAYERS, sequential("input_layernorm", "post_attention_layernorm"))
ONE_NORM = Architecture(LAYERS, parallel("input_layernorm"))
NORMS = ("input_layernorm", "post_attention_layernorm")
OPT_NORMS = ("self_attn_layer_norm", "final_layer_norm")
ARCHITECTURES = {
    "gpt2": Architecture(H, sequential("ln_1", "ln_2")),
    "openai-gpt": Architecture(H, post_norm("ln_1", "ln_2")),
    "gpt-neo": Architecture(H, sequential("ln_1", "ln_2")),
    "gptj": Architecture(H, parallel("ln_1")),
    "gpt-neox": Architecture("gpt_neox.layers", parallel(*NORMS)),
    "gpt-neox-sequential": Architecture("gpt_neox.layers", sequential(*NORMS)),
    "opt": Architecture("model.decoder.layers", sequential(*OPT_NORMS), two_linear),
    "opt-post-norm": Architecture("model.decoder.layers", post_norm(*OPT_NORMS), two_linear),
    "bloom": Architecture(H, sequential(*NORMS), mlp_adding_residual),
    "bloom-post-residual": Architecture(H, bloom_post_residual, mlp_adding_residual),
    "falcon": Architecture(H, parallel("input_layernorm")),
    "falcon-sequential": Architecture(H, sequential(*NORMS)),
    "falcon-new": Architecture(H, parallel("ln_attn", "ln_mlp")),
    "falcon-new-one-norm": Architecture(H, parallel("input_layernorm")),
    "mpt": Architecture(
        "transformer.blocks", sequential("norm_1", "norm_2"), lambda module, x: module.ffn(x, torch.zeros_like(x))
    ),
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe", "phi3"), PRE_NORM),
    **dict.fromkeys(("gemma", "stablelm"), PRE_NORM),
    **dict.fromkeys(("phi", "stablelm-parallel", "cohere"), ONE_NORM),
    **dict.fromkeys(("gemma2", "gemma3"), Architecture(LAYERS, sandwich)),
    "olmo2": Architecture(LAYERS, norm_after),
    "granite": Architecture(LAYERS, sequential(*NORMS, multiplier=0.5)),
}
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))


def capture(model, names=None, tokens=TOKENS):
    decoder = find_decoder(model)
    vectors = {}
    names = decoder.names if names is None else names
    with torch.inference_mode(), decoder.attach(names, lambda name, v: vectors.__setitem__(name, v.clone())):
        logits = model(tokens).logits
    return vectors, logits


@lru_cache(maxsize=1)
def captured(kind):
    model = tiny_model(kind)
    vectors, logits = capture(model)
    blocks = model.get_submodule(ARCHITECTURES[kind].blocks)
    return model, blocks, vectors, logits


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_every_block_is_found(kind):
    _, _, vectors, _ = captured(kind)
    decoder = find_decoder(tiny_model(kind))
    assert decoder.names == (*(f"{block}.{part}" for block in range(BLOCKS) for part in PARTS), FINAL)
    assert decoder.num_blocks == BLOCKS
    assert set(vectors) == set(decoder.names)
    assert all(tensor.shape[:2] == TOKENS.shape and tensor.ndim == 3 for tensor in vectors.values())


@pytest.mark.parametrize("kind", KINDS)
def test_ffn_input_through_the_feed_forward_gives_ffn_output(kind):
    _, blocks, vectors, _ = captured(kind)
    with torch.inference_mode():
        for number, block in enumerate(blocks):
            output = ARCHITECTURES[kind].feed_forward(block, vectors[f"{number}.ffn_input"].clone())
            assert_near(vectors[f"{number}.ffn_output"], output)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_block_output(kind):
    _, blocks, vectors, _ = captured(kind)
    parts = ("attn_input", "ffn_input", "block_output")
    with torch.inference_mode():
        for number in range(1, BLOCKS):
            x, a, f = (
                vectors[name]
                for name in (f"{number - 1}.block_output", f"{number}.attn_output", f"{number}.ffn_output")
            )
            expected = ARCHITECTURES[kind].block(blocks[number], x, a, f)
            for part, tensor in zip(parts, expected, strict=True):
                assert_near(vectors[f"{number}.{part}"], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_final_norm_through_the_head_gives_the_logits(kind):
    model, _, vectors, logits = captured(kind)
    with torch.inference_mode():
        scores = model.lm_head(vectors[FINAL]) if hasattr(model, "lm_head") else model.embed_out(vectors[FINAL])
    if kind == "gemma2":
        scores = 30 * torch.tanh(scores / 30)
    assert_near(scores * {"cohere": 0.25, "granite": 1 / 4}.get(kind, 1.0), logits)


def test_final_norm_without_a_norm_is_the_last_block_output():
    _, _, vectors, _ = captured("openai-gpt")
    assert torch.equal(vectors[FINAL], vectors[f"{BLOCKS - 1}.block_output"])


def test_final_norm_of_a_projecting_decoder_has_the_size_of_the_embeddings():
    _, _, vectors, _ = captured("opt-post-norm")
    assert vectors[FINAL].shape[-1] == 16 != vectors["0.block_output"].shape[-1]


# Hooks


def count_hooks(model):
    return Counter(
        (name, kind)
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
        for _ in getattr(module, kind)
    )


def test_hooks_and_model_are_as_before():
    model = tiny_model("gpt2")
    before, state = count_hooks(model), {name: set(module.__dict__) for name, module in model.named_modules()}
    capture(model)
    assert count_hooks(model) == before
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == state


@pytest.mark.parametrize("place", ["0.attn_input", "1.ffn_output", FINAL])
def test_hooks_vanish_when_receiving_fails(place):
    model = tiny_model("llama")
    decoder = find_decoder(model)
    before = count_hooks(model)

    def fail(name, vectors):
        if name == place:
            assert count_hooks(model) != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), decoder.attach(decoder.names, fail):
        model(TOKENS)
    assert count_hooks(model) == before


def test_unknown_layer_attaches_nothing():
    model = tiny_model("llama")
    decoder = find_decoder(model)
    before = count_hooks(model)
    with pytest.raises(LayerError, match=r"no layer '9.ffn_input'; it has 0-2.attn_input, .*, final_norm$"):
        decoder.attach(["0.ffn_input", "9.ffn_input"], print).__enter__()
    assert count_hooks(model) == before


def test_only_named_layers_are_received_in_the_model_s_own_memory():
    model = tiny_model("llama")
    outputs, received = [], []
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    decoder = find_decoder(model)
    with decoder.attach(["1.block_output"], lambda *pair: received.append(pair)):
        model(TOKENS)
    handle.remove()
    assert [name for name, _ in received] == ["1.block_output"]
    assert received[0][1].data_ptr() == outputs[0].data_ptr() and not received[0][1].requires_grad


# Structures


def test_vectors_have_gradients_where_they_are_asked_for():
    model, received = tiny_model("gpt2"), {}
    for detach in (True, False):
        with find_decoder(model).attach(["1.ffn_input"], received.__setitem__, detach=detach):
            model(TOKENS)
        assert received["1.ffn_input"].requires_grad is not detach
    received["1.ffn_input"].sum().backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad is not None
    assert model.transformer.h[2].mlp.c_fc.weight.grad is None


def lora(model):
    """Every linear layer of the blocks wrapped, with a random change that is not 0."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on itself: a deprecated attribute, and that it has set an option
        return peft.get_peft_model(model, config).get_base_model()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom", "mpt", "opt", "falcon"])
def test_layers_under_lora_are_those_of_the_merged_model(kind):
    # BLOOM and MPT tap a linear layer inside the sublayer, OPT has its two in the block itself.
    model, merged = lora(tiny_model(kind).double()).double().eval(), tiny_model(kind).double()
    (adapted, _), (plain, _) = capture(model), capture(merged)
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                merged.get_submodule(name).weight += module.get_delta_weight("default")
    expected, _ = capture(merged)
    assert list(adapted) == list(expected)
    for name, vectors in expected.items():
        torch.testing.assert_close(adapted[name], vectors, rtol=1e-5, atol=1e-5, msg=name)
        # What enters block 0 is before any change; in Falcon, attention and the feed-forward read the same.
        assert name in ("0.attn_input", "0.ffn_input") or not torch.allclose(vectors, plain[name], atol=1e-4)


def test_state_space_model_has_no_attention_and_says_what_it_has():
    config = transformers.MambaConfig(vocab_size=288, hidden_size=WIDTH, num_hidden_layers=2, state_size=4)
    decoder = find_decoder(transformers.MambaForCausalLM(config))
    assert decoder.names == ("0.block_output", "1.block_output", FINAL)
    with pytest.raises(LayerError, match=r"no layer fits '\*\.ffn_input'; there are 0-1\.block_output, final_norm"):
        select_layers("*.ffn_input", decoder.names)


class MixtureBlock(nn.Module):
    """Attention inside a wrapper with norms, inputs by keyword, a mixture that works on rows and returns a pair."""

    class Wrapper(nn.Module):
        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.out = nn.Linear(8, 8)

            def forward(self, *, mask, hidden_states):
                return self.out(hidden_states), None

        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.attn = self.Attention()

        def forward(self, hidden_states):
            mask = torch.zeros(1, dtype=torch.bool)
            hidden_states = hidden_states + self.attn(mask=mask, hidden_states=self.norm_1(hidden_states))[0]
            return hidden_states, self.norm_2(hidden_states)

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(8, 8)

        def forward(self, rows):
            return self.out(rows), torch.zeros(len(rows), 4)

    def __init__(self):
        super().__init__()
        self.norm_attn_norm = self.Wrapper()
        self.block_sparse_moe = self.Mixture()

    def forward(self, hidden_states):
        residual, normed = self.norm_attn_norm(hidden_states)
        rows, _ = self.block_sparse_moe(normed.reshape(-1, 8))
        return (residual + rows.reshape(residual.shape), None)


class MixtureModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.vision_layers = nn.ModuleList(MixtureBlock() for _ in range(5))
        self.layers = nn.ModuleList(MixtureBlock() for _ in range(2))
        self.lm_head = nn.Linear(8, 20)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)[0]
        return self.lm_head(hidden)


def test_wrapped_attention_keywords_pairs_rows_and_a_tower_of_another_sense():
    model = MixtureModel()
    decoder, got = find_decoder(model), {}
    tokens = torch.arange(6).reshape(2, 3)
    with decoder.attach(decoder.names, lambda name, vectors: got.__setitem__(name, vectors.clone())):
        model(tokens)
    assert decoder.num_blocks == 2 and set(got) == set(decoder.names)
    assert {tensor.shape for tensor in got.values()} == {(2, 3, 8)}
    wrapper = model.layers[1].norm_attn_norm
    assert_near(got["1.attn_input"], wrapper.norm_1(got["0.block_output"]))
    assert_near(got["1.block_output"], got["0.block_output"] + got["1.attn_output"] + got["1.ffn_output"])


def test_several_feed_forwards_in_a_block_have_one_input_and_no_output():
    class Two(MixtureBlock):
        def __init__(self):
            super().__init__()
            self.shared_mlp = nn.Linear(8, 8)

    model = MixtureModel()
    model.layers = nn.ModuleList([Two()])
    assert select_layers("*.ffn_*", find_decoder(model).names) == ("0.ffn_input",)


def test_hybrid_of_two_classes_of_blocks_lacks_attention_where_it_has_none():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.mamba, self.feed_forward = nn.Linear(8, 8), nn.Linear(8, 8)

    model = MixtureModel()
    model.layers = nn.ModuleList([MixtureBlock(), Other()])
    model.config = transformers.PretrainedConfig(num_hidden_layers=2)
    names = find_decoder(model).names
    assert [name for name in names if name.startswith("1.")] == ["1.ffn_input", "1.ffn_output", "1.block_output"]
    with pytest.raises(LayerError, match=r"no layer fits '1\.attn_input'; there are 0\.attn_input, .*0-1\.ffn_input"):
        select_layers("1.attn_input", names)


def bert_decoder():
    config = transformers.BertConfig(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    return randomized(transformers.BertLMHeadModel(config))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_bert, "BertForMaskedLM is an encoder-only model; give"),
        (tiny_t5, "T5ForConditionalGeneration is an encoder-decoder model; give"),
        (lambda: tiny_model("gpt2").base_model, "GPT2Model has no LM head; give"),
        (bert_decoder, "no list of decoder blocks .* was found in BertLMHeadModel"),
        (lambda: nn.Linear(2, 2), "Linear has no LM head; give"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(make, message):
    with pytest.raises(ModelError, match=message) as caught:
        find_decoder(make())
    assert "\n" not in str(caught.value)

"""The same model before its training, and what a configuration alone tells of a model."""

from __future__ import annotations

import pytest
import torch

from knnlm.errors import InputError, ModelError
from knnlm.model.loading import Outline, load_model, random_model, read_outline
from tests.tiny_models import CONTEXT, save_tiny, tiny_bert, tiny_tokenizer


def test_random_model_is_as_training_would_begin(gpt2_folder):
    state = torch.random.get_rng_state()
    lm = random_model(gpt2_folder, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    trained = load_model(gpt2_folder)
    assert lm.name == f"{gpt2_folder} (random)"
    assert (lm.layer_names, lm.dims, lm.context_limit) == (trained.layer_names, trained.dims, trained.context_limit)
    weights = dict(lm.model.named_parameters())
    assert torch.equal(weights["transformer.ln_f.weight"], torch.ones(32))
    assert not weights["transformer.h.1.mlp.c_fc.bias"].any()
    assert weights["transformer.wte.weight"].std() == pytest.approx(lm.model.config.initializer_range, rel=0.05)
    assert not any(weight.requires_grad for weight in weights.values())
    assert lm.encode("The nurse").tolist() == trained.encode("The nurse").tolist()


def test_seed_makes_the_weights(gpt2_folder):
    first, again, other = (random_model(gpt2_folder, seed=seed).fingerprint["weights"] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom", "gemma3", "qwen3-moe"])
def test_outline_is_that_of_the_model(kind, tmp_path):
    folder = save_tiny(kind, tmp_path)
    lm = load_model(folder)
    assert read_outline(folder) == Outline(lm.layer_names, lm.context_limit)
    assert lm.context_limit == (None if kind == "bloom" else CONTEXT)


def test_outline_reads_no_weights(tmp_path):
    folder = save_tiny("gpt2", tmp_path)
    (folder / "model.safetensors").unlink()
    assert read_outline(folder).context_limit == CONTEXT


@pytest.mark.parametrize("read", [random_model, read_outline])
def test_what_is_no_causal_model_is_refused(read, tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-only model"):
        read(tmp_path)
    with pytest.raises(ModelError, match="there is no folder"):
        read(tmp_path / "absent")


def test_half_precision_is_refused_on_a_cpu(gpt2_folder):
    with pytest.raises(InputError, match="`dtype='float16'` is not for a CPU"):
        random_model(gpt2_folder, dtype="float16", device="cpu")

"""Tiny random decoders of many architectures and a byte-level tokenizer, made in code: no network, no files, seeded.

Every parameter is random, norms and biases too: weights fresh from `transformers` have unit norms and zero biases, with
which a vector taken before a norm, or without its bias, can look like the right one.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# Models this small gain nothing by threads, which wait for one another where other work runs: 6 times slower, measured.
torch.set_num_threads(1)

BLOCKS, WIDTH, CONTEXT, VOCABULARY = 3, 32, 128, 288
END = "<|endoftext|>"

_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 4, "n_positions": CONTEXT}
_HEAD_8: dict[str, Any] = {**_GROUPED, "head_dim": 8}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2}
_OPT: dict[str, Any] = {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": WIDTH}
_FALCON: dict[str, Any] = {**_SIZES, "ffn_hidden_size": 48, "bias": True}

# kind: (configuration class, its fields).
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT),
    "openai-gpt": ("OpenAIGPTConfig", _GPT),
    "gpt-neo": (
        "GPTNeoConfig",
        {
            "hidden_size": WIDTH,
            "num_layers": BLOCKS,
            "num_heads": 4,
            "max_position_embeddings": CONTEXT,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 16,
        },
    ),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "gpt-neox": ("GPTNeoXConfig", {**_SIZES, "use_parallel_residual": True}),
    "gpt-neox-sequential": ("GPTNeoXConfig", {**_SIZES, "use_parallel_residual": False}),
    "opt": ("OPTConfig", _OPT),
    "opt-post-norm": ("OPTConfig", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "bloom": ("BloomConfig", {"hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": 4}),
    "bloom-post-residual": (
        "BloomConfig",
        {"hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": 4, "apply_residual_connection_post_layernorm": True},
    ),
    "falcon": ("FalconConfig", {**_FALCON, "parallel_attn": True}),
    "falcon-sequential": ("FalconConfig", {**_FALCON, "parallel_attn": False, "alibi": True}),
    "falcon-new": ("FalconConfig", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-new-one-norm": (
        "FalconConfig",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "mpt": ("MptConfig", {"d_model": WIDTH, "n_heads": 4, "n_layers": BLOCKS, "max_seq_len": CONTEXT}),
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", {**_HEAD_8, "sliding_window": 24}),
    "mixtral": ("MixtralConfig", {**_HEAD_8, **_MOE, "num_local_experts": 4, "sliding_window": None}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _HEAD_8),
    "qwen3-moe": ("Qwen3MoeConfig", {**_HEAD_8, **_MOE, "num_experts": 4, "moe_intermediate_size": 24}),
    "phi": ("PhiConfig", {**_SIZES, "num_key_value_heads": 4}),
    "phi3": ("Phi3Config", _GROUPED),
    "gemma": ("GemmaConfig", _HEAD_8),
    "gemma2": ("Gemma2Config", {**_HEAD_8, "sliding_window": 24, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**_HEAD_8, "sliding_window": 24, "query_pre_attn_scalar": 8}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "stablelm": ("StableLmConfig", _GROUPED),
    "stablelm-parallel": ("StableLmConfig", {**_GROUPED, "use_parallel_residual": True}),
    "cohere": ("CohereConfig", {**_GROUPED, "logit_scale": 0.25}),
    "granite": ("GraniteConfig", {**_GROUPED, "residual_multiplier": 0.5, "logits_scaling": 4.0}),
}
KINDS: tuple[str, ...] = tuple(_CONFIGS)


def tiny_model(kind: str, **overrides: Any) -> PreTrainedModel:
    """Return a random float32 decoder in evaluation mode, always the same; `overrides` are configuration fields."""
    name, fields = _CONFIGS[kind]
    fields = {"vocab_size": VOCABULARY, **fields, **overrides}
    # No padding token: it would zero one row of the embeddings.
    tokens = {"bos_token_id": fields["vocab_size"] - 1, "eos_token_id": fields["vocab_size"] - 1, "pad_token_id": None}
    config = getattr(transformers, name)(**{**tokens, **fields})
    return randomized(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def tiny_bert() -> PreTrainedModel:
    """Return an encoder-only model, which cannot be a language model here."""
    fields = {**_SIZES, "vocab_size": VOCABULARY}
    return randomized(transformers.BertForMaskedLM(transformers.BertConfig(**fields)))


def tiny_t5() -> PreTrainedModel:
    """Return an encoder-decoder model, which cannot be a language model here."""
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    return randomized(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)))


def randomized(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Draw every parameter anew from `seed`, in place, and return the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim < 2:
                parameter.add_(0.2 * noise.to(parameter.dtype))
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval()


@lru_cache(maxsize=4)
def _byte_level(vocabulary: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1, initial_alphabet=alphabet, special_tokens=[], show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    state = tokenizer.to_str()
    largest = tokenizer.get_vocab_size() + 1
    if largest != vocabulary:
        raise ValueError(f"the tokenizer's vocabulary must be from 257 to {largest}: {vocabulary}")
    return state


def tiny_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `vocabulary` tokens (at least 257): bytes, merges, last the end token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level(vocabulary)),
        bos_token=END,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )


def save_tiny(kind: str, folder: str | Path, **overrides: Any) -> Path:
    """Write a tiny model with its tokenizer to `folder` as `from_pretrained` reads them; return the folder."""
    tiny_model(kind, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


_TEXT = """The nurse takes the patient's temperature and writes it down before the doctor comes to the ward. In the
morning the other nurses of the ward read what was written, and then they talk about the patients who slept badly.
There is nothing in the world that the people of the town liked more than the long walk along the river."""

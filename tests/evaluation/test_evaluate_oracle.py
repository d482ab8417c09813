"""The whole way, from text to perplexity, against the float64 brute force of `tests/oracle.py` and transformers."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import run
from knnlm.results import EvalResult
from tests import oracle
from tests.tiny_models import tiny_model, tiny_tokenizer

# Words at random: repeated sentences would give keys at equal distances, of which any may be among the nearest k.
WORDS = "the nurse counts a pulse and each patient borrows one reference before Holmes ends it at night".split()
CONTEXT, STRIDE, LAMBDA = 32, 12, 0.4
TEMPERATURES = {"l2": 3.0, "ip": 3.0, "cosine": 0.05}

# name of the layer in this project -> (module of the architecture, side)
MODULES = {
    "gpt2": {
        "2.ffn_input": ("transformer.h.2.mlp", "input"),
        "1.block_output": ("transformer.h.1", "output"),
        "final_norm": ("transformer.ln_f", "output"),
    },
    "llama": {
        "2.ffn_input": ("model.layers.2.mlp", "input"),
        "0.ffn_output": ("model.layers.0.mlp", "output"),
        "1.attn_output": ("model.layers.1.self_attn", "output"),
    },
}


def texts(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 60)) for _ in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def run_tiny(
    kind: str, folder: Path, knn: KNNConfig, layers: str, key_dtype: str = "float16"
) -> tuple[EvalResult, LanguageModel]:
    lm = LanguageModel.from_model(tiny_model(kind), tiny_tokenizer(), name=kind)
    settings = Settings(
        text=TextConfig(context=CONTEXT, stride=STRIDE),
        layers=LayerConfig(layers=layers),
        knn=knn,
        key_dtype=key_dtype,
        evaluation=EvalConfig(eval_tokens=None),
    )
    training = write_jsonl(folder / "train.jsonl", texts(0, 6))
    held_out = write_jsonl(folder / "eval.jsonl", texts(1, 2))
    return run(lm, [training], folder / "out", eval_text=[held_out], settings=settings), lm


@lru_cache
def keys_of(kind: str, layer: str) -> tuple[oracle.Pass, oracle.Pass]:
    """Keys of the training text and of the held-out one, by loops over a model of their own."""
    model, tokenizer, (path, take) = tiny_model(kind), tiny_tokenizer(), MODULES[kind][layer]
    module = model.get_submodule(path)
    rows = [[tokenizer(text)["input_ids"] for text in texts(seed, count)] for seed, count in ((0, 6), (1, 2))]
    store, queries = (oracle.run_documents(model, module, take, one, CONTEXT, STRIDE) for one in rows)
    return store, queries


# Few neighbours: rounding to float16 decides which is the ninth, so float32 keys; many: the last ones weigh nothing.
@pytest.mark.parametrize(("k", "key_dtype", "tolerance"), [(9, "float32", 1e-6), (512, "float16", 1e-4)])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_perplexity_equals_float64_brute_force(
    kind: str, metric: str, k: int, key_dtype: str, tolerance: float, tmp_path: Path
) -> None:
    temperature = TEMPERATURES[metric]
    knn = KNNConfig(k=k, temperature=temperature, lam=LAMBDA, metric=metric)
    result, _ = run_tiny(kind, tmp_path, knn, ",".join(MODULES[kind]), key_dtype)
    assert len(result.layers) == 3
    for one in result.layers:
        store, queries = keys_of(kind, one.layer)
        expected = oracle.perplexity(store, queries, k, temperature, LAMBDA, metric)
        assert result.keys == len(store.targets)
        assert result.lm.tokens == len(queries.targets)
        assert one.perplexity == pytest.approx(expected, rel=tolerance), one.layer


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lambda_zero_equals_the_perplexity_of_transformers(kind: str, tmp_path: Path) -> None:
    result, lm = run_tiny(kind, tmp_path, KNNConfig(k=9, temperature=3.0, lam=0.0), "-1.ffn_input")
    assert result.layers[0].perplexity == result.lm.perplexity
    total, count = 0.0, 0
    for text in texts(1, 2):
        tokens = lm.encode(text).tolist()
        for start, scored_from, end in strided(len(tokens)):
            window = torch.tensor([tokens[start:end]])
            labels = window.clone()
            labels[:, : scored_from - start] = -100
            with torch.no_grad():
                loss = lm.model(window, labels=labels).loss.item()
            scored = end - max(scored_from, start + 1)
            total, count = total + loss * scored, count + scored
    assert count == result.lm.tokens
    assert result.lm.perplexity == pytest.approx(math.exp(total / count), rel=1e-6)
    assert 1 < result.lm.interval.low < result.lm.perplexity < result.lm.interval.high


def strided(length: int) -> list[tuple[int, int, int]]:
    """(start, first scored token, end) of each window of CONTEXT inputs and one more target."""
    found, start, scored = [], 0, 1
    while scored < length:
        end = min(start + CONTEXT + 1, length)
        found.append((start, scored, end))
        start, scored = start + STRIDE, end
    return found

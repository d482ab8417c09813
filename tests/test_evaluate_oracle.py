"""The whole way, from text to perplexity, against the float64 brute force of `tests/oracle.py` and transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.lm import LanguageModel
from knnlm.pipeline import run
from knnlm.results import EvalResult
from tests import oracle
from tests.tiny_models import tiny_model, tiny_tokenizer

SENTENCES = [
    "The nurse records the pulse, the breathing and the temperature of every patient twice a day. ",
    "A borrow ends where the last use of the reference ends, and the compiler checks each of them. ",
    "To Sherlock Holmes she is always the woman; he seldom mentions her under any other name. ",
    "Patients with a low pulse are seen first; the temperature of the room is kept at twenty degrees. ",
]
CONTEXT, STRIDE, K, LAMBDA = 32, 12, 9, 0.4

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


def texts(first: int, count: int) -> list[str]:
    return ["".join(SENTENCES[(first + i + j) % 4] for j in range(3)) for i in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def run_tiny(kind: str, folder: Path, knn: KNNConfig, layers: str) -> tuple[EvalResult, LanguageModel]:
    lm = LanguageModel.from_model(tiny_model(kind), tiny_tokenizer(), name=kind)
    settings = Settings(
        text=TextConfig(context=CONTEXT, stride=STRIDE),
        layers=LayerConfig(layers=layers),
        knn=knn,
        evaluation=EvalConfig(eval_tokens=None, bootstrap=50),
    )
    training = write_jsonl(folder / "train.jsonl", texts(0, 6))
    held_out = write_jsonl(folder / "eval.jsonl", [text[7:] for text in texts(1, 2)])
    return run(lm, [training], folder / "out", eval_text=[held_out], settings=settings), lm


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_perplexity_equals_float64_brute_force(kind: str, metric: str, tmp_path: Path) -> None:
    temperature = 0.05 if metric == "cosine" else 3.0
    knn = KNNConfig(k=K, temperature=temperature, lam=LAMBDA, metric=metric)
    result, lm = run_tiny(kind, tmp_path, knn, ",".join(MODULES[kind]))
    encode = [lm.encode(text).tolist() for text in texts(0, 6)]
    encode_eval = [lm.encode(text[7:]).tolist() for text in texts(1, 2)]
    assert len(result.layers) == 3
    for one in result.layers:
        path, take = MODULES[kind][one.layer]
        module = lm.model.get_submodule(path)
        store = oracle.run_documents(lm.model, module, take, encode, CONTEXT, STRIDE)
        queries = oracle.run_documents(lm.model, module, take, encode_eval, CONTEXT, STRIDE)
        expected = oracle.perplexity(store, queries, K, temperature, LAMBDA, metric)
        assert result.keys == len(store.targets)
        assert result.lm.tokens == len(queries.targets)
        assert one.perplexity == pytest.approx(expected, rel=1e-4), one.layer


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lambda_zero_equals_the_perplexity_of_transformers(kind: str, tmp_path: Path) -> None:
    result, lm = run_tiny(kind, tmp_path, KNNConfig(k=K, temperature=3.0, lam=0.0), "-1.ffn_input")
    assert result.layers[0].perplexity == result.lm.perplexity
    total, count = 0.0, 0
    for text in texts(1, 2):
        tokens = lm.encode(text[7:]).tolist()
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


def strided(length: int) -> list[tuple[int, int, int]]:
    """(start, first scored token, end) of each window of CONTEXT inputs and one more target."""
    found, start, scored = [], 0, 1
    while scored < length:
        end = min(start + CONTEXT + 1, length)
        found.append((start, scored, end))
        start, scored = start + STRIDE, end
    return found

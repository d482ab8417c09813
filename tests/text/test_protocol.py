"""The windows of neulab/knn-transformers, against its procedure written again from peers.md section 6."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnlm.config import KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import run
from knnlm.pipeline.job import Job
from knnlm.progress import Silent
from knnlm.text.windows import TokenDocument, WindowConfig, rows_to_groups, windows
from tests import oracle
from tests.evaluation.test_evaluate_oracle import texts
from tests.tiny_models import tiny_model, tiny_tokenizer

IGNORED = -100


def their_windows(rows: list[list[int]], block: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """(input ids, labels) of every window, as group_texts makes them, without the padding on the right."""
    found = []
    for first in range(0, len(rows), 1000):
        tokens = [token for row in rows[first : first + 1000] for token in row]
        total = len(tokens) // block * block if len(tokens) >= block else len(tokens)
        for i in range(0, total, stride):
            begin, end = max(i + stride - block, 0), min(i + stride, total)
            labels = [IGNORED] * (end - begin - (end - i)) + tokens[i:end]
            found.append((tokens[begin:end], labels))
    return found


@pytest.mark.parametrize(("block", "stride"), [(16, 8), (12, 4), (16, 16), (10, 4), (6, 1)])
def test_windows_and_targets_are_theirs(block: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 99, size=rng.integers(1, 9)).tolist() for _ in range(2003)]
    config = WindowConfig(block, stride, "knn-transformers")
    documents = (TokenDocument(np.array(row, np.int32), "rows", i) for i, row in enumerate(rows))
    ours = [
        (window.inputs.tolist(), [IGNORED] * window.first + window.targets[window.first :].tolist())
        for window in windows(rows_to_groups(documents, config), config)
    ]
    theirs = [(ids[:-1], labels[1:]) for ids, labels in their_windows(rows, block, stride)]
    assert [pair for pair in ours if pair[0]] == [pair for pair in theirs if pair[0]]


def test_counted_targets_per_window() -> None:
    """511 in a group's first window, whose first token has no predecessor; 512 in the others."""
    config = WindowConfig(1024, 512, "knn-transformers")
    groups = rows_to_groups([TokenDocument(np.arange(3000, dtype=np.int32), "rows", 1)], config)
    counted = [len(window.targets) - window.first for window in windows(groups, config)]
    assert counted == [511, 512, 512, 512]


def test_rows_of_json_lines_are_rows_whatever_they_hold(tmp_path: Path) -> None:
    """As in wikitext on the hub, every second row is empty and gives no token, and counts among a group's 1,000."""
    block, stride = 16, 8
    lm = LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="gpt2")
    rows = [f"row {number}\nof two lines\n" if number % 2 else "" for number in range(2100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    settings = Settings(text=TextConfig(context=block, stride=stride, protocol="knn-transformers"))
    job = Job(lm, settings, Silent())
    found = windows(job.documents([tmp_path / "rows.jsonl"]), job.window)
    theirs = their_windows([lm.encode(row).tolist() for row in rows], block, stride)
    assert [window.inputs.tolist() for window in found] == [ids[:-1] for ids, _ in theirs if ids[:-1]]


def test_perplexity_under_the_protocol_equals_their_procedure(tmp_path: Path) -> None:
    """Rows, groups, windows, targets and mixing as run_clm.py has them, in float64 loops; keys and distances exact."""
    block, stride, k, temperature, lam = 24, 8, 16, 2.0, 0.25
    lm = LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="gpt2")
    module = lm.model.get_submodule("transformer.h.2.mlp")
    passes = []
    for name, seed in (("train.txt", 0), ("eval.txt", 1)):
        rows = [line + "\n" for text in texts(seed, 3) for line in (text[:150], "", text[150:])]
        (tmp_path / name).write_text("".join(rows))
        passes.append(their_pass(lm, module, [lm.encode(row).tolist() for row in rows], block, stride))
    expected = oracle.perplexity(*passes, k, temperature, lam)
    settings = Settings(
        text=TextConfig(context=block, stride=stride, protocol="knn-transformers"),
        layers=LayerConfig(layers="-1.ffn_input"),
        knn=KNNConfig(k=k, temperature=temperature, lam=lam),
        key_dtype="float32",
    )
    result = run(lm, [tmp_path / "train.txt"], tmp_path / "out", eval_text=[tmp_path / "eval.txt"], settings=settings)
    assert (result.keys, result.lm.tokens) == (len(passes[0].targets), len(passes[1].targets))
    assert result.layers[0].perplexity == pytest.approx(expected, rel=1e-6)


def their_pass(lm: LanguageModel, module: Any, rows: list[list[int]], block: int, stride: int) -> oracle.Pass:
    keys, targets, log_probs = [], [], []
    for ids, labels in their_windows(rows, block, stride):
        hidden, logits = oracle.forward(lm.model, module, "input", ids)
        table = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
        for position, label in enumerate(labels[1:]):
            if label != IGNORED:
                keys.append(hidden[position])
                targets.append(label)
                log_probs.append(table[position, label])
    return oracle.Pass(np.array(keys), np.array(targets), np.array(log_probs))

"""What a run will cost, found out before it: room for the evaluation's queries, tokens of files with more than text."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from knnlm.config import EvalConfig, LayerConfig, Settings
from knnlm.errors import DatastoreError, InputError
from knnlm.evaluation.queries import open_queries
from knnlm.model.lm import LanguageModel
from knnlm.pipeline.job import Job
from knnlm.pipeline.plan import make_plan
from knnlm.progress import Silent
from knnlm.text.windows import TokenDocument, WindowConfig
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import tiny_model, tiny_tokenizer

LAYERS = "1.ffn_input,2.ffn_input"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="tiny")


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def free_space(monkeypatch: pytest.MonkeyPatch, temporary: Path, free: float) -> None:
    """Give the folder for temporary files so many free bytes, and all others more than enough."""
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=free if Path(path) == temporary else 10**12)
    )


@pytest.mark.parametrize("held_out", [True, False])
def test_queries_need_room_in_the_folder_for_temporary_files(
    held_out: bool, lm: LanguageModel, temporary_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 vectors of every layer for each token that is predicted, beside the keys where both are on one disk."""
    text = [write_jsonl(tmp_path / "text.jsonl", texts(0, 30))]
    settings = Settings(layers=LayerConfig(layers=LAYERS), evaluation=EvalConfig(eval_tokens=200))
    evaluation = None if held_out else [TokenDocument(np.zeros(101, np.int32), "a", 1)] * 2
    needed = 4 * 200 * sum(lm.dims[name] for name in LAYERS.split(","))
    needed += make_plan(lm, text, tmp_path / "out", settings, evaluation).key_bytes or 0
    free_space(monkeypatch, temporary_folder, needed)
    make_plan(lm, text, tmp_path / "out", settings, evaluation)
    free_space(monkeypatch, temporary_folder, needed - 1)
    with pytest.raises(InputError, match=r"queries of 2 layers x 200 evaluation.*set TMPDIR to") as refused:
        make_plan(lm, text, tmp_path / "out", settings, evaluation)
    assert str(temporary_folder) in str(refused.value)
    assert "`out`" not in str(refused.value)


def test_a_tenth_of_a_short_text_is_what_queries_are_counted_for(
    lm: LanguageModel, temporary_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = [write_jsonl(tmp_path / "text.jsonl", texts(0, 30))]
    settings = Settings(layers=LayerConfig(layers=LAYERS))
    plan = make_plan(lm, text, tmp_path / "out", settings)
    assert plan.tokens
    assert plan.tokens // 10 < 20_000
    free_space(monkeypatch, temporary_folder, 0)
    with pytest.raises(InputError, match=f"x {plan.tokens // 10:,} evaluation tokens"):
        make_plan(lm, text, tmp_path / "out", replace(settings, disk_budget=1e9))


def test_a_folder_for_temporary_files_that_fills_up_is_named(
    lm: LanguageModel, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("knnlm.store.npy.NpyWriter._write", full)
    documents = [TokenDocument(np.arange(20, dtype=np.int32), "a", 1)]
    words = f"cannot write in {temporary_folder}: No space left on device; free some space or choose another TMPDIR$"
    with (
        pytest.raises(DatastoreError, match=words),
        open_queries(lm, documents, WindowConfig(16, 8), ["1.ffn_input"]),
    ):
        pytest.fail("the block ran")
    assert list(temporary_folder.iterdir()) == []


def test_of_a_large_evaluation_text_some_is_read_from_all_over_it(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenising all of 700,000 tokens took a tenth of the time of a run that evaluated 3,000 of them."""
    words = [f"{number:06d} " for number in range(60_000)]  # 420,000 characters that say where they stand
    (tmp_path / "long.txt").write_text("".join(words))
    read, encode = [], lm.encode_with_ends
    monkeypatch.setattr(lm, "encode_with_ends", lambda text: (read.append(text), encode(text))[1])
    settings = Settings(evaluation=EvalConfig(eval_tokens=3000))
    found = Job(lm, settings, Silent()).evaluation_documents([tmp_path / "long.txt"])
    assert 0.9 * 3000 < sum(len(document.tokens) for document in found) <= 3000
    assert sum(map(len, read)) < 200_000
    places = [int(lm.tokenizer.decode(document.tokens).split()[1]) for document in found]
    assert places == sorted(places) and min(places) < 20_000 and max(places) > 40_000

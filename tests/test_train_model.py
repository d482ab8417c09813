"""The script that trains a small model: too little text is an error at once, too little validation text is none."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.evaluation.test_evaluate_oracle import texts
from tests.source_files import ROOT

SHAPE = ("--blocks", "1", "--width", "16", "--heads", "2", "--vocabulary", "300", "--context", "64", "--windows", "2")


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the script on some documents; gives the folder of the model."""

    def run(documents: list[str], *options: str) -> Path:
        text = tmp_path / "text.jsonl"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        out = tmp_path / "model"
        words = ["train_model.py", "--text", str(text), "--out", str(out), "--no-compile", *SHAPE, *options]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setenv("GLIBC_TUNABLES", "")  # already set: the script does not start itself again
        runpy.run_path(str(ROOT / "scripts" / "studies" / "train_model.py"), run_name="__main__")
        return out

    return run


@pytest.mark.parametrize("documents", [[], ["one"], ["one", "two", "three"]])
def test_text_that_fills_no_step_is_said_and_not_waited_for(documents: list[str], train) -> None:
    with pytest.raises(
        SystemExit, match=r"tokens to train on, but a step of 2 windows of 64 needs 193; give more text"
    ):
        train(documents)


def test_shortest_text_that_fills_a_step_is_trained_on_without_validation(
    train, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(["short", "a" * 192], "--steps", "2", "--vocabulary", "257")
    told = capsys.readouterr().out
    assert "193 tokens" in told
    assert "no validation: 6 tokens held out" in told
    assert "validation perplexity" not in told
    assert (out / "model.safetensors").exists()


def test_validation_needs_one_window_of_the_context(train, capsys: pytest.CaptureFixture[str]) -> None:
    out = train(texts(0, 8), "--steps", "2", "--held-out", "4")
    assert "step 2 validation perplexity" in capsys.readouterr().out
    assert (out / "tokenizer.json").exists()

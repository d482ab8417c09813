"""What a user can do wrong: one line on standard error, the right exit status, and nothing left behind."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from knnlm import cli
from tests.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import save_tiny, tiny_bert, tiny_model, tiny_tokenizer

RUN = ("run", "--context", "32", "--stride", "16", "--eval-tokens", "600")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "gpt2"
    save_tiny("gpt2", folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", texts(0, 24))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process: (exit status, standard output, last line of standard error)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["knnlm", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, (err.strip().splitlines() or [""])[-1]

    return run


@pytest.fixture
def check_refused(call, model: Path, text: Path, tmp_path: Path):
    """`knnlm run` with some options: must end with status 2, one line with these words, and an untouched folder."""

    def check(*words: str, options: tuple[object, ...] = (), **changed: object) -> None:
        given = {"--model": model, "--text": text, "--out": tmp_path / "out"} | {
            f"--{name}": value for name, value in changed.items()
        }
        before = sorted(tmp_path.rglob("*"))
        status, out, line = call(*RUN, *(part for pair in given.items() for part in pair), *options)
        assert (status, out) == (2, "")
        assert line.startswith("knnlm: ")
        for word in words:
            assert word in line
        assert sorted(tmp_path.rglob("*")) == before

    return check


def test_missing_text(check_refused, tmp_path: Path) -> None:
    check_refused("nowhere.txt", text=tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ("empty",)), (b"abc\x00\x01def", ("byte 3",)), (b"\xff\xfe\x00", ("byte",)), (b"a", ("token",))],
)
def test_text_that_cannot_be_used(content: bytes, words: tuple[str, ...], check_refused, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    check_refused(*words, text=tmp_path / "text.txt")


def test_evaluation_text_is_looked_at_before_the_work(check_refused, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    check_refused("at least 64", options=("--eval-text", tmp_path / "short.txt"))


def test_json_line_without_the_field(check_refused, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"body": "words"}\n')
    check_refused("body", "line 1", text=tmp_path / "text.jsonl")


def test_fewer_keys_than_k(call, model: Path, text: Path, tmp_path: Path) -> None:
    """Known only when the keys are counted: the datastore is whole by then and stays, without a report."""
    options = ("--model", model, "--text", text, "--out", tmp_path / "out", "--layers", "-1.ffn_input", "--k", 99_999)
    status, out, line = call(*RUN, *options)
    assert (status, out) == (2, "")
    assert "--k is 99999" in line
    assert call("verify", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lambda", 1.5), ("--lambda is 1.5", "0 to 1")),
        (("--temperature", 0), ("--temperature is 0", "above 0")),
        (("--k", 0), ("--k is 0",)),
        (("--stride", 64), ("--stride 64", "--context 32")),
        (("--context", 4096), ("--context is 4096", "128")),
        (("--metric", "hamming"), ("hamming", "l2, cosine, ip")),
        (("--index", "IVFnonsense"), ("IVFnonsense", "FAISS")),
        (("--dtype", "int3"), ("int3", "float32")),
        (("--device", "abacus"), ("abacus",)),
        (("--batch-size", "many"), ("many",)),
        (("--layers", "9.ffn_input"), ("9.ffn_input", "ffn_input")),
        (("--layers", "1.middle"), ("1.middle",)),
        (("--select", "7.ffn_input"), ("7.ffn_input",)),
        (("--candidates", "7.*"), ("7.*",)),
        (("--key-dtype", "int8"), ("int8", "float16")),
        (("--protocol", "mine"), ("mine", "knn-transformers")),
        (("--disk-budget", "0.000000001"), ("--disk-budget",)),
        (("--nonsense",), ("--nonsense", "--help")),
    ],
)
def test_wrong_option(options: tuple[object, ...], words: tuple[str, ...], check_refused) -> None:
    check_refused(*words, options=options)


def test_missing_option(call) -> None:
    status, _, line = call("run", "--text", "x")
    assert (status, "--model" in line) == (2, True)


def test_model_without_a_tokenizer(check_refused, tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "bare")
    check_refused("tokenizer", model=tmp_path / "bare")


def test_encoder_only_model(check_refused, tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    check_refused("encoder", model=tmp_path / "bert")


def test_model_that_gives_nan_names_the_layer(check_refused, tmp_path: Path) -> None:
    broken = tiny_model("gpt2")
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_proj.bias[0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    check_refused("NaN", "1.ffn_output", model=tmp_path / "broken")


def test_nan_that_loading_cannot_see_names_layer_and_place(check_refused, tmp_path: Path) -> None:
    """Only position 20 is broken; the probe at loading is shorter."""
    broken = tiny_model("gpt2")
    with torch.no_grad():
        broken.transformer.wpe.weight[20] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    check_refused("0.attn_input", "not finite", "token 20 of text.jsonl", "document 1", model=tmp_path / "broken")


def test_output_that_holds_something_is_refused_before_the_model_is_loaded(check_refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    check_refused("--overwrite", model="no-such-model")
    check_refused("not", "choose another", options=("--overwrite",), model="no-such-model")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_full_disk(check_refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write of keys fails as on a full disk."""
    from knnlm import storage

    def full(*_args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.NpyWriter, "_write", full)
    check_refused("No space left")


def test_folder_that_cannot_be_written(check_refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    check_refused("file", options=(), out=tmp_path / "file" / "out")


def test_store_of_another_model(call, model: Path, text: Path, tmp_path: Path) -> None:
    assert call("build", "--model", model, "--text", text, "--out", tmp_path / "s", "--context", 32)[0] == 0
    save_tiny("llama", tmp_path / "llama")
    status, _, line = call("eval", tmp_path / "s", "--eval-text", text, "--model", tmp_path / "llama")
    assert status == 2
    assert "config" in line


PHASES = {
    "reading text": ("knnlm.pipeline.read_documents", "gone"),
    "extracting": ("knnlm.collect._forward", "gone"),
    "scoring": ("knnlm.scoring.LayerScorer.scores", "gone"),
    "evaluating": ("knnlm.pipeline.evaluate_layers", "whole"),
    "indexing": ("knnlm.pipeline.index_layer", "whole"),
    "reporting": ("knnlm.report.html.render", "whole"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_in_each_phase(
    phase: str, call, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_args: object, **_named: object) -> None:
        raise KeyboardInterrupt

    target, left = PHASES[phase]
    monkeypatch.setattr(target, stopped)
    out = tmp_path / "out"
    status, _, line = call(*RUN, "--model", model, "--text", text, "--out", out, "--layers", "*.ffn_input")
    assert status == 130
    assert "Ctrl-C" in line
    assert [path.name for path in tmp_path.iterdir()] == ([] if left == "gone" else ["out"])
    if left == "whole":
        assert not [path for path in out.rglob("*") if path.name.startswith(".")]
        assert call("verify", out)[0] == 0


def test_interrupt_of_a_real_process(model: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "long.jsonl", texts(0, 3000))
    command = [sys.executable, "-m", "knnlm.cli", *RUN, "--model", str(model), "--text", str(text)]
    out = tmp_path / "out" / "store"
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(out.parent.glob(".store.*/keys/*/*.npy")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out_text, err_text = process.communicate(timeout=60)
    assert process.returncode == 130, err_text
    assert out_text == ""
    assert err_text.strip().splitlines()[-1].startswith("knnlm: stopped by Ctrl-C")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.jsonl"]


def test_json_of_a_run_is_one_document(call, model: Path, text: Path, tmp_path: Path) -> None:
    options = ("--model", model, "--text", text, "--out", tmp_path / "out", "--layers", "*.ffn_input", "--json")
    status, out, _ = call(*RUN, *options)
    assert status == 0
    document = json.loads(out)
    assert document == json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"lm", "layers", "selected", "best", "regret", "settings", "versions"} <= set(document)
    fields = {"layer", "dispersion", "dispersion_within", "interval", "probe", "perplexity", "k", "lambda"}
    assert fields | {"temperature"} <= set(document["layers"][0])
    status, out, _ = call("info", tmp_path / "out", "--json")
    assert json.loads(out)["keys"] > 0
    status, out, _ = call("verify", tmp_path / "out", "--json")
    assert json.loads(out)["whole"] is True
    status, out, _ = call("eval", tmp_path / "out", "--eval-text", text, "--json")
    assert json.loads(out)["lm"]["perplexity"] > 1
    status, out, _ = call("score", "--model", model, "--text", text, "--context", 32, "--json")
    assert len(json.loads(out)["layers"]) == 16

"""What stands between a shell and a verb: the version, bytes that are no text, and a terminal that is not UTF-8."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from knnlm.cli import main
from knnlm.errors import ModelError
from tests.source_files import ROOT

SETTING = ("--layer", "2.ffn_input", "--k", "64", "--temperature", "4", "--lambda", "0.6")


def test_version_is_that_of_the_changelog(call) -> None:
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    asked = call("--version")
    assert newest and (asked.status, asked.out, asked.errors) == (0, f"knnlm {newest[1]}\n", ())
    assert call("--version", "run").out == asked.out  # the verb does not begin


# Arguments that are not UTF-8: Python gives their bytes as lone surrogates


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("generate", "{store}", *SETTING, "--prompt", "ok", "--prompt", "caf\udce2 x"),
            "--prompt is not UTF-8 at byte 3",
        ),
        (("explain", "{store}", *SETTING, "--text", "\udcff"), "--text is not UTF-8 at byte 0"),
        (("explain", "{store}", *SETTING, "--text", "a \ud800 b"), "--text is not UTF-8"),  # a real one
        (("eval", "{store}", "--eval-text", "any", "--index", "IVF\udce2"), "--index is not UTF-8 at byte 3"),
        (("eval", "{store}", "--eval-text", "any", "--device", "cpu\udce2"), "--device is not UTF-8 at byte 3"),
        (("train", "--model", "m", "--text", "t", "--out", "o", "--layer", "\udce2"), "--layer is not UTF-8 at byte 0"),
    ],
)
def test_argument_that_is_no_text(arguments: tuple[str, ...], told: str, call, store_folder: Path) -> None:
    refused = call(*(argument.format(store=store_folder) for argument in arguments))
    assert (refused.status, refused.out) == (2, "")
    assert refused.errors == (f"knnlm: {told}; give text in UTF-8",)


def test_a_file_may_have_any_name(call, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe2.jsonl"
    Path(os.fsdecode(odd)).write_bytes(text_file.read_bytes())
    arguments = ("--text", os.fsdecode(odd), "--context", 32, "--layers", "1.ffn_input", "--max-tokens", 2000)
    scored = call("score", "--model", gpt2_folder, *arguments, "--json")
    assert scored.status == 0 and json.loads(scored.out)["selected"] == "1.ffn_input", scored.errors


# Standard output that cannot show everything


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """What a command that ends well writes to a standard output of an encoding, in this process."""

    def run(encoding: str, *arguments: object) -> bytes:
        written = io.BytesIO()
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
            patched.setattr(sys, "argv", ["knnlm", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 0
            return written.getvalue()

    return run


GENERATE = (*SETTING, "--max-new-tokens", 2, "--prompt", "naïve 雪 λ")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_what_standard_output_cannot_show_is_replaced(
    encoding: str, shown, store_folder: Path, text_file: Path
) -> None:
    asked = ("--eval-text", text_file, "--eval-tokens", 300, "--dry-run")
    table = shown(encoding, "eval", store_folder, *asked).decode(encoding)
    assert "1.ffn_input" in table and "?" in table  # λ, and the arrow
    assert "1.ffn_input" in shown(encoding, "info", store_folder).decode(encoding)
    text = shown(encoding, "generate", store_folder, *GENERATE).decode(encoding)
    assert text.startswith("na?ve ? ?" if encoding == "ascii" else "naïve ? ?")
    explained = shown(encoding, "explain", store_folder, *SETTING, "--text", "the 雪 counts").decode(encoding)
    assert "p_kNN" in explained and "?" in explained


def test_a_real_standard_output_that_is_ascii(store_folder: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "knnlm", "info", str(store_folder)]
    ended = subprocess.run(words, env=environment, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"1.ffn_input" in ended.stdout and ended.stdout.isascii()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_json_loses_nothing_where_standard_output_is_not_utf8(encoding: str, shown, store_folder: Path) -> None:
    plain, other = (shown(one, "generate", store_folder, *GENERATE, "--json") for one in ("utf-8", encoding))
    assert "naïve 雪 λ".encode() in plain and other.isascii()
    assert json.loads(other) == json.loads(plain)


# Told before the model's weights are read


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_given: object, **_named: object) -> None:
        raise ModelError("the weights were read")

    monkeypatch.setattr("knnlm.model.loading.load_model", load)


WRONG = {
    "--layers 9.ffn_input": "no layer fits '9.ffn_input'; there are 0-2.attn_input",
    "--candidates 9.*": "no layer fits '9.*'",
    "--select 9.ffn_input": "no layer fits '9.ffn_input'",
    "--select *.ffn_input": "--select '*.ffn_input' fits 3 layers, but has to name one",
    "--text-field body": "has no field 'body', only text; name it with --text-field",
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("given", WRONG)
@pytest.mark.parametrize("verb", ["run", "build", "score"])
def test_wrong_names_are_told_before_the_weights_are_read(
    verb: str, given: str, call, gpt2_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = (verb, "--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out")
    refused = call(*arguments, *given.split())
    assert refused.status == 2 and len(refused.errors) == 1
    assert WRONG[given] in refused.errors[0]
    assert "the weights were read" in call(*arguments).errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"text": "whole"', "broken.jsonl is not JSON"),
        (b'{"text": 3}\n', "broken.jsonl is no string but int; choose with --text-field"),
    ],
)
def test_a_broken_first_line_is_told_before_the_weights_are_read(
    content: bytes, told: str, call, gpt2_folder: Path, store_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(content)
    for arguments in (
        ("run", "--model", gpt2_folder, "--text", text_file, broken, "--out", tmp_path / "out"),
        ("run", "--model", gpt2_folder, "--text", text_file, "--eval-text", broken, "--out", tmp_path / "out"),
        ("build", "--model", gpt2_folder, "--text", broken, "--out", tmp_path / "out"),
        ("score", "--model", gpt2_folder, "--text", broken),
        ("eval", store_folder, "--eval-text", broken),
    ):
        refused = call(*arguments)
        assert refused.status == 2 and told in refused.errors[0], refused.errors


def test_overwrite_is_advised_only_where_it_will_be_taken(
    call, store_folder: Path, gpt2_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for out, advised in ((store_folder, True), (tmp_path / "mine", False)):
        refused = call("build", "--model", gpt2_folder, "--text", text_file, "--out", out)
        assert refused.status == 2 and "choose another --out" in refused.errors[0]
        assert ("add --overwrite" in refused.errors[0]) == advised


# Standard streams that are closed, and a locale that is not UTF-8


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_standard_stream_may_be_closed(number: int, store_folder: Path) -> None:
    """As by `>&-`; without care Python has None there, and the next opened file gets the number."""
    words = [sys.executable, "-m", "knnlm", "info", str(store_folder)]
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "check": False}
    ended = subprocess.run(words, **options, preexec_fn=lambda: os.close(number))
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert (b"1.ffn_input" in ended.stdout) == (number != 1)


def test_standard_input_that_is_closed_is_empty(
    call, store_folder: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    refused = call("generate", store_folder, *SETTING)
    sys.stdin.close()  # the null device, which the process would have to its end
    assert refused.status == 2 and "standard input is empty; give --prompt TEXT" in refused.errors[0]


def test_text_is_utf8_in_every_locale(call, store_folder: Path) -> None:
    """A locale that cannot decode an argument gives its bytes as lone surrogates."""
    text = "the 雪 counts"
    bytes_alone = text.encode().decode("ascii", "surrogateescape")
    told = [call("explain", store_folder, *SETTING, "--text", one, "--json") for one in (text, bytes_alone)]
    assert told[0].status == 0 and told[0].out == told[1].out

"""What the command line does with its arguments before any command runs, and its help."""

from __future__ import annotations

import subprocess
import sys

import pytest

from knnlm import cli

COMMANDS = ("run", "score", "build", "eval", "info", "verify")


@pytest.mark.parametrize(
    ("given", "spread"),
    [
        ("run --text a b --out c", "run --text a --text b --out c"),
        ("run --text a --out c --eval-text d e f", "run --text a --out c --eval-text d --eval-text e --eval-text f"),
        ("eval store --eval-text a b --json", "eval store --eval-text a --eval-text b --json"),
        ("run --text a --text b --k 3", "run --text a --text b --k 3"),
        ("info store", "info store"),
        ("", ""),
    ],
)
def test_texts_may_follow_one_option(given: str, spread: str) -> None:
    assert cli._spread(given.split()) == spread.split()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["knnlm", command, "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert f"Example: knnlm {command}" in capsys.readouterr().out


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['knnlm', '--help']\n"
        "from knnlm.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'faiss', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in found.stdout for command in COMMANDS)
    assert found.stdout.strip().splitlines()[-1] == "[]"

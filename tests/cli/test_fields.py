"""The border between the library's words and the command line's: fields become options once, and nowhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from knnlm.cli.entry import app
from knnlm.cli.fields import ALIASES, VERBS, in_options, options_of
from knnlm.cli.screen import Screen
from tests.source_files import ROOT, modules, syntax

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
RUN = options_of(COMMANDS["run"])


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("`lam` is 1.5, but is a weight", "--lambda is 1.5, but is a weight"),
        ("`max_tokens` is 1", "--max-tokens is 1"),
        ("choose another `out`, or add `overwrite=True`", "choose another --out, or add --overwrite"),
        ("try `dtype='float32'`, or `k=3`", "try --dtype float32, or --k 3"),
        ("`windows` is 0", "--batch-size is 0"),
        ("take fewer `layers`, or `knnlm.build`", "take fewer --layers, or knnlm build"),
        ("batches have no `domain`; `tail=3` of `join`", "batches have no `domain`; `tail=3` of `join`"),
        ("`--lambda` and `a b` and `` stay", "`--lambda` and `a b` and `` stay"),
        ("no field in it: lam, k", "no field in it: lam, k"),
    ],
)
def test_fields_become_options_of_the_verb(message: str, told: str) -> None:
    assert in_options(message, RUN) == told


def test_a_word_is_an_option_only_of_the_verbs_that_take_it() -> None:
    advice = "take `index='exact'`, not `temperature` but `decoding.temperature`"
    assert in_options(advice, RUN) == "take --index exact, not --temperature but `decoding.temperature`"
    generating = options_of(COMMANDS["generate"])
    assert in_options(advice, generating) == "take `index='exact'`, not --temperature but --temperature-lm"
    assert in_options("`store` is gone", generating) == "STORE is gone"


def test_aliases_lead_to_options() -> None:
    taken = {name for command in COMMANDS.values() for name in options_of(command)}
    assert set(ALIASES.values()) <= taken
    assert not set(ALIASES) & taken  # else the wrong option would be named
    assert {told.removeprefix("knnlm ") for told in VERBS.values()} <= set(COMMANDS)


def test_every_setting_of_a_run_is_an_option_or_an_alias() -> None:
    """A field that is neither would be told in backticks."""
    from knnlm.config import Settings

    settings = Settings()
    groups = (settings.text, settings.layers, settings.knn, settings.evaluation)
    names = {field.name for group in groups for field in fields(group)} | {"key_dtype", "disk_budget", "memory", "seed"}
    only_in_python = {"max_k", "examples"}
    assert {name for name in names if ALIASES.get(name, name) not in RUN} == only_in_python


def literals(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


LIBRARY = {
    name: path
    for package in ("knnlm", "index")
    for name, path in modules(package).items()
    if not name.startswith("knnlm.cli")
}


def test_the_library_names_no_option() -> None:
    """From Python a user has fields; the command line puts its own names in."""
    assert "knnlm.config" in LIBRARY and "index.spec" in LIBRARY
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in LIBRARY.values()
        for line, text in literals(path)
        if re.search(r"(?<!var\()--[a-z]", text)
    ]
    assert found == []
    assert any("--lambda" in text for _, text in literals(ROOT / "knnlm" / "cli" / "options.py"))


def test_fields_in_messages_are_written_as_fields() -> None:
    """What stands in backticks and is no option of any verb is a name of Python's, and those are few."""
    known = {name for command in COMMANDS.values() for name in options_of(command)} | set(ALIASES)
    raised = {
        word
        for path in LIBRARY.values()
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.Raise)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
        for word in re.findall(r"`([a-z][a-z_.]*)(?:=[^`]*)?`", part.value)
    }
    assert {"lam", "k", "overwrite", "select"} & raised
    assert raised - known - {name.strip("`") for name in VERBS} <= {"domain", "remove_unused_columns", "text_so_far"}


def test_the_screen_shows_notes_warnings_and_lines_in_options(capfd: pytest.CaptureFixture[str]) -> None:
    from rich.text import Text

    screen = Screen(False, lambda line: in_options(line, RUN))
    screen.note("keeping to the candidates; raise `disk_budget`")
    screen.say("see `layers`")
    screen.say(Text("Warning: a `lam` below 1 mends it.", style="yellow"))
    assert capfd.readouterr() == (
        "see --layers\nWarning: a --lambda below 1 mends it.\n",
        "keeping to the candidates; raise --disk-budget\n",
    )

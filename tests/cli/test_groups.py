"""Groups of options: what typer sees of a verb, and what the verb gets."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from knnlm.cli.groups import Place, expanded

Size = Annotated[int, typer.Option("--size")]
Name = Annotated[str, typer.Option("--name")]
File = Annotated[list[str] | None, typer.Option("--file"), Place()]


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: Size = 3


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: Name
    inner: Inner
    file: File = None


@dataclass(frozen=True, kw_only=True)
class Again:
    size: Size = 4


got: list[object] = []


def verb(*, first: Annotated[bool, typer.Option("--first")] = False, outer: Outer, last: float = 0.5) -> None:
    """A verb."""
    got.append((first, outer, last))


def clashing(*, inner: Inner, again: Again) -> None:
    """Two options of one name."""


def test_options_stand_where_their_group_does() -> None:
    shown = inspect.signature(expanded(verb)).parameters
    assert list(shown) == ["first", "name", "size", "file", "last"]
    assert [one.default for one in shown.values()] == [False, inspect.Parameter.empty, 3, None, 0.5]
    assert inspect.getdoc(expanded(verb)) == "A verb."


def test_verb_gets_its_groups_built() -> None:
    app = typer.Typer()
    app.command()(expanded(verb))
    got.clear()
    assert CliRunner().invoke(app, ["--name", "a", "--size", "7", "--file", "x", "--first"]).exit_code == 0
    assert CliRunner().invoke(app, ["--name", "b"]).exit_code == 0
    assert CliRunner().invoke(app, []).exit_code == 2  # a field without a default has to be given
    assert got == [
        (True, Outer(name="a", inner=Inner(size=7), file=["x"]), 0.5),
        (False, Outer(name="b", inner=Inner(size=3)), 0.5),
    ]


def test_two_options_of_one_name_are_an_error_of_the_code() -> None:
    with pytest.raises(ValueError, match="duplicate parameter name: 'size'"):
        expanded(clashing)

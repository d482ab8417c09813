"""Fixtures of the command line's tests: a command that must be refused, before any work where there is no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from knnlm.errors import ModelError
from tests.cli.refusals import PLAN, RUN, tree


@pytest.fixture
def check_refused(call, tmp_path: Path) -> Callable[..., None]:
    """A command must end in status 2, with nothing on standard output, one line with these words, and no new file."""

    def check(*arguments: object, words: tuple[str, ...]) -> None:
        before = tree(tmp_path)
        ended = call(*arguments)
        assert (ended.status, ended.out) == (2, "")
        *others, line = ended.errors
        assert [other for other in others if not other.startswith(PLAN)] == []
        assert line.startswith("knnlm: ")
        assert [word for word in words if word not in line] == []
        assert tree(tmp_path) == before

    return check


@pytest.fixture
def run_refused(check_refused, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> Callable[..., None]:
    """`refused` for `knnlm run`, that would go well but for what is given."""

    def check(*words: str, options: tuple[object, ...] = (), **changed: object) -> None:
        given = {"model": gpt2_folder, "text": text_file, "out": tmp_path / "deep" / "out"} | changed
        pairs = [part for name, value in given.items() for part in (f"--{name}", value)]
        check_refused(*RUN, *pairs, *options, words=words)

    return check


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model would be work; what is refused before it is refused before any."""

    def load(*_given: object, **_named: object) -> None:
        raise ModelError("work began")

    monkeypatch.setattr("knnlm.model.loading.load_model", load)

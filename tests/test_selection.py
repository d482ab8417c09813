"""`scripts/test -k WORD` imports only the files that can have such a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import may_have


@pytest.mark.parametrize(
    ("expression", "due"),
    [
        ("", True),
        ("Distance", True),  # pytest's -k does not mind the case
        ("knn", True),  # the folder
        ("cosine", False),
        ("cosine or distance", True),
        ("(cosine and ranks)", False),
        ("not distance", True),
    ],
)
def test_files_without_any_of_the_words_are_left_out(expression: str, due: bool, tmp_path: Path) -> None:
    path = tmp_path / "knn" / "test_searcher.py"
    path.parent.mkdir()
    path.write_text("def test_distance(): ...\n")
    assert may_have(expression, path, tmp_path) is due

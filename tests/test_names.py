"""Short names: the ends of paths that tell them apart."""

from __future__ import annotations

import pytest

from knnlm.files import path_tails, short_names


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["runs/a/final"], ["final"]),
        (["a/x", "b/x", "b/y"], ["a/x", "b/x", "y"]),
        (["x", "a/x"], ["x", "a/x"]),
        (["b/x", "a/b/x", "c/b/x"], ["b/x", "a/b/x", "c/b/x"]),
        (["/data/x", "/more/x/"], ["data/x", "more/x"]),
        ([], []),
    ],
)
def test_names_are_as_short_as_can_be(names, short):
    assert short_names(names) == short


def test_tails_begin_with_the_whole():
    assert path_tails("runs/a/final/") == ["runs/a/final", "a/final", "final"]

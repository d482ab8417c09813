"""The sets that a command names: questions read once, texts looked for, each under a name of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from knnlm.errors import InputError
from knnlm.files import short_names
from knnlm.studies.slices.questions import Question, read_questions
from knnlm.text.corpus import text_bytes
from knnlm.text.hub import HUB_PREFIX


@dataclass(frozen=True, eq=False)
class GivenSets:
    """Sets by name, in the order in which they were given."""

    questions: Mapping[str, Sequence[Question]]
    cloze: Mapping[str, str]
    """Where the texts are; they are read when their turn comes."""


def read_sets(
    questions: Sequence[str | Path], cloze: Sequence[str | Path] = (), *, text_field: str = "text"
) -> GivenSets:
    """Read all questions, and see whether the texts are there. Files are named by the shortest end of their path.

    :raises InputError: no set, the same one twice, or one that cannot be used.
    """
    paths = [str(path) for path in (*questions, *cloze)]
    if not paths:
        raise InputError("no set was given; name questions with `questions`, or a text with `cloze`")
    _check_different(paths)
    if cloze:
        text_bytes(cloze, text_field=text_field)
    named = list(zip(_names(paths), paths, strict=True))
    return GivenSets(
        questions={name: read_questions(path) for name, path in named[: len(questions)]},
        cloze=dict(named[len(questions) :]),
    )


def _check_different(paths: Sequence[str]) -> None:
    seen: set[str] = set()
    for path in paths:
        place = path if path.startswith(HUB_PREFIX) else os.path.realpath(path)
        if place in seen:
            raise InputError(f"{path} is given twice; leave one out")
        seen.add(place)


def _names(paths: Sequence[str]) -> list[str]:
    """Hub sets keep their names."""
    files = [os.path.normpath(path) for path in paths if not path.startswith(HUB_PREFIX)]
    short = iter(short_names(files))
    return [path if path.startswith(HUB_PREFIX) else next(short) for path in paths]

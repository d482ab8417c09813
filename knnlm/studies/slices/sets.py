"""The sets given to a command, under distinct names: questions are read, texts checked for existence."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from knnlm.errors import InputError
from knnlm.files import short_names
from knnlm.places import HUB_PREFIX
from knnlm.studies.slices.questions import Question, read_questions
from knnlm.text.corpus import text_bytes


@dataclass(frozen=True, eq=False)
class GivenSets:
    """Sets by name, in the order given."""

    questions: Mapping[str, Sequence[Question]]
    cloze: Mapping[str, str]
    """Paths of the texts, which are read later."""


def read_sets(
    questions: Sequence[str | Path], cloze: Sequence[str | Path] = (), *, text_field: str = "text"
) -> GivenSets:
    """Read all questions and check that the texts exist. Files are named by the shortest distinct ending of their path.

    :raises InputError: no set, a repeated one, or an unusable one.
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

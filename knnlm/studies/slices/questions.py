"""Multiple-choice questions from JSON Lines and hub sets, in the layouts of this project, ARC and MMLU.

    {"question": "…", "choices": ["a", "b"], "answer": 1}                                 also MMLU (cais/mmlu)
    {"question": "…", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}     ARC (allenai/ai2_arc)

A set without answers is a set of prompts: only the field `question` is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from knnlm.errors import InputError
from knnlm.text.corpus import read_rows
from knnlm.text.textfiles import Row, whole_characters

_ANSWERS = ("answer", "answerKey")


@dataclass(frozen=True)
class Question:
    """One question and its source."""

    text: str
    choices: tuple[str, ...]
    """At least two choices; none if the answer is unknown."""
    answer: int | None
    """Index of the right choice; None if the set has no answers."""
    source: str
    """The file's base name, or the hub set as given."""
    number: int
    """Line of the file or row of the hub set, from 1."""
    where: str
    """Location for messages: `line 3 of questions.jsonl`."""

    @property
    def prompt(self) -> str:
        """The prompt of lm-eval's ARC tasks. A choice follows it after a space."""
        return f"Question: {self.text}\nAnswer:"


def read_questions(path: str | Path) -> list[Question]:
    """Read all questions of a .jsonl file or a hub set such as `hf:allenai/ai2_arc/ARC-Challenge:test`.

    :raises InputError: a row that is not a question, answers in some rows only, or no rows.
    """
    questions = [_question(row) for row in read_rows(path)]
    if not questions:
        raise InputError(f"{path} has no questions; give one JSON object on each line")
    known = questions[0].answer is not None
    for question in questions:
        if (question.answer is not None) != known:
            with_it, without = (questions[0], question) if known else (question, questions[0])
            raise InputError(f"{without.where} has no answer, but {with_it.where} has one; give all answers, or none")
    return questions


def _question(row: Row) -> Question:
    if "question" not in row.fields:
        raise InputError(f"{row.where} has no field 'question', only {', '.join(row.fields) or 'none'}; add it")
    text = _text(row.fields["question"], "question", row.where)
    choices, answer = _choices_and_answer(row) if _has_answer(row.fields) else ((), None)
    return Question(text, choices, answer, row.source, row.number, row.where)


def _has_answer(fields: Mapping[str, object]) -> bool:
    return any(fields.get(name) is not None for name in _ANSWERS)


def _choices_and_answer(row: Row) -> tuple[tuple[str, ...], int]:
    given = row.fields.get("choices")
    listed = given.get("text") if isinstance(given, dict) else given
    if not isinstance(listed, list) or len(listed) < 2:
        found = f"{len(listed)} of them" if isinstance(listed, list) else type(listed).__name__
        raise InputError(f"'choices' in {row.where} must be a list of at least 2 texts, got {found}; mend or remove it")
    choices = tuple(_text(choice, f"choice {number}", row.where) for number, choice in enumerate(listed))
    labels = given.get("label") if isinstance(given, dict) else None
    return choices, _answer(row, len(choices), labels)


def _answer(row: Row, count: int, labels: object) -> int:
    answer = next(row.fields[name] for name in _ANSWERS if row.fields.get(name) is not None)
    if isinstance(labels, list) and len(labels) == count:
        if answer in labels:
            return labels.index(answer)
        due = f"one of the labels {', '.join(map(str, labels))}"
    else:
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < count:
            return answer
        due = f"the index of a choice, 0 to {count - 1}"
    raise InputError(f"the answer in {row.where} is {answer!r}, but must be {due}; mend or remove it")


def _text(value: object, what: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "empty" if isinstance(value, str) else f"no string but {type(value).__name__}"
        raise InputError(f"{what} in {where} is {found}; mend or remove it")
    return whole_characters(value)

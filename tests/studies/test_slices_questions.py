"""Questions from files: three layouts, and everything that a row can lack, each in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from knnlm.errors import InputError
from knnlm.studies.slices.questions import read_questions

OURS = {"question": "Which is a fruit?", "choices": ["stone", "apple", "chair"], "answer": 1}
ARC = {
    "id": "Mercury_7175875",
    "question": "Which is a fruit?",
    "choices": {"text": ["stone", "apple"], "label": ["A", "B"]},
    "answerKey": "B",
}
MMLU = {"question": "Which is a fruit?", "subject": "botany", "choices": ["stone", "apple", "ice", "tin"], "answer": 1}


@pytest.fixture
def write(tmp_path: Path):
    def write(*rows: object) -> Path:
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("row", [OURS, ARC, MMLU], ids=["ours", "arc", "mmlu"])
def test_layouts(write, row):
    (question,) = read_questions(write(row))
    assert (question.choices[question.answer], question.number, question.source) == ("apple", 1, "questions.jsonl")
    assert question.prompt == "Question: Which is a fruit?\nAnswer:"


def test_arc_labels_may_be_numbers_as_text(write):
    row = ARC | {"choices": {"text": ["stone", "apple"], "label": ["1", "2"]}, "answerKey": "1"}
    assert read_questions(write(row))[0].answer == 0


def test_a_set_without_answers_needs_questions_only(write):
    prompts = read_questions(write({"question": "Why?"}, OURS | {"answer": None}))
    assert [(one.text, one.choices, one.answer) for one in prompts] == [
        ("Why?", (), None),
        (OURS["question"], (), None),
    ]


def test_half_a_character_is_replaced(write):
    (question,) = read_questions(write(OURS | {"question": "What is \ud800?"}))
    assert question.text == "What is \ufffd?"


WITHOUT = {key: value for key, value in OURS.items() if key != "question"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (WITHOUT, "has no field 'question', only choices, answer; add it"),
        (OURS | {"question": 7}, "question in line 2 of {} is no string but int; mend or remove it"),
        (OURS | {"question": " "}, "question in line 2 of {} is empty; mend or remove it"),
        (OURS | {"choices": ["one"]}, "'choices' in line 2 of {} must be a list of at least 2 texts, got 1 of them"),
        (OURS | {"choices": None}, "'choices' in line 2 of {} must be a list of at least 2 texts, got NoneType"),
        (OURS | {"choices": ["a", 2]}, "choice 1 in line 2 of {} is no string but int"),
        (OURS | {"choices": ["a", ""]}, "choice 1 in line 2 of {} is empty"),
        (OURS | {"answer": 3}, "the answer in line 2 of {} is 3, but must be the index of a choice, 0 to 2"),
        (OURS | {"answer": -1}, "is -1, but must be the index of a choice, 0 to 2"),
        (OURS | {"answer": True}, "is True, but must be the index"),
        (OURS | {"answer": "B"}, "is 'B', but must be the index"),
        (ARC | {"answerKey": "C"}, "the answer in line 2 of {} is 'C', but must be one of the labels A, B"),
        ({"question": "Why?"}, "line 2 of {} has no answer, but line 1 of {} has one; give all answers, or none"),
        ([1], "line 2 of {} is no JSON object but list"),
    ],
)
def test_rows_that_are_no_questions(write, row, words):
    path = write(OURS, row)
    with pytest.raises(InputError) as refused:
        read_questions(path)
    assert words.replace("{}", str(path)) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_answer_after_prompts_without(write):
    path = write({"question": "Why?"}, OURS)
    with pytest.raises(InputError, match=r"line 1 of .* has no answer, but line 2 of .* has one"):
        read_questions(path)


def test_no_questions_at_all(tmp_path):
    path = tmp_path / "blank.jsonl"
    path.write_text("\n\n")
    with pytest.raises(InputError, match=r"blank\.jsonl has no questions; give one JSON object on each line"):
        read_questions(path)
    path.write_text("")
    with pytest.raises(InputError, match="is empty"):
        read_questions(path)

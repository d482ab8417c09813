"""Sets of items: multiple-choice questions, and cloze items cut from text.

A cloze item is a stretch of a document and its next token; it is answered correctly if that token is the likeliest.

Legend: Q items, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnlm.extraction.prompts import PromptVectors, most_likely_next, read_prompts
from knnlm.layer_names import FINAL
from knnlm.model.lm import LanguageModel
from knnlm.progress import Progress
from knnlm.studies.slices.likelihoods import ChoiceScores, score_choices
from knnlm.studies.slices.questions import Question
from knnlm.text.clusters import text_clusters
from knnlm.text.corpus import read_documents, tokenize
from knnlm.text.segments import Segment, cut_segments, sample_segments
from knnlm.text.windows import Window, unscored_window

Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's answers to Q items with known right answers."""

    correct_Q: Flags
    """Whether the answer by plain likelihood is right (lm-eval's `acc`); for cloze items, the likeliest token."""
    correct_normalized_Q: Flags | None
    """The same with likelihood normalised by length in characters (`acc_norm`); None for cloze items."""
    confidence_Q: NDArray[np.float64]
    """The model's probability of its answer, among the choices or among all tokens."""
    chance: float | None
    """Accuracy of random guesses; None for cloze items."""


@dataclass(frozen=True, eq=False)
class ItemSet:
    """Q items of one set, with a model's vectors and answers."""

    name: str
    vectors: Mapping[str, PromptVectors]
    """For each layer: the vectors of the prompts' last tokens, and the dispersion within each prompt."""
    lengths_Q: NDArray[np.int64]
    """Number of tokens of each prompt as given to the model."""
    clusters_Q: NDArray[np.int64]
    """Cluster of each item, for the intervals: the item itself, or its stretch of text."""
    answers: Answers | None
    """None if the right answers are unknown."""
    describe: Callable[[int], Mapping[str, Any]]
    """Returns an item as a row of the file for `tail_out`."""
    notes: tuple[str, ...] = ()


def question_set(
    lm: LanguageModel, name: str, questions: Sequence[Question], layers: Sequence[str], progress: Progress
) -> ItemSet:
    """Score multiple-choice questions, or only their prompts if no answers are known.

    :raises InputError: as `score_choices`.
    """
    scores = None
    prompts = [_prompt(lm, question) for question in questions]
    if questions[0].answer is not None:
        with progress.stage(f"choices of {name}", "choices") as advance:
            scores = score_choices(lm, questions, advance=advance)
    with progress.stage(f"prompts of {name}", "items") as advance:
        vectors = read_prompts(lm, prompts, layers, advance=advance)
    cut = max(sum(prompt.start > 0 for prompt in prompts), scores.cut if scores else 0)
    note = (
        f"{cut} of {len(questions)} prompts of {name} are over {lm.context_limit} tokens: their beginning is left out"
    )
    return ItemSet(
        name=name,
        vectors=vectors,
        lengths_Q=np.array([len(prompt.inputs) for prompt in prompts]),
        clusters_Q=np.arange(len(questions)),
        answers=_answers(questions, scores) if scores else None,
        describe=partial(_describe_question, questions, scores),
        notes=(note,) if cut else (),
    )


def _prompt(lm: LanguageModel, question: Question) -> Window:
    tokens = lm.encode(question.prompt)
    dropped = 0 if lm.context_limit is None else max(0, len(tokens) - lm.context_limit)
    return unscored_window(tokens[dropped:], start=dropped, source=question.source, number=question.number)


def _answers(questions: Sequence[Question], scores: ChoiceScores) -> Answers:
    right_Q = np.array([question.answer for question in questions])
    return Answers(
        correct_Q=scores.predicted_Q == right_Q,
        correct_normalized_Q=scores.predicted_normalized_Q == right_Q,
        confidence_Q=scores.confidence_Q,
        chance=float(np.mean([1 / len(question.choices) for question in questions])),
    )


def _describe_question(questions: Sequence[Question], scores: ChoiceScores | None, at: int) -> dict[str, Any]:
    question = questions[at]
    told: dict[str, Any] = {"source": question.source, "number": question.number, "question": question.text}
    if scores is None:
        return told
    predicted = int(scores.predicted_Q[at])
    known = {"choices": list(question.choices), "answer": question.answer}
    return told | known | {"predicted": predicted, "correct": predicted == question.answer}


def cloze_set(
    lm: LanguageModel,
    name: str,
    text: str,
    layers: Sequence[str],
    progress: Progress,
    *,
    context: int,
    max_segments: int,
    text_field: str,
    seed: int,
) -> ItemSet:
    """Cut a text into disjoint stretches of `context` tokens, and predict the next token of each.

    :raises InputError: the text is too short for one.
    """
    documents = tokenize(read_documents([text], text_field=text_field), lm.encode)
    segments = sample_segments(cut_segments(documents, context + 1), max_segments, seed=seed)
    prompts = [
        unscored_window(one.tokens_T[:-1], start=one.start, source=one.source, number=one.number) for one in segments
    ]
    with progress.stage(f"cloze items of {name}", "items") as advance:
        vectors = read_prompts(lm, prompts, tuple(dict.fromkeys((*layers, FINAL))), advance=advance)
    predicted_Q, confidence_Q = most_likely_next(lm, vectors[FINAL].last_QD)
    next_Q = np.array([segment.tokens_T[-1] for segment in segments])
    return ItemSet(
        name=name,
        vectors={layer: vectors[layer] for layer in layers},
        lengths_Q=np.full(len(prompts), context),
        clusters_Q=text_clusters(segments),
        answers=Answers(predicted_Q == next_Q, None, confidence_Q, None),
        describe=partial(_describe_cloze, lm, segments, predicted_Q),
    )


def _describe_cloze(
    lm: LanguageModel, segments: Sequence[Segment], predicted_Q: NDArray[np.int64], at: int
) -> dict[str, Any]:
    segment, predicted = segments[at], int(predicted_Q[at])
    return {
        "source": segment.source,
        "number": segment.number,
        "start": segment.start,
        "text": lm.decode(segment.tokens_T[:-1]),
        "next": lm.decode(segment.tokens_T[-1:]),
        "predicted": lm.decode([predicted]),
        "correct": predicted == int(segment.tokens_T[-1]),
    }

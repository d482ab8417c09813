"""Log-likelihood of each choice of a question, equal to that of lm-evaluation-harness (lm-eval 0.4.13).

The prompt is `Question.prompt`, the continuation a space and the choice; what follows is that harness's
`TemplateLM._encode_pair`, `HFLM._loglikelihood_tokens` and `ConfigurableTask.process_results`.

Legend: Q questions, C choices of a question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knnlm.errors import InputError
from knnlm.extraction.prompts import log_likelihoods
from knnlm.model.lm import LanguageModel
from knnlm.progress import Advance, ignore
from knnlm.studies.slices.questions import Question
from knnlm.text.windows import Window

Float64 = NDArray[np.float64]
Tokens = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """A model's scores of the choices of Q questions."""

    log_likelihoods: tuple[Float64, ...]
    """For each question, [C]: the sum of log p over the tokens of each choice."""
    predicted_Q: NDArray[np.int64]
    """The likeliest choice, as in lm-eval's `acc`."""
    predicted_normalized_Q: NDArray[np.int64]
    """The choice with the highest likelihood normalised by length in characters, as in `acc_norm`."""
    confidence_Q: Float64
    """Probability of the likeliest choice, relative to that of all choices."""
    cut: int
    """Number of questions whose prompt was truncated at its beginning to fit the model's context."""


def encode_pair(encode: Callable[[str], Tokens], context: str, continuation: str) -> tuple[Tokens, Tokens]:
    """Return the tokens of a context and of its continuation.

    White space at the end of the context is moved to the continuation. The whole is encoded, then split after as many
    tokens as the context alone has.
    """
    bare = context.rstrip()
    whole, before = encode(context + continuation), encode(bare)
    return whole[: len(before)], whole[len(before) :]


def score_choices(lm: LanguageModel, questions: Sequence[Question], *, advance: Advance = ignore) -> ChoiceScores:
    """Score the choices of questions with known answers; prompts too long for the model lose their beginning.

    :raises InputError: a choice longer than the model's context, or without tokens.
    """
    pairs = [_window(lm, question, choice) for question in questions for choice in range(len(question.choices))]
    borders = np.cumsum([len(question.choices) for question in questions])[:-1]
    scores = tuple(np.split(log_likelihoods(lm, pairs, advance=advance), borders))
    lengths = [np.array([len(choice) for choice in question.choices]) for question in questions]
    return ChoiceScores(
        log_likelihoods=scores,
        predicted_Q=np.array([one.argmax() for one in scores]),
        predicted_normalized_Q=np.array([(one / length).argmax() for one, length in zip(scores, lengths, strict=True)]),
        confidence_Q=np.array([1 / np.exp(one - one.max()).sum() for one in scores]),
        cut=len({pair.number for pair in pairs if pair.start}),
    )


def _window(lm: LanguageModel, question: Question, choice: int) -> Window:
    context, continuation = encode_pair(lm.encode, question.prompt, f" {question.choices[choice]}")
    limit = lm.context_limit
    if not len(continuation) or (limit is not None and len(continuation) > limit):
        due = f"but {lm.name} takes 1 to {limit} at once" if limit else "but needs one"
        raise InputError(
            f"choice {choice} in {question.where} has {len(continuation)} tokens, {due}; leave the question out"
        )
    whole = np.concatenate([context, continuation])
    dropped = 0 if limit is None else max(0, len(whole) - limit - 1)
    whole = whole[dropped:]
    first = len(whole) - len(continuation) - 1
    return Window(whole[:-1], whole[1:], first, 0, dropped, question.source, question.number)

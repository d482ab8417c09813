"""Choices against lm-eval's arithmetic, written again here on `transformers`' own logits: one item, no padding.

docs/slices.md has the comparison with the harness itself.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from knnlm.errors import InputError
from knnlm.model.lm import LanguageModel
from knnlm.studies.slices.likelihoods import encode_pair, score_choices
from knnlm.studies.slices.questions import Question
from tests.tiny_models import CONTEXT, tiny_model, tiny_tokenizer

WORDS = "the nurse takes temperature of patients who slept badly in a ward along the river".split()


def question(text: str, *choices: str, answer: int = 0, number: int = 1) -> Question:
    return Question(text, choices, answer, "questions.jsonl", number, f"line {number} of questions.jsonl")


def random_questions(count: int) -> list[Question]:
    rng = np.random.default_rng(5)
    phrase = lambda most: " ".join(rng.choice(WORDS, rng.integers(1, most)))  # noqa: E731
    # Up to 60 words: some prompts are longer than the model's context.
    return [
        question(phrase(60), *(phrase(6) for _ in range(rng.integers(2, 6))), number=number)
        for number in range(1, count + 1)
    ]


def tiny(kind: str = "gpt2", *, bos: bool = False) -> LanguageModel:
    tokenizer = tiny_tokenizer()
    if bos:
        end = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{end} $A", special_tokens=[(end, tokenizer.bos_token_id)]
        )
    return LanguageModel.from_model(tiny_model(kind), tokenizer, name=kind)


def lm_eval_log_likelihood(lm: LanguageModel, context: str, continuation: str) -> float:
    """What lm-eval 0.4.13 does for one request: `_encode_pair`, then `_loglikelihood_tokens`."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, before = lm.tokenizer.encode(context + continuation), lm.tokenizer.encode(context)
    ending = whole[len(before) :]
    inputs = (before + ending)[-(CONTEXT + 1) :][:-1]
    with torch.inference_mode():
        table = torch.log_softmax(lm.model(torch.tensor([inputs])).logits[0].float(), dim=-1)
    return math.fsum(float(table[at - len(ending), token]) for at, token in enumerate(ending))


@pytest.mark.parametrize(("kind", "bos"), [("gpt2", False), ("gpt2", True), ("llama", True), ("gemma2", False)])
def test_same_numbers_as_lm_eval(kind, bos):
    lm, questions = tiny(kind, bos=bos), random_questions(24)
    scores = score_choices(lm, questions)
    for at, (one, found) in enumerate(zip(questions, scores.log_likelihoods, strict=True)):
        due = np.array([lm_eval_log_likelihood(lm, one.prompt, f" {choice}") for choice in one.choices])
        np.testing.assert_allclose(found, due, rtol=0, atol=1e-4)
        assert scores.predicted_Q[at] == np.argmax(due)
        assert scores.predicted_normalized_Q[at] == np.argmax(due / [len(choice) for choice in one.choices])
        assert scores.confidence_Q[at] == pytest.approx((np.exp(due) / np.exp(due).sum()).max(), abs=1e-4)
    lengths = [len(lm.encode(f"{one.prompt} {choice}")) for one in questions for choice in one.choices]
    assert 0 < scores.cut < len(questions) and max(lengths) > CONTEXT + 1


def test_questions_that_were_cut_are_counted_once_each():
    long = question("the river " * 70, "a", "b", "c", number=2)
    assert score_choices(tiny(), [question("short", "a", "b"), long]).cut == 1


def test_accuracies_differ_where_choices_differ_in_length():
    # Random weights: each token costs about log 288, so the shortest choice is the likeliest, the longest per character
    # is not settled by that.
    questions = random_questions(24)
    scores = score_choices(tiny(), questions)
    assert (scores.predicted_Q != scores.predicted_normalized_Q).any()


@pytest.mark.parametrize(
    ("context", "continuation"), [("Q: why\nA:", " the"), ("Q: why\nA: ", "the"), ("Q: why \n\n ", " the")]
)
def test_white_space_at_the_end_of_the_context_goes_to_the_continuation(context, continuation):
    encode = tiny().encode
    before, ending = encode_pair(encode, context, continuation)
    assert before.tolist() == encode(context.rstrip()).tolist()
    assert [*before, *ending] == encode(context + continuation).tolist()
    assert len(ending) > 0


def test_a_choice_longer_than_the_context_is_refused():
    one = question("Why?", "a", "river " * 200)
    with pytest.raises(InputError, match=rf"choice 1 in line 1 of .* tokens, but gpt2 takes 1 to {CONTEXT} at once"):
        score_choices(tiny(), [one])


def test_a_choice_of_no_token_is_refused(monkeypatch):
    lm = tiny()
    monkeypatch.setattr(lm, "encode", lambda text: np.arange(min(len(text), 20), dtype=np.int32))
    with pytest.raises(InputError, match=r"choice 0 in line 1 of .* has 0 tokens.*leave the question out"):
        score_choices(lm, [question("Why is it so?", "a", "b")])

"""A limit on tokens takes text evenly from all of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from knnlm.config import Settings, TextConfig
from knnlm.model.lm import LanguageModel
from knnlm.pipeline.job import Job
from knnlm.progress import Silent
from knnlm.text.held_out import hold_out
from tests.evaluation.test_evaluate_oracle import write_jsonl
from tests.tiny_models import tiny_model, tiny_tokenizer

WORDS = np.random.default_rng(0).choice(["the ", "nurse ", "takes ", "pulse ", "and ", "notes ", "it.\n"], 60_000)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="tiny")


def job(lm: LanguageModel, max_tokens: int | None, told: list[str] | None = None) -> Job:
    progress = Silent()
    if told is not None:
        progress.note = told.append  # type: ignore[method-assign]
    return Job(lm, Settings(text=TextConfig(max_tokens=max_tokens)), progress)


CORPORA = {
    "one long document": ["".join(WORDS)],
    "forty documents": ["".join(part) for part in np.array_split(WORDS, 40)],
    "a long one among short ones": ["".join(WORDS[:20]), "".join(WORDS[20:55_000]), *WORDS[55_000:].reshape(-1, 50)],
}


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("limit", [600, 5_000, 40_000])
def test_tokens_come_evenly_from_all_of_the_text(lm, corpus, limit, tmp_path: Path):
    texts = ["".join(one) for one in CORPORA[corpus]]
    path = write_jsonl(tmp_path / "text.jsonl", texts)
    kept = list(job(lm, limit).documents([path]))
    assert 0.9 * limit <= sum(len(one.tokens) for one in kept) <= limit
    whole = "".join(texts)
    places, place = [], 0
    for one in kept:  # in the order of the text, as it was; the last can be cut
        piece = lm.tokenizer.decode(one.tokens)[2:-2]
        place = whole.index(piece, place)
        places.append(place / len(whole))
        place += len(piece)
    places.append(place / len(whole))
    assert places[0] < 0.2 and places[-1] > 0.75
    assert max(after - before for before, after in pairwise(places)) < 0.3


def test_all_of_a_text_that_is_short_enough(lm, tmp_path: Path):
    path = write_jsonl(tmp_path / "text.jsonl", CORPORA["forty documents"])
    limited, whole = (list(job(lm, limit).documents([path])) for limit in (10**6, None))
    assert [one.tokens.tolist() for one in limited] == [one.tokens.tolist() for one in whole]


def test_sections_of_one_document_are_held_out_together(lm, tmp_path: Path):
    path = write_jsonl(tmp_path / "text.jsonl", CORPORA["forty documents"])
    kept = list(job(lm, 40_000).documents([path]))
    assert len(kept) > len({one.number for one in kept})
    parts = hold_out(iter(kept), max_tokens=None, seed=0)
    trained = {one.number for one in parts.training}
    assert parts.evaluation and trained
    assert not trained & {one.number for one in parts.evaluation}


def test_a_hub_set_is_read_from_its_beginning_and_that_is_said(lm):
    told: list[str] = []
    job(lm, 6_000, told).tell_what_is_taken(["hf:some/set"])
    assert told == ["the size of a hub set is not known: the first 6,000 tokens are taken"]
    job(lm, None, told).tell_what_is_taken(["hf:some/set"])
    assert len(told) == 1

"""The copying guard: generated text against the datastore's documents, by every way of decoding."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm import KNNLM
from knnlm.errors import InputError
from knnlm.inference.copying import CopyGuard, GuardProcessor
from knnlm.inference.store_text import StoreText, text_bytes
from knnlm.inference.writer import Decoding, Writer
from knnlm.knn.citing import DocumentMap
from knnlm.knn.mixing import Mix
from tests.evaluation.test_evaluate_oracle import texts
from tests.inference.test_generation import GATE, PROMPTS, encode, knn_of, padded, stores  # noqa: F401 - fixtures

DOCUMENTS = [encode(text) for text in texts(0, 6)]


def longest_copied(tokens: list[int], documents: list[list[int]]) -> int:
    """The longest run of tokens in one document, by comparing all runs."""
    found = 0
    for length in range(1, len(tokens) + 1):
        runs = {tuple(one[at : at + length]) for one in documents for at in range(len(one) - length + 1)}
        if not any(tuple(tokens[at : at + length]) in runs for at in range(len(tokens) - length + 1)):
            break
        found = length
    return found


def make_store(documents: list[list[int]]) -> SimpleNamespace:
    lengths = [len(one) - 1 for one in documents]
    rows = np.cumsum([0, *lengths[:-1]])
    table = np.array([[row, one[0], 0, number] for number, (row, one) in enumerate(zip(rows, documents, strict=True))])
    values = np.concatenate([np.array(one[1:], np.int32) for one in documents])
    return SimpleNamespace(documents=table, values=values, count=len(values), sources=("a.jsonl",))


def make_text(documents: list[list[int]]) -> StoreText:
    store = make_store(documents)
    return StoreText(store, DocumentMap(store))


def test_the_text_takes_no_more_than_is_foretold() -> None:
    documents = np.random.default_rng(0).integers(0, 5000, (300, 1000)).tolist()
    store = make_store(documents)
    known = DocumentMap(store)
    tracemalloc.start()
    try:
        text = StoreText(store, known)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        assert text.longest_runs(documents[7][:50])[7].tokens == 50
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    due = text_bytes(store)
    assert 16 * 300_000 < due < 17 * 300_000
    assert 0.8 * due < peak < 1.02 * due and 0.45 * due < kept < 0.55 * due and used < due


@settings(max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=30), min_size=1, max_size=6),
    run=st.lists(st.integers(0, 4), min_size=1, max_size=6),
)
def test_followers_and_longest_runs_equal_a_comparison_of_all_places(documents, run) -> None:
    text, size = make_text(documents), len(run)
    places = [(one, at) for one in documents for at in range(len(one) - size) if one[at : at + size] == run]
    assert text.followers(run).tolist() == sorted({one[at + size] for one, at in places})
    found = text.longest_runs(run)
    for number, one in enumerate(documents):
        length = longest_copied(run, [one])
        told = found.get(number)
        assert (told.tokens if told else 0) == length
        if told:
            part = run[told.last + 1 - length : told.last + 1]
            assert any(one[at : at + length] == part for at in range(len(one)))


def test_a_run_longer_than_the_whole_text_has_no_followers() -> None:
    """Its rarest token is the last one, so that it would begin long before the text."""
    text = make_text([[3, 5, 5]])
    assert not len(text.followers([*[5] * 9, 3]))
    assert text.followers([3, 5]).tolist() == [5]


def copying(model: KNNLM) -> KNNLM:
    """The model with a setting under which it copies whole sentences."""
    model.retrieval = replace(model.retrieval, setting=Mix(2, 1.0, 0.999))
    return model


@pytest.mark.parametrize("max_copy", [1, 3])
def test_generate_copies_no_longer_run(max_copy, knn_of) -> None:  # noqa: F811
    """By beams too, which change places."""
    model = copying(knn_of("llama"))
    batch = padded([encode(prompt) for prompt in PROMPTS], "left")
    width, options = batch["input_ids"].shape[1], {"max_new_tokens": 24}
    for how in ({"do_sample": False}, {"do_sample": True, "top_k": 0}, {"do_sample": False, "num_beams": 3}):
        torch.manual_seed(1)
        free = model.generate(**batch, **options, **how)[:, width:].tolist()
        torch.manual_seed(1)
        processors = [GuardProcessor(model.copy_guard(max_copy), width)]
        held = model.generate(**batch, **options, **how, logits_processor=processors)[:, width:].tolist()
        assert max(longest_copied(row, DOCUMENTS) for row in free) > 6
        assert all(longest_copied(row, DOCUMENTS) <= max_copy for row in held)


def test_a_guard_that_is_not_reached_changes_nothing(knn_of) -> None:  # noqa: F811
    model, ids = knn_of("llama", gate=GATE), torch.tensor([encode(PROMPTS[0])])
    free = model.generate(ids, max_new_tokens=12, do_sample=False)
    processors = [GuardProcessor(model.copy_guard(200), ids.shape[1])]
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, logits_processor=processors), free)


def test_what_is_left_sums_to_one_and_keeps_its_proportions() -> None:
    guard = CopyGuard(make_text([[0, 1, 2], [0, 1, 3]]), 2)
    plain = torch.log_softmax(torch.randn(50_000), -1)
    assert guard.apply([1], plain) is plain  # too short a run
    left = guard.apply([7, 0, 1], plain)
    assert torch.isneginf(left[[2, 3]]).all() and left.double().exp().sum() == pytest.approx(1, abs=1e-6)
    difference = (left - plain)[torch.isfinite(left)]
    assert difference.max() - difference.min() < 1e-4 and difference.min() >= -1e-6


def test_the_prompt_does_not_count() -> None:
    guard, scores = CopyGuard(make_text([[5, 0, 1, 2]]), 2), torch.log_softmax(torch.randn(2, 9), -1)
    ids = torch.tensor([[5, 5, 0, 1], [3, 5, 0, 7]])
    assert torch.isneginf(GuardProcessor(guard, 2)(ids, scores)).nonzero().tolist() == [[0, 2]]
    assert torch.equal(GuardProcessor(guard, 3)(ids, scores), scores)


def test_a_writer_keeps_to_it(knn_of, stores) -> None:  # noqa: F811
    lm, model = stores("llama")[0], copying(knn_of("llama"))
    free, held = (Writer(model, lm, Decoding(max_new_tokens=24, max_copy=most))(PROMPTS[1]).text for most in (None, 1))
    assert held != free


def test_no_token_left_and_wrong_numbers_are_told() -> None:
    text = make_text([[0, 1, 0, 0], [1, 1]])
    with pytest.raises(InputError, match=r"one more than `max_copy=1` from a document; take a larger one"):
        CopyGuard(text, 1).apply([0], torch.log(torch.tensor([0.5, 0.5])))
    for make in (lambda: CopyGuard(text, 0), lambda: Decoding(max_copy=0)):
        with pytest.raises(InputError, match="`max_copy` is 0, but must be at least 1"):
            make()

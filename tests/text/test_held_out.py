"""Parts that are held out of a text, and slices that fill a budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InputError
from knnlm.text.held_out import MIN_SLICE, hold_out, keep_back, split_documents, take_sample, take_slices
from knnlm.text.windows import TokenDocument
from tests.text.test_windows import document, documents


def split(given_documents, **settings):
    parts = list(split_documents(given_documents, **settings))
    return [d for is_out, d in parts if not is_out], [d for is_out, d in parts if is_out]


@pytest.mark.parametrize("seed", range(5))
def test_of_many_documents_every_tenth_is_held_out_whole(seed):
    given_documents = documents(*[30] * 200)
    training, evaluation = split(given_documents, seed=seed)
    numbers = [one.number for one in evaluation]
    assert len(numbers) == 20 and set(np.diff(numbers)) == {10}
    assert sorted([one.number for one in training] + numbers) == list(range(1, 201))


def test_a_small_share_of_just_enough_documents_still_holds_one_out():
    for seed in range(10):
        assert len(split(documents(*[30] * 20), share=0.005, seed=seed)[1]) == 1


def test_the_seed_picks_which_are_held_out():
    def numbers(seed):
        return tuple(one.number for one in split(documents(*[30] * 40), seed=seed)[1])

    assert numbers(1) == numbers(1)
    assert len({numbers(seed) for seed in range(10)}) > 2


def test_many_documents_are_split_in_a_stream():
    endless = (document(10, number) for number in itertools.count(1))
    assert len(list(itertools.islice(split_documents(endless), 1000))) == 1000


@given(
    st.lists(st.integers(2, 3000), min_size=1, max_size=19),
    st.integers(0, 5),
    st.sampled_from([0.1, 0.2, 0.3, 0.5]),
    st.sampled_from([64, 200, 1000]),
)
def test_of_few_documents_sections_are_held_out_with_gaps(lengths, seed, share, section):
    given_documents = documents(*lengths)
    try:
        training, evaluation = split(given_documents, seed=seed, share=share, section=section, gap=20)
    except InputError:
        assert sum(max(1, n // 64) for n in lengths) < 2
        return
    assert training and evaluation
    kept = {int(token) for one in training for token in one.tokens}
    held = {int(token) for one in evaluation for token in one.tokens}
    assert sum(len(one.tokens) for one in [*training, *evaluation]) == len(kept) + len(held)
    assert not kept & held
    # Nothing is lost but at most `gap` tokens on each side of a border inside a document.
    pieces = {}
    for one in sorted([*training, *evaluation], key=lambda d: int(d.tokens[0])):
        assert len(one.tokens) >= 2
        pieces.setdefault(one.number, []).append(one.tokens)
    for one in given_documents:
        tokens = pieces[one.number]
        assert tokens[0][0] == one.tokens[0] and tokens[-1][-1] == one.tokens[-1]
        for before, after in itertools.pairwise(tokens):
            assert 2 * 8 <= after[0] - before[-1] - 1 <= 2 * 20


def test_a_novel_gives_a_tenth_of_its_sections():
    training, evaluation = split([document(409_600)], seed=3)
    assert len(evaluation) == 10
    assert {len(one.tokens) for one in evaluation} <= {4096 - 2 * 256, 4096 - 256}
    assert sum(len(one.tokens) for one in training) > 0.87 * 409_600


def test_sections_and_gaps_of_a_short_text_shrink_with_it():
    training, evaluation = split([document(1280)], seed=3)
    # 10 sections of 128 tokens; gaps of 16 and not 256.
    assert [len(one.tokens) for one in evaluation] in ([96], [112])
    assert sum(len(one.tokens) for one in training) in (1152 - 32, 1152 - 16)


@pytest.mark.parametrize("lengths", [(), (100,), (127,)])
def test_a_text_too_short_to_hold_some_out_names_the_way_out(lengths):
    with pytest.raises(InputError, match=f"{sum(lengths)} tokens.*too short.*`eval_text`"):
        split(documents(*lengths))


@pytest.mark.parametrize("settings", [{"share": 0}, {"share": 0.6}, {"section": 63}, {"gap": -1}])
def test_settings_of_holding_out_are_checked_at_once(settings):
    value = next(iter(settings.values()))
    with pytest.raises(InputError, match=str(value)):
        split_documents([], **settings)


def test_hold_out_collects_what_the_training_stream_came_past():
    held = hold_out(documents(*[30] * 40), seed=1)
    assert held.evaluation == []
    numbers = [one.number for one in held.training]
    training, evaluation = split(documents(*[30] * 40), seed=1)
    assert numbers == [one.number for one in training]
    assert [one.number for one in held.evaluation] == [one.number for one in evaluation]


def held_out_of(stream, **settings):
    held = hold_out(stream, **settings)
    for _ in held.training:
        pass
    return held


@pytest.mark.parametrize("length", [40, 700, 9000])
def test_of_a_long_stream_a_budget_is_held_out_from_everywhere_in_bounded_memory(length):
    count, budget = 30_000, 8000
    held = held_out_of((document(length, number) for number in range(count)), max_tokens=budget)
    assert sum(len(document.tokens) for *_, document in held._kept._heap) <= 4 * budget
    slices = held.evaluation
    assert budget - MIN_SLICE - len(slices) < sum(len(one.tokens) for one in slices) <= budget
    numbers = [one.number for one in slices]
    assert numbers == sorted(set(numbers)) and max(np.diff([0, *numbers, count])) < 5 * count / len(numbers)
    again = held_out_of((document(length, number) for number in range(count)), max_tokens=budget).evaluation
    assert [one.tokens.tolist() for one in again] == [one.tokens.tolist() for one in slices]


def test_short_documents_beside_huge_ones_still_fill_the_budget():
    lengths = [3000 if number % 2 else 2 for number in range(400)]
    slices = take_slices(documents(*lengths), 100, seed=0)
    assert sum(len(one.tokens) for one in slices) > 50
    assert len(take_slices(documents(*[2, 5000] * 1000), 20_000, seed=0)) > 30


def test_sections_held_out_of_a_novel_do_not_keep_it_in_memory():
    for one in held_out_of(documents(90_000), max_tokens=20_000).evaluation:
        assert one.tokens.base is None


def test_a_budget_for_evaluation_that_cannot_be_is_refused_before_the_stream_is_read():
    with pytest.raises(InputError, match="`eval_tokens` is 1,"):
        hold_out(iter(()), max_tokens=1)


def test_a_text_within_the_budget_is_taken_whole():
    for budget in (30, None):
        assert [one.tokens.tolist() for one in take_slices(documents(10, 20), budget, seed=0)] == [
            one.tokens.tolist() for one in documents(10, 20)
        ]
    assert take_slices([], 30, seed=0) == []


@given(st.lists(st.integers(2, 5000), min_size=1, max_size=60), st.integers(2, 20_000), st.integers(0, 3))
def test_slices_fill_the_budget_evenly(lengths, budget, seed):
    given_documents = documents(*lengths)
    slices = take_slices(given_documents, budget, seed=seed)
    total = sum(len(one.tokens) for one in slices)
    assert total <= budget
    if sum(lengths) <= budget:
        return
    assert total > budget - MIN_SLICE - len(slices)
    level = max(len(one.tokens) for one in slices)
    numbers = [one.number for one in slices]
    assert numbers == sorted(set(numbers))
    for one in slices:
        whole = given_documents[one.number - 1]
        # Consecutive, from that document, and as much as every other gives.
        np.testing.assert_array_equal(np.diff(one.tokens), 1)
        assert whole.tokens[0] <= one.tokens[0] and one.tokens[-1] <= whole.tokens[-1]
        assert len(one.tokens) == min(len(whole.tokens), level)
    # One token more of each would be over the budget, or each gives all it has.
    more = sum(min(lengths[number - 1], level + 1) for number in numbers)
    assert more > budget or more == total
    if len(slices) > 1 and max(lengths[number - 1] for number in numbers) >= MIN_SLICE:
        assert level >= MIN_SLICE


def test_slices_of_too_many_documents_come_from_evenly_spread_ones():
    slices = take_slices(documents(*[2000] * 1000), 512 * 50, seed=4)
    numbers = [one.number for one in slices]
    assert len(numbers) == 50
    assert max(np.diff([0, *numbers, 1000])) <= 60


def test_slices_start_anywhere_and_are_the_same_for_the_same_seed():
    def starts(seed):
        return tuple(int(one.tokens[0]) % 1_000_000 for one in take_slices(documents(*[9000] * 6), 6000, seed=seed))

    assert starts(0) == starts(0) != starts(1)
    assert len(set(starts(0))) > 3
    one = take_slices(documents(9000, 9000), 4000, seed=0)[0]
    assert one.tokens.base is None  # a copy, so that the document can go


def test_a_budget_of_one_token_is_refused():
    with pytest.raises(InputError, match="`eval_tokens` is 1,"):
        take_slices([], 1, seed=0)


# What `build` keeps back


def kept(given_documents, share, **settings):
    held_out = keep_back(given_documents, share=share, **settings)
    return list(held_out.training), held_out.evaluation


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "share"), [(400, 0.01), (150, 0.02), (1000, 0.1)])
def test_a_small_share_is_kept_back_in_whole_documents_spread_over_the_text(count, share, seed):
    lengths = np.random.default_rng(count + seed).integers(2, 200, count).tolist()
    training, evaluation = kept(documents(*lengths), share, seed=seed)
    numbers = [one.number for one in evaluation]
    assert sorted([one.number for one in training] + numbers) == list(range(1, count + 1))
    assert [len(one.tokens) for one in evaluation] == [lengths[number - 1] for number in numbers]
    assert abs(sum(len(one.tokens) for one in evaluation) - share * sum(lengths)) <= 200
    # Each is the first to begin after as much text as those before it are the share of.
    for place, number in enumerate(numbers):
        before = sum(len(one.tokens) for one in evaluation[:place]) / share
        assert before <= sum(lengths[numbers[0] - 1 : number - 1]) < before + 200


def test_a_document_is_kept_back_however_few_and_long_they_are():
    for seed in range(10):
        assert len(kept(documents(*[3000] * 20), 0.001, seed=seed)[1]) == 1


def test_of_few_documents_short_sections_are_kept_back():
    training, evaluation = kept(documents(150_000, 150_000), 0.01)
    assert len(evaluation) == 3
    assert {len(one.tokens) for one in evaluation} <= {1024 - 128, 1024 - 256}
    assert sum(len(one.tokens) for one in [*training, *evaluation]) == 300_000 - 3 * 512


def test_a_sample_of_one_long_document_is_spread_over_it() -> None:
    """`take_slices` would give one run of a novel; each of its runs of 500 tokens is a document here."""
    novel = TokenDocument(np.arange(10_000, dtype=np.int32), "novel", 1)
    found = take_sample([novel], 2048, run=1000, seed=0)
    assert sum(len(one.tokens) for one in found) <= 2048
    assert len(found) == 4
    places = [int(one.tokens[0]) // 1000 for one in found]
    assert len(set(places)) == 4
    assert max(places) - min(places) >= 5
    assert all(int(one.tokens[-1]) // 1000 == place for one, place in zip(found, places, strict=True))
    assert take_sample([novel], 20_000, run=20_000, seed=0)[0].tokens.tolist() == list(range(10_000))

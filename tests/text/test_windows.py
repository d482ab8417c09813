from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InputError
from knnlm.evaluation.overlap import CHUNK_TOKENS, overlap
from knnlm.text.held_out import MIN_SLICE, hold_out, split_documents, take_slices
from knnlm.text.windows import Fingerprint, TokenDocument, WindowConfig, batches, windows


def document(length, number=1, first=0):
    """Tokens that count up, so that a token tells its position."""
    return TokenDocument(np.arange(first, first + length, dtype=np.int32), "a.txt", number)


def documents(*lengths):
    return [document(length, number, 1_000_000 * number) for number, length in enumerate(lengths, start=1)]


@st.composite
def configs(draw):
    context = draw(st.integers(1, 12))
    return WindowConfig(context, draw(st.integers(1, context)))


# windows


@given(st.lists(st.integers(0, 60), max_size=5), configs())
def test_every_token_with_a_predecessor_counts_once_in_order_with_enough_context(lengths, config):
    given_documents = [one for one in documents(*lengths) if len(one.tokens) >= 2]
    found = list(windows(documents(*lengths), config))
    counted = []
    for window in found:
        tokens = given_documents[window.document].tokens
        size = len(window.inputs)
        assert 1 <= size == len(window.targets) <= config.context
        np.testing.assert_array_equal(window.inputs, tokens[window.start : window.start + size])
        np.testing.assert_array_equal(window.targets, tokens[window.start + 1 : window.start + size + 1])
        assert window.number == given_documents[window.document].number
        for index in range(window.first, size):
            position = window.start + index + 1
            assert index + 1 >= min(position, config.context - config.stride)
            counted.append((window.document, position))
    expected = [(number, p) for number, one in enumerate(given_documents) for p in range(1, len(one.tokens))]
    assert counted == expected
    # No window more than needed: each counts something.
    assert all(window.first < len(window.inputs) for window in found)


def test_windows_of_a_short_example():
    found = list(windows([document(8)], WindowConfig(4, 2)))
    assert [(w.start, w.first, w.inputs.tolist()) for w in found] == [
        (0, 0, [0, 1, 2, 3]),
        (2, 2, [2, 3, 4, 5]),
        (4, 2, [4, 5, 6]),
    ]


def test_windows_are_made_one_at_a_time():
    endless = (document(10) for _ in itertools.count())
    assert len(list(itertools.islice(windows(endless, WindowConfig(4, 2)), 100))) == 100


@pytest.mark.parametrize(
    ("context", "stride", "words"),
    [
        (4, 5, "`stride=5` is over `context=4`"),
        (0, 1, "`context` is 0"),
        (4, 0, "`stride` is 0"),
        (-1, 1, "`context` is -1"),
    ],
)
def test_window_settings_that_cannot_be_are_named(context, stride, words):
    with pytest.raises(InputError, match=words):
        WindowConfig(context, stride)


# batches


@given(st.lists(st.integers(2, 40), min_size=1, max_size=6), configs(), st.integers(1, 50))
def test_batches_hold_consecutive_windows_padded_within_the_limit(lengths, config, limit):
    found = list(windows(documents(*lengths), config))
    groups = list(batches(found, limit))
    assert [id(w) for batch in groups for w in batch.windows] == [id(w) for w in found]
    for batch in groups:
        assert batch.tokens_BT.dtype == batch.lengths_B.dtype == np.int64
        assert batch.tokens_BT.size <= limit or len(batch.windows) == 1
        assert batch.tokens_BT.shape == (len(batch.windows), batch.lengths_B.max())
        for row, length, window in zip(batch.tokens_BT, batch.lengths_B, batch.windows, strict=True):
            assert row[:length].tolist() == window.inputs.tolist()
            assert not row[length:].any()
    # Full: the next window would not have fitted.
    for batch, after in itertools.pairwise(groups):
        longest = max(batch.tokens_BT.shape[1], len(after.windows[0].inputs))
        assert longest * (len(batch.windows) + 1) > limit


def test_batches_are_lazy_and_need_room():
    endless = windows((document(10) for _ in itertools.count()), WindowConfig(4, 4))
    assert len(next(batches(endless, 8)).windows) == 2
    with pytest.raises(InputError, match="a batch of 0 tokens"):
        batches([], 0)


# fingerprint


def fingerprint(*parts):
    result = Fingerprint()
    for tokens in parts:
        result.update(TokenDocument(np.array(tokens, np.int32), "a", 1))
    return result.hexdigest()


def test_fingerprint_sees_tokens_order_and_borders():
    different = [fingerprint(), fingerprint([1, 2, 3]), fingerprint([1, 2], [3]), fingerprint([3], [1, 2])]
    assert len(set(different)) == 4
    strided = Fingerprint()
    strided.update(TokenDocument(np.array([1, 9, 2, 9, 3, 9], np.int32)[::2], "b", 7))
    assert strided.hexdigest() == fingerprint([1, 2, 3])


# holding out


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


# slices


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


# overlap


def grams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


@given(st.integers(0, 2**32), st.integers(1, 5), st.lists(st.integers(0, 40), max_size=6))
def test_overlap_equals_a_set_of_tuples(seed, n, sizes):
    rng = np.random.default_rng(seed)
    evaluation = [rng.integers(0, 4, length).astype(np.int32) for length in (0, 3, 30, 50)]
    training = [rng.integers(0, 4, size).astype(np.int32) for size in sizes]
    seen = set(grams(np.concatenate([np.empty(0, np.int32), *training]).tolist(), n))
    all_grams = [gram for tokens in evaluation for gram in grams(tokens.tolist(), n)]
    expected = sum(gram in seen for gram in all_grams) / len(all_grams)
    assert overlap([TokenDocument(t, "a", 1) for t in evaluation], training, n=n) == pytest.approx(expected, abs=0)


def test_overlap_is_found_across_chunks_of_a_long_array():
    rng = np.random.default_rng(0)
    stream = rng.integers(0, 50_000, CHUNK_TOKENS + 100).astype(np.int32)
    copied = TokenDocument(stream[CHUNK_TOKENS - 40 : CHUNK_TOKENS + 40], "a", 1)
    fresh = TokenDocument(rng.integers(0, 50_000, 80).astype(np.int32), "a", 2)
    assert overlap([copied], [stream]) == 1
    assert overlap([copied, fresh], [stream]) == 0.5
    assert overlap([fresh], [stream]) == 0


def test_overlap_of_texts_shorter_than_n_is_nothing():
    assert overlap([document(12)], [np.arange(100, dtype=np.int32)]) == 0
    assert overlap([document(20)], []) == 0
    assert overlap([], [np.arange(100, dtype=np.int32)]) == 0

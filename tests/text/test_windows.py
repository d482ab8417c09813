from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InputError
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

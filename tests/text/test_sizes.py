"""Bytes and words that tokens stand for."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.text.sizes import Sizes
from knnlm.text.windows import TokenDocument, target_sizes

TEXTS = st.text(alphabet="aé日😀  \n\u3000\x1c", max_size=40)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, data=st.data())
def test_stretch_of_tokens_has_the_bytes_and_words_of_its_text(text, data):
    places = st.integers(0, len(text))
    borders = sorted(data.draw(st.lists(places, max_size=8)))
    ends = np.array([len(text[:place].encode()) for place in [*borders, len(text)]], np.int64)
    sizes = Sizes.of(text, ends)
    first = data.draw(st.integers(0, len(borders)))
    part, begin = sizes[first:], 0 if first == 0 else borders[first - 1]
    assert part.bytes_N.sum() == len(text[begin:].encode())
    starts = np.diff(ends, prepend=0)[first:] > 0
    if starts.any() and not starts[0]:
        return  # an empty token in front of the stretch tells nothing of where it begins
    assert part.words(np.zeros(len(part.bytes_N), np.int64)) == len(text[begin:].split())


def test_each_cluster_is_a_text_of_its_own():
    sizes = Sizes.of("one two three", np.array([2, 5, 7, 13]))  # on|e t|wo| three
    assert sizes.words(np.zeros(4, np.int64)) == len("one two three".split())
    assert sizes.words(np.array([0, 1, 2, 2])) == sum(len(text.split()) for text in ("on", "e t", "wo three"))


def test_sizes_follow_the_tokens_that_are_kept():
    sizes = Sizes.of("one two three", np.array([2, 5, 7, 13]))
    document = TokenDocument(np.arange(4, dtype=np.int32), "a", 1, sizes)
    found = target_sizes([document.part(1, 4), document.part(3, 4), document])
    assert found is not None and found.bytes_N.tolist() == [2, 6, 3, 2, 6]
    assert target_sizes([document, TokenDocument(document.tokens, "a", 1)]) is None

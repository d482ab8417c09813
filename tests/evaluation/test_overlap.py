"""Overlap of n-grams against a set of tuples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.evaluation.overlap import CHUNK_TOKENS, overlap
from knnlm.text.windows import TokenDocument
from tests.text.test_windows import document


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

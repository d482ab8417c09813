"""Text to tokens: where each token ends in the text, and tokenizers of alphabets without a Latin letter."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.errors import InputError
from knnlm.model import encoding
from tests.tiny_models import tiny_tokenizer
from tests.tokenizers_of_all_kinds import KINDS, digits, letters, normalizing, sentencepiece, superwords, wordpiece

ENCODERS = {kind: encoding.TextEncoder(make()) for kind, make in KINDS.items()}
SYLLABLES = st.sampled_from(
    ["the", " cat", " SAT", "\u00e9t\u00e9", "e\u0301", "日本", " ", "\n", "😀", "ACGT", "á́", "\u1100\u1161"]
)
TEXTS = st.one_of(st.text(max_size=30), st.lists(SYLLABLES, max_size=12).map("".join)).map(
    lambda text: text.encode("utf-8", "ignore").decode()
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_sizes_of_all_tokens_add_up_to_the_text(kind, text):
    tokens, ends = ENCODERS[kind].with_ends(text)
    assert tokens.tolist() == ENCODERS[kind](text).tolist() and len(tokens) == len(ends)
    assert (np.diff(ends, prepend=0) >= 0).all()
    own = len(tokens) - len(ENCODERS[kind]._prefix)
    assert (ends[-1] if len(ends) else 0) == (len(text.encode()) if own else 0)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_a_byte_level_token_ends_where_its_own_bytes_do(text):
    tokenizer = tiny_tokenizer()
    tokens, ends = encoding.TextEncoder(tokenizer).with_ends(text)
    assert np.diff(ends, prepend=0).tolist() == [len(name) for name in tokenizer.convert_ids_to_tokens(tokens.tolist())]


def pieces(tokenizer, text):
    """The bytes that each token stands for."""
    _, ends = encoding.TextEncoder(tokenizer).with_ends(text)
    return [text.encode()[first:last] for first, last in zip([0, *ends], ends, strict=False)]


def test_ends_by_hand():
    assert pieces(sentencepiece(), "the cat 日é") == [
        b"",
        b"the",
        b" cat",
        b" ",
        *([b"\xe6", b"\x97", b"\xa5"]),
        "é".encode(),
    ]
    assert pieces(wordpiece(), " The  cats É ") == [b" The", b"  cat", b"s", " É ".encode()]
    # What NFC has made one character stays with it.
    decomposed = unicodedata.normalize("NFD", "é")
    assert b"".join(pieces(normalizing(), f"a{decomposed}b")[1:-1]) == decomposed.encode()


# Other alphabets


@pytest.mark.parametrize("tokenizer", [letters("ACGTN"), letters("אבג"), letters("абв "), digits()])
def test_tokenizer_of_any_alphabet_is_one(tokenizer):
    assert not encoding.is_empty(tokenizer)


def test_tokenizer_that_came_up_without_a_vocabulary_is_empty():
    assert encoding.is_empty(letters(""))


def test_special_token_in_front_is_found_without_a_latin_letter():
    from tokenizers import processors

    tokenizer = letters("ACGTN")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert encoding.TextEncoder(tokenizer)("GATTACA").tolist() == [
        1,
        *tokenizer("GATTACA", add_special_tokens=False)["input_ids"],
    ]


@pytest.mark.parametrize(
    ("tokenizer", "alphabet", "is_cut"),
    [
        (letters("абв "), "абв", True),
        (letters("абв ", merges=(("а", "б"), (" ", "а"))), "абв", True),
        (superwords(), "абв", False),
        (letters("ACGTN", merges=(("A", "C"),)), "ACGTN", False),  # it drops the space, and joins what was apart
        (letters("ACGTN ", merges=(("A", "C"),)), "ACGTN", True),
        (sentencepiece(), "teca", True),
        (wordpiece(), "abcdefghij", True),
        (tiny_tokenizer(), "абв", True),
    ],
)
def test_long_text_of_any_alphabet_has_the_tokens_of_the_whole(tokenizer, alphabet, is_cut, monkeypatch):
    random = np.random.default_rng(0)
    words = ["".join(random.choice([*alphabet], size=size)) for size in random.integers(1, 5, size=200)]
    text = " ".join(words)
    monkeypatch.setattr(encoding, "PIECE", 16)
    encode = encoding.TextEncoder(tokenizer)
    assert (len(list(encode._pieces(text))) > 5) == is_cut
    tokens, ends = encode.with_ends(text)
    assert encode(text).tolist() == tokens.tolist() == tokenizer(text)["input_ids"]
    monkeypatch.setattr(encoding, "PIECE", 1 << 20)
    assert ends.tolist() == encode.with_ends(text)[1].tolist()


def test_token_that_takes_the_space_beside_it_stays_whole(monkeypatch):
    from transformers import AddedToken

    tokenizer, text = tiny_tokenizer(), "the nurse stop here " * 20
    tokenizer.add_tokens([AddedToken("stop", rstrip=True)])
    monkeypatch.setattr(encoding, "PIECE", 1)
    assert encoding.TextEncoder(tokenizer)(text).tolist() == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("text", ["a\ud800b", "\udc00", "é" * 9 + "\udfff"])
def test_half_of_a_surrogate_pair_is_refused_with_its_place(text):
    encoder = encoding.TextEncoder(tiny_tokenizer())
    for read in (encoder, encoder.with_ends):
        with pytest.raises(InputError, match=rf"character {len(text) - text.endswith('b')} of the text is U\+D"):
            read(text)

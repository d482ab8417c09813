"""Where the tokens of an echoed prompt begin: the text there begins with the token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.model.lm import LanguageModel
from knnlm.server.choices import Words
from tests.tiny_models import END, tiny_model
from tests.tokenizers_of_all_kinds import KINDS, normalizing

TEXTS = st.lists(
    st.sampled_from(["the", " cat", " SAT", "été", "e\u0301", "日本", " ", "\n", "😀", "ACGT", END, "a"]), max_size=12
)


def words_of(make) -> Words:
    tokenizer = make()
    lm = LanguageModel.from_model(tiny_model("llama", vocab_size=max(len(tokenizer), 8)), tokenizer, name="tiny")
    return Words(lm, frozenset({tokenizer.eos_token_id} - {None}))


WORDS = {kind: words_of(make) for kind, make in KINDS.items()}


def begins(words: Words, tokens: list[int], text: str) -> list[bool]:
    """Whether the text at each token's place begins with its name; parts of characters and BOS are none of it."""
    starts, names = words.places(tokens, text)
    assert starts == sorted(starts) and len(starts) == len(names) == len(tokens)
    special = words.lm.tokenizer.all_special_tokens
    partial = [
        name in words.lm.tokenizer.get_vocab() and "\ufffd" in words._texts(token)
        for name, token in zip(names, tokens, strict=True)
    ]
    return [
        text.startswith(name, start) or is_partial or (name in special and not start)
        for name, start, is_partial in zip(names, starts, partial, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=TEXTS.map("".join))
def test_text_at_each_place_begins_with_the_token(kind, text):
    words = WORDS[kind]
    assert all(begins(words, words.lm.encode(text).tolist(), text))


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 286), min_size=1, max_size=12))
def test_so_it_does_where_tokens_were_given(tokens):
    words = WORDS["byte-level"]
    assert all(begins(words, tokens, words.text(tokens)))


def test_places_of_a_chat_template_by_hand():
    """A special token in the text moved all places behind it by its length, NFC by what it joins."""
    text = f"user{END}e\u0301 cat{END}the"
    for words in (WORDS["byte-level"], words_of(normalizing)):
        tokens = words.lm.encode(text).tolist()
        starts, names = words.places(tokens, text)
        ends = [at for at, token in enumerate(tokens) if token == words.lm.tokenizer.eos_token_id]
        assert [starts[at] for at in ends] == [4, 4 + len(END) + 6] and [names[at] for at in ends] == [END, END]
        assert text[starts[ends[1] + 1] :].startswith("t")
        cat = names.index(" ")
        assert starts[cat] == text.index(" ")


def test_first_word_is_named_as_it_stands():
    words = WORDS["sentencepiece"]
    starts, names = words.places(words.lm.encode("cat").tolist(), "cat")
    assert (starts[-1], names[-1]) == (0, "cat")

"""Token sets for a domain and for everyday language: from a file of ids, from words, or from text.

Words and text are tokenized by each model's own tokenizer, so that models with different tokenizers can be compared.
The lists and counts below are this project's: those of the paper (arXiv 2506.24106) are not published.

Legend: V vocabulary.
"""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from knnlm.errors import InputError
from knnlm.model.encoding import TextEncoder, Tokenizer
from knnlm.text.corpus import read_documents
from knnlm.text.textfiles import decode_blocks

Counts = NDArray[np.float64]

DOMAINS: dict[str, tuple[str, ...]] = {"mathematics": tuple("0123456789"), "code": tuple(keyword.kwlist)}
"""Digits for mathematics and Python's keywords for code, as in the paper."""
TOKENS_OF_TEXT = 100
"""Number of tokens taken from a text."""
# Digits of an id, leading zeros included; Python refuses to parse numbers of thousands of digits.
_MOST_DIGITS = 18
# Everyday words, without Python keywords and numbers.
EVERYDAY_WORDS = tuple(
    """time day night morning evening year week hour people man woman child boy girl mother father brother sister son
    daughter friend family name word story book letter house home room door window floor wall street road city town
    village country water river sea rain snow wind sun moon sky fire light tree flower garden field hill stone bread
    milk meat fruit tea coffee table chair bed cup plate clothes shoes hat coat horse dog cat bird fish hand head eye
    face mouth foot heart voice life love happy sad good bad big small old young new long short high low hot cold warm
    red blue green white black brown walk run sit stand sleep eat drink talk speak listen laugh cry smile work play
    song music market shop money school church""".split()
)


class Vocabulary(Tokenizer, Protocol):
    """The part of a `transformers` tokenizer that is used."""

    @property
    def all_special_ids(self) -> list[int]:
        """Tokens without text, such as the end of a document."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Id of every token, in the tokenizer's notation."""
        ...

    # The parameter's name is that of transformers, which accepts more types.
    def decode(self, token_ids: list[int], /) -> Any:  # noqa: ANN401
        """Text of tokens."""
        ...


@dataclass(frozen=True)
class TokenSets:
    """The two token sets whose rows are compared; they are disjoint."""

    domain: tuple[int, ...]
    general: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """Sources of the two sets. The domain has one of three sources; the general set a file, a text, or built-in words.

    :raises InputError: none or several sources for the domain, an unknown domain, domain text without general text, or
        both a file and a text for the general set where only one is used.
    """

    domain: str | None = None
    """A built-in domain: mathematics or code."""
    domain_tokens: Path | None = None
    """A file with one token id a line."""
    domain_text: Path | str | None = None
    """Text of the domain, whose most characteristic tokens relative to `general_text` are taken."""
    general_tokens: Path | None = None
    general_text: Path | str | None = None
    """Everyday text, whose most frequent tokens are taken unless there is a file."""
    text_field: str = "text"

    def __post_init__(self) -> None:
        given = [one for one in (self.domain, self.domain_tokens, self.domain_text) if one is not None]
        if len(given) != 1:
            raise InputError(f"give one of `domain`, `domain_tokens` and `domain_text`, got {len(given)} of them")
        if self.domain is not None and self.domain not in DOMAINS:
            raise InputError(f"`domain` is {self.domain!r}; take {' or '.join(DOMAINS)}, or give `domain_text`")
        if self.domain_text is not None and self.general_text is None:
            raise InputError("`domain_text` needs `general_text`, against which its tokens are characteristic")
        if self.domain_text is None and self.general_tokens is not None and self.general_text is not None:
            raise InputError("`general_tokens` and `general_text` are both given; leave one out")

    @property
    def words(self) -> tuple[str, str]:
        """Descriptions of the domain's and the everyday tokens."""
        if self.domain_tokens is not None:
            domain = f"ids of {self.domain_tokens}"
        elif self.domain is not None:
            domain = f"the built-in ones for {self.domain}"
        else:
            domain = f"the most characteristic of {self.domain_text} against {self.general_text}"
        if self.general_tokens is not None:
            return domain, f"ids of {self.general_tokens}"
        frequent = f"the most frequent of {self.general_text}"
        return domain, "built-in words" if self.general_text is None else frequent

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the ids depend on a model's tokenizer."""
        return self.domain_tokens is None or self.general_tokens is None


def file_tokens(path: str | Path) -> tuple[int, ...]:
    """Read ids from a file, one a line; blank lines are skipped, repeated ids count once.

    :raises InputError: no ids, or a line that is not one.
    """
    lines = "".join(decode_blocks(_existing(path))).splitlines()
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in numbered:
        if not (line.isascii() and line.isdigit() and len(line) <= _MOST_DIGITS):
            raise InputError(
                f"line {number} of {path} is {line[:40]!r}, no token id; write one number from 0 on a line"
            )
    if not numbered:
        raise InputError(f"{path} has no token ids; write one on each line")
    return tuple(dict.fromkeys(int(line) for _, line in numbered))


def word_tokens(words: Sequence[str], tokenizer: Vocabulary) -> tuple[int, ...]:
    """Tokens that are exactly one of the words, with or without a leading space.

    Words that the tokenizer splits into several tokens have no row of their own and are left out.
    """
    vocabulary = tokenizer.get_vocab()
    # A space is Ġ in byte-level BPE and ▁ in SentencePiece; GPT-1 marks the end of a word instead.
    forms = [form for word in words for form in (word, f"Ġ{word}", f"▁{word}", f" {word}", f"{word}</w>")]
    return tuple(dict.fromkeys(vocabulary[form] for form in forms if form in vocabulary))


def text_counts(text: str | Path, tokenizer: Vocabulary, *, text_field: str = "text") -> Counts:
    """Counts of each token in a file, folder or hub set, [V]; 0 for special tokens.

    :raises InputError: no readable text.
    """
    encode = TextEncoder(tokenizer)
    counts_V = np.zeros(max(tokenizer.get_vocab().values()) + 1)
    for document in read_documents([text], text_field=text_field):
        counts_V += np.bincount(encode(document.text), minlength=len(counts_V))
    counts_V[tokenizer.all_special_ids] = 0
    return counts_V


def log_odds(domain_V: Counts, general_V: Counts) -> Counts:
    """z-score of how characteristic each token is of a domain, [V]; 0 for a token in neither text.

    Weighted log-odds with an informative Dirichlet prior (Monroe, Colaresi & Quinn 2008, section 3.5.1); the prior is
    the count in both texts together.
    """
    prior_V = domain_V + general_V
    smooth_d, smooth_g = domain_V + prior_V, general_V + prior_V
    seen = prior_V > 0
    odds_d = np.log(smooth_d[seen] / (smooth_d.sum() - smooth_d[seen]))
    odds_g = np.log(smooth_g[seen] / (smooth_g.sum() - smooth_g[seen]))
    scores_V = np.zeros(len(prior_V))
    scores_V[seen] = (odds_d - odds_g) / np.sqrt(1 / smooth_d[seen] + 1 / smooth_g[seen])
    return scores_V


def top_tokens(scores_V: Counts, count: int = TOKENS_OF_TEXT) -> tuple[int, ...]:
    """Tokens with the highest scores above 0, at most `count`, ties in the order of their ids."""
    order = np.argsort(-scores_V, kind="stable")[:count]
    return tuple(int(token) for token in order if scores_V[token] > 0)


def choose_tokens(source: TokenSource, tokenizer: Vocabulary | None) -> TokenSets:
    """Return the two sets for a tokenizer, which is None if `source` does not need one.

    A token of both sets is kept only in the domain's, as its distance of 0 to itself would be meaningless.
    :raises InputError: fewer than two domain tokens, no general token, or unreadable files or text.
    """
    general_V = None
    if source.general_text is not None:
        assert tokenizer is not None
        general_V = text_counts(source.general_text, tokenizer, text_field=source.text_field)
    domain = _domain_tokens(source, tokenizer, general_V)
    general = [token for token in _general_tokens(source, tokenizer, general_V, domain) if token not in set(domain)]
    if len(domain) < 2:
        raise InputError(f"{len(domain)} domain token has no pairs; at least 2 that differ are needed")
    if not general:
        raise InputError("there are no general tokens beside those of the domain; give others")
    return TokenSets(domain, tuple(general))


def _domain_tokens(source: TokenSource, tokenizer: Vocabulary | None, general_V: Counts | None) -> tuple[int, ...]:
    if source.domain_tokens is not None:
        return file_tokens(source.domain_tokens)
    assert tokenizer is not None
    if source.domain is not None:
        return word_tokens(DOMAINS[source.domain], tokenizer)
    assert source.domain_text is not None and general_V is not None
    return top_tokens(log_odds(text_counts(source.domain_text, tokenizer, text_field=source.text_field), general_V))


def _general_tokens(
    source: TokenSource, tokenizer: Vocabulary | None, general_V: Counts | None, domain: Sequence[int]
) -> tuple[int, ...]:
    if source.general_tokens is not None:
        return file_tokens(source.general_tokens)
    if general_V is None:
        assert tokenizer is not None
        return word_tokens(EVERYDAY_WORDS, tokenizer)
    # The domain's tokens are removed before the top ones are taken, so that the count is reached if possible.
    others_V = general_V.copy()
    others_V[[token for token in domain if token < len(others_V)]] = 0
    return top_tokens(others_V)


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}; check the path")
    return Path(path)

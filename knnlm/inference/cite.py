"""Citations: the documents behind a text's probability, and what it would have been without each of them.

Shapes: T cited tokens, P pairs of a token and a document among its neighbours, M documents of the datastore.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from numpy.typing import NDArray

from knnlm.errors import InputError
from knnlm.inference.by_text import read_vectors
from knnlm.inference.copying import CopyGuard
from knnlm.inference.detokenizer import pieces_of
from knnlm.inference.store_text import LongestRun, StoreText
from knnlm.knn.citing import DocumentMap, Support, deep_neighbors, support
from knnlm.knn.mixing import Floats
from knnlm.knn.retrieval import Retrieval
from knnlm.knn.trust import Trust
from knnlm.model.lm import LanguageModel
from knnlm.store.stored_text import StoredText


@dataclass(frozen=True)
class CitedDocument:
    """What a document gave to a text or a part of it."""

    document: str
    """The file's name, or the hub set."""
    number: int
    """Line, row or part in it, from 1."""
    share: float
    """Its share of the tokens' probability, 0 to 1, their mean."""
    log_prob_without: float
    """log p of the tokens with a datastore without it, in nats: its keys masked, and as many others in their place. The
    trust that the text before gives (`knnlm.knn.trust`) is taken as it is."""
    gain: float
    """log p with it minus that, in nats: what it is worth here. Below 0 where it speaks for other tokens. Tokens that
    are impossible with it and without do not count."""
    overlap: int
    """Tokens of the longest run that stands in it verbatim: a long one is copied, a short one in other words."""
    verbatim: str
    """The text of that run."""


@dataclass(frozen=True)
class Citation:
    """The documents behind some consecutive tokens, the one with the largest gain first."""

    log_prob: float
    """log p of the tokens, in nats."""
    lm_share: float
    """The plain LM's share of the tokens' probability, their mean; it and the documents' add up to 1."""
    documents: tuple[CitedDocument, ...]


class Memory:
    """The datastore's documents and text, as citations need them. Made once for a datastore, which it does not keep."""

    def __init__(self, store: StoredText) -> None:
        self._store, self.documents = ref(store), DocumentMap(store)
        self._text: StoreText | None = None
        # That of `cached_property` is one for all objects in Python 3.11: generations would wait for one another.
        self._lock = Lock()

    @property
    def text(self) -> StoreText:
        """All tokens and where they stand; made on first use, which sorts them."""
        with self._lock:
            if self._text is None:
                store = self._store()
                assert store is not None, "whoever asks for the text has the datastore"
                self._text = StoreText(store, self.documents)
            return self._text


class Citations:
    """The citations of a text's tokens, each alone or any of them together: see `KNNLM.cite`."""

    def __init__(
        self, store: StoredText, memory: Memory, tokens: Sequence[int], pieces: Sequence[str], found: Sequence[Support]
    ) -> None:
        self._store, self._memory = store, memory
        self._tokens, self.pieces = list(tokens), tuple(pieces)
        """`pieces` are the cited tokens' texts."""
        sizes = [len(one.documents_M) for one in found]
        self._log_probs_T: Floats = np.array([one.log_prob for one in found])
        self._lm_shares_T: Floats = np.array([one.lm_share for one in found])
        self._tokens_P: NDArray[np.int64] = np.repeat(np.arange(len(found)), sizes)
        self._documents_P = np.concatenate([one.documents_M for one in found])
        self._shares_P = np.concatenate([one.shares_M for one in found])
        self._without_P = np.concatenate([one.without_M for one in found])

    def __len__(self) -> int:
        return len(self._tokens)

    def __repr__(self) -> str:
        return f"<Citations of {len(self)} tokens: {''.join(self.pieces)!r}>"

    @property
    def whole(self) -> Citation:
        """The documents behind all tokens together."""
        return self.span(0, len(self))

    @property
    def tokens(self) -> tuple[Citation, ...]:
        """The documents behind each token."""
        return tuple(self.span(place, place + 1) for place in range(len(self)))

    def span(self, first: int, last: int) -> Citation:
        """Return the documents behind the tokens from `first` to before `last`, numbered from 0.

        :raises InputError: there are no such tokens.
        """
        if not 0 <= first < last <= len(self):
            raise InputError(f"tokens {first} to {last} are no part of the {len(self)} that are cited; give others")
        inside_P = (self._tokens_P >= first) & (self._tokens_P < last)
        named, at_P = np.unique(self._documents_P[inside_P], return_inverse=True)
        shares_M = np.bincount(at_P, self._shares_P[inside_P], len(named)) / (last - first)
        log_probs_T = self._log_probs_T[first:last]
        with_P, without_P = self._log_probs_T[self._tokens_P[inside_P]], self._without_P[inside_P]
        gains_M = _gains(with_P, without_P, at_P, len(named))
        without_M = _without(log_probs_T, with_P, without_P, at_P, len(named))
        runs = self._memory.text.longest_runs(self._tokens[first:last])
        documents = []
        for at in np.argsort(-gains_M, kind="stable"):
            run = runs.get(int(named[at]), LongestRun(0, -1))
            verbatim = "".join(self.pieces[first + run.last + 1 - run.tokens : first + run.last + 1])
            name = self._memory.documents.name(int(named[at]))
            figures = float(shares_M[at]), float(without_M[at]), float(gains_M[at])
            documents.append(CitedDocument(*name, *figures, run.tokens, verbatim))
        return Citation(float(log_probs_T.sum()), float(self._lm_shares_T[first:last].mean()), tuple(documents))


def _gains(with_P: Floats, without_P: Floats, at_P: NDArray[np.int64], count: int) -> Floats:
    """Sums [M] of log p minus that without the document; 0 where the text is impossible either way."""
    with np.errstate(invalid="ignore"):
        gains_P = with_P - without_P
    gains_M = np.bincount(at_P, np.where(np.isnan(gains_P), 0.0, gains_P), count)
    return np.where(np.isnan(gains_M), 0.0, gains_M)


def _without(log_probs_T: Floats, with_P: Floats, without_P: Floats, at_P: NDArray[np.int64], count: int) -> Floats:
    """Sums [M] of log p without each document. Impossible tokens are counted apart: infinity cannot be taken away."""
    possible_M, impossible_M = (
        part(log_probs_T).sum() + np.bincount(at_P, part(without_P) - part(with_P), count)
        for part in (_possible, _impossible)
    )
    return np.where(impossible_M > 0, -np.inf, possible_M)


def _possible(log_probs: Floats) -> Floats:
    return np.where(np.isneginf(log_probs), 0.0, log_probs)


def _impossible(log_probs: Floats) -> Floats:
    return np.isneginf(log_probs).astype(np.float64)


class Citer:
    """Finds the documents behind tokens."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._memories: WeakKeyDictionary[StoredText, Memory] = WeakKeyDictionary()

    def memory(self, store: StoredText) -> Memory:
        """The documents and the text of a datastore, read on first use and kept as long as it is in use."""
        found = self._memories.get(store)
        return found or self._memories.setdefault(store, Memory(store))  # another thread may have been first

    def copy_guard(self, store: StoredText, max_copy: int) -> CopyGuard:
        """Return a guard against runs of a datastore's text. Raises as `CopyGuard`."""
        return CopyGuard(self.memory(store).text, max_copy)

    def text(self, text: str, prompt: str, retrieval: Retrieval) -> Citations:
        """Cite a text that follows a prompt.

        :raises InputError: it has no token that something predicts, or too many for the model with the prompt's.
        """
        tokens, ends = self._lm.encode_with_ends(prompt + text)
        # A token that is of both is cited too.
        first = int(np.searchsorted(ends, len(prompt.encode()), side="right")) if prompt else 0
        limit = self._lm.context_limit
        if limit is not None and len(tokens) > limit:
            raise InputError(f"the text has {len(tokens)} tokens, but {self._lm.name} takes {limit}; shorten it")
        return self.tokens(tokens.tolist(), max(first, 1), retrieval)

    def tokens(self, tokens: Sequence[int], first: int, retrieval: Retrieval) -> Citations:
        """Cite the tokens from `first` on, at least 1: one forward pass over all, and a search for those cited.

        :raises InputError: there are none.
        """
        if first >= len(tokens):
            raise InputError("the text has no token that something predicts; give a longer text")
        setting, store, begin = retrieval.setting, retrieval.searcher.store, first - 1
        memory = self.memory(store)
        # Where λ is by the text so far, what is not cited is read and searched for too.
        since = 0 if setting.by_text else begin
        targets_T = np.array(tokens[1:])
        vectors_TD, final_TD = read_vectors(self._lm, retrieval.layer, np.array(tokens[:-1]))
        lm_T = self._lm.target_log_probs(final_TD[since:], torch.from_numpy(targets_T[since:])).numpy()
        trust = Trust(setting)
        if begin > since:
            trust = Trust(setting, retrieval.gains_at(vectors_TD[:begin], targets_T[:begin], lm_T[:begin]).tolist())
        queries_TD = vectors_TD[begin:].float().cpu().numpy()
        near = deep_neighbors(retrieval.searcher, queries_TD, setting.k, memory.documents)
        found = []
        for one, token, lm in zip(near, tokens[first:], lm_T[begin - since :].tolist(), strict=True):
            found.append(support(one, memory.documents.of(one.rows_K), token, lm, setting, trust.factor))
            trust.add(found[-1].gain)
        return Citations(store, memory, tokens[first:], pieces_of(self._lm, tokens)[first:], found)

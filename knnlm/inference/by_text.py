"""λ by the text so far, in forward passes that see only the last tokens of each row (`knnlm.knn.trust`).

What the next token will do to the trust is kept for the texts that were read last, under the text itself and not under
a row or a cache: so it follows beams that change places, rows that join and leave, and candidates that are refused. It
is a memory only: what it lacks is read again.

Shapes: B rows, L tokens so far with padding, T columns of a pass, D dimension, Q places that are searched for, N
positions with logits, V vocabulary, M tokens with a neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import compress, islice
from threading import Lock
from typing import Any
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm.errors import InputError
from knnlm.knn.mixing import Floats, TokenShares, mix
from knnlm.knn.retrieval import Retrieval
from knnlm.knn.searcher import QUERY_BLOCK
from knnlm.knn.trust import FIRST, heard, token_gains, trusts, updated
from knnlm.layer_names import FINAL
from knnlm.model.lm import LanguageModel

Ids = NDArray[np.int64]
_Key = tuple[ref[Retrieval], bytes]
UNKNOWN = -1
"""In place of the next token, where it is not known yet."""
# Texts whose next token is prepared for, 8 bytes for each token with a neighbour; and of each row in one pass: of
# several new tokens, as assisted decoding tries them, the last may be refused.
_HELD, _BRANCHES = 2048, 16


@dataclass(frozen=True, eq=False)
class TextsSoFar:
    """The tokens of each row up to the last one of a pass, with T columns of their own in it."""

    tokens_BL: Ids
    real_BL: NDArray[np.bool_]
    """What is no padding."""
    columns: int

    @classmethod
    def of(cls, tokens_BL: Tensor, mask_BL: Tensor | None, columns: int) -> TextsSoFar:
        """From tensors of a model's input; without a mask nothing is padding."""
        tokens = tokens_BL.cpu().numpy().astype(np.int64)
        real = np.ones(tokens.shape, bool) if mask_BL is None else mask_BL.bool().cpu().numpy()
        return cls(tokens, real, columns)

    def row(self, row: int) -> Ids:
        """The text of one row."""
        found: Ids = self.tokens_BL[row, self.real_BL[row]]
        return found

    def places(self, row: int) -> Ids:
        """The number in its row's text of each column's token, [T]; -1 for padding."""
        real_L = self.real_BL[row]
        return np.where(real_L, real_L.cumsum() - 1, -1)[-self.columns :]


@dataclass(frozen=True, eq=False)
class Read:
    """Vectors of one pass."""

    kept_BTD: Tensor
    """The layer's, at the positions that have logits."""
    every_BTD: Tensor | None = None
    """The layer's at all positions, where they are wanted, as those of `final_norm`."""
    final_BTD: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The places of a text that a pass searches for: consecutive, up to the last one that is mixed."""

    tokens: Ids
    """The text so far."""
    retrieval: Retrieval
    trust: float
    """The trust at the first place."""
    places_Q: Ids
    """Numbers of tokens, from 0."""
    outputs_Q: Ids
    """Each place's position among the N with logits; -1 where it has none, and only moves the trust."""
    columns_Q: Ids
    """Each place's position among the B x T of the pass."""

    @property
    def targets_Q(self) -> Ids:
        """The token after each place, or `UNKNOWN`."""
        found: Ids = np.append(self.tokens, UNKNOWN)[self.places_Q + 1]
        return found


@dataclass(frozen=True, eq=False)
class _Standing:
    """The trust at a text's end, and what each next token adds to log p of the mixture over log p_LM."""

    trust: float
    tokens_M: NDArray[np.int32]
    gains_M: NDArray[np.float32]
    other: float
    """The gain of a token that no neighbour has."""

    def after(self, token: int) -> float:
        """The trust at the next place, once the token has come."""
        at = int(np.searchsorted(self.tokens_M, token))
        is_near = at < len(self.tokens_M) and self.tokens_M[at] == token
        return updated(self.trust, float(self.gains_M[at]) if is_near else self.other)


class TextMemory:
    """What is known of the texts that were read last, of one model."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm, self._lock = lm, Lock()
        self._standings: dict[_Key, _Standing] = {}

    def plans(self, texts: TextsSoFar, kept: Sequence[int], rows_Q: Tensor, retrieval: Retrieval) -> list[RowPlan]:
        """Plan a pass, for the rows whose setting is by text: each begins where its trust is known.

        :param kept: the columns that have logits.
        :param rows_Q: the positions to mix, among the B x `kept` that have logits.
        """
        outputs_N, retrievals, found = rows_Q.cpu().numpy(), retrieval.of_rows(len(texts.tokens_BL)), []
        for row in np.unique(outputs_N // len(kept)).tolist():
            if retrievals[row].setting.by_text and retrievals[row].setting.lam > 0:
                places_T, own_N = texts.places(row), outputs_N[outputs_N // len(kept) == row]
                outputs = {int(places_T[kept[at % len(kept)]]): int(at) for at in own_N}
                outputs.pop(-1, None)  # padding that a mask for a static cache does not show
                if outputs:
                    found.append(self._plan(texts, row, outputs, retrievals[row]))
        return found

    def _plan(self, texts: TextsSoFar, row: int, outputs: Mapping[int, int], retrieval: Retrieval) -> RowPlan:
        tokens, places_T = texts.row(row), texts.places(row)
        first, trust = self._begin(tokens, min(outputs), int(places_T[places_T >= 0][0]), retrieval)
        places_Q = np.arange(first, max(outputs) + 1)
        outputs_Q = np.array([outputs.get(at, -1) for at in places_Q.tolist()])
        columns_Q = row * texts.columns + np.flatnonzero(np.isin(places_T, places_Q))
        return RowPlan(tokens, retrieval, trust, places_Q, outputs_Q, columns_Q)

    def _begin(self, tokens: Ids, mixed: int, read: int, retrieval: Retrieval) -> tuple[int, float]:
        """The first place to search for, and its trust: the first that is mixed, or that this pass reads."""
        for first in (mixed, read):
            if first == 0:
                return 0, FIRST
            if (standing := self._known(tokens[:first], retrieval)) is not None:
                return first, standing.after(int(tokens[first]))
        return read, self._read(tokens[:read], retrieval).after(int(tokens[read]))

    def _read(self, tokens: Ids, retrieval: Retrieval) -> _Standing:
        """Read a text that is not known."""
        vectors_TD, final_TD = read_vectors(self._lm, retrieval.layer, tokens)
        places_Q = np.arange(len(tokens))
        outputs_Q = np.where(places_Q == places_Q[-1], 0, -1)
        plan = RowPlan(tokens, retrieval, FIRST, places_Q, outputs_Q, places_Q)
        lm_Q = target_log_probs(self._lm, final_TD, plan.targets_Q)
        self.mix_in(self._lm.log_probs(final_TD[-1:]).clone(), [plan], vectors_TD, lm_Q)
        found = self._known(tokens, retrieval)
        assert found is not None, "it was just read"
        return found

    def mix_read(self, log_probs_NV: Tensor, plans: Sequence[RowPlan], read: Read) -> None:
        """Mix in place what a pass has read; see `mix_in`."""
        targets_Q = np.concatenate([plan.targets_Q for plan in plans])
        if read.every_BTD is None or read.final_BTD is None:  # one place of each row: none before it moves the trust
            outputs = torch.from_numpy(np.concatenate([plan.outputs_Q for plan in plans]))
            vectors_QD, lm_Q = read.kept_BTD.flatten(0, 1)[outputs], np.zeros(len(targets_Q))
        else:
            columns = torch.from_numpy(np.concatenate([plan.columns_Q for plan in plans]))
            vectors_QD = read.every_BTD.flatten(0, 1)[columns]
            lm_Q = target_log_probs(self._lm, read.final_BTD.flatten(0, 1)[columns], targets_Q)
        self.mix_in(log_probs_NV, plans, vectors_QD, lm_Q)

    def mix_end(
        self, log_probs_NV: Tensor, tokens: Ids, lm_TV: Tensor, vectors_TD: Tensor, retrieval: Retrieval
    ) -> None:
        """Mix in place the last N places of a whole text; the LM's log-probabilities and vectors are of all places."""
        places_Q = np.arange(len(tokens))
        outputs_Q = np.maximum(places_Q - len(places_Q) + len(log_probs_NV), -1)
        plan = RowPlan(tokens, retrieval, FIRST, places_Q, outputs_Q, places_Q)
        targets = torch.from_numpy(tokens[1:]).to(lm_TV.device)[:, None]
        lm_Q = np.append(lm_TV[: len(targets)].gather(1, targets)[:, 0].double().cpu().numpy(), 0.0)
        self.mix_in(log_probs_NV, [plan], vectors_TD, lm_Q)

    def mix_in(self, log_probs_NV: Tensor, plans: Sequence[RowPlan], vectors_QD: Tensor, lm_Q: Floats) -> None:
        """Mix in place; the vectors, and log p_LM of the targets (any number for `UNKNOWN`), are of all plans' places.

        A position for which no neighbour is found keeps the plain LM's, as one at which the trust is too low.
        """
        places = [len(plan.places_Q) for plan in plans]
        for one in dict.fromkeys(plan.retrieval for plan in plans):
            is_same = [plan.retrieval == one for plan in plans]
            chosen_Q, same = np.repeat(is_same, places), [*compress(plans, is_same)]
            vectors = vectors_QD[torch.from_numpy(chosen_Q).to(vectors_QD.device)]
            self._mix_alike(log_probs_NV, same, vectors, lm_Q[chosen_Q], one)

    def _mix_alike(
        self, log_probs_NV: Tensor, plans: Sequence[RowPlan], vectors_QD: Tensor, lm_Q: Floats, retrieval: Retrieval
    ) -> None:
        targets_Q = np.concatenate([plan.targets_Q for plan in plans])
        outputs_Q = np.concatenate([plan.outputs_Q for plan in plans])
        gains_Q, ends, mixed = np.empty(len(targets_Q)), _ends(plans), 0
        trust = _trusts(plans, gains_Q)
        for start in range(0, len(targets_Q), QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            found, is_mixed_Q = retrieval.find(vectors_QD[block]), outputs_Q[block] >= 0
            gains_Q[block] = retrieval.gains(found, targets_Q[block], lm_Q[block])
            trust_N = np.array([*islice(trust, len(is_mixed_Q))])[is_mixed_Q]
            outputs_N = torch.from_numpy(outputs_Q[block][is_mixed_Q]).to(log_probs_NV.device)
            found = found.rows(is_mixed_Q)
            lambdas_N, shares = retrieval.lambdas(found), retrieval.shares(found)
            for number in range(len(trust_N)):
                if (end := ends.get(mixed + number)) is not None:
                    standing = _standing(log_probs_NV[outputs_N[number]], shares, number, lambdas_N, trust_N)
                    self._hold(*end, standing)
            mixed += len(trust_N)
            retrieval.mix_shares(log_probs_NV, outputs_N, shares, lambdas_N * heard(trust_N))

    def _known(self, text: Ids, retrieval: Retrieval) -> _Standing | None:
        key = _key(text, retrieval)
        with self._lock:
            return self._standings.get(key)

    def _hold(self, text: Ids, retrieval: Retrieval, standing: _Standing) -> None:
        key = _key(text, retrieval)
        with self._lock:
            self._standings.pop(key, None)
            self._standings[key] = standing
            while len(self._standings) > _HELD:
                del self._standings[next(iter(self._standings))]


def texts_so_far(given: Mapping[str, Any], entering: Tensor, known: tuple[Tensor, Tensor | None] | None) -> TextsSoFar:
    """Return the texts of a forward pass with these arguments.

    :param entering: the tokens or embeddings that have no vectors yet.
    :param known: all tokens so far and their mask, if the pass has a cache.
    :raises InputError: tokens before this pass, or of it, are not known.
    """
    tokens_BL, mask_BL = (given.get("input_ids"), given.get("attention_mask")) if known is None else known
    past: Any = given.get("past_key_values")
    length = entering.shape[1] + (0 if past is None else int(past.get_seq_length()))
    mask_BL = mask_BL if isinstance(mask_BL, Tensor) and mask_BL.ndim == 2 else None
    shapes = {tuple(one.shape) for one in (tokens_BL, mask_BL) if one is not None}
    if tokens_BL is None or shapes != {(len(entering), length)}:
        told = 0 if tokens_BL is None else tokens_BL.shape[1]
        raise InputError(
            f"λ depends on the text so far, but {told} of its {length} tokens are known; give whole rows of tokens, "
            "with a cache of your own as `text_so_far`, or a `lam` for all texts (docs/generate.md)"
        )
    return TextsSoFar.of(tokens_BL, mask_BL, entering.shape[1])


def read_vectors(lm: LanguageModel, layer: str, tokens: Ids) -> tuple[Tensor, Tensor]:
    """Read a text: vectors of the layer and `final_norm` vectors, both [T, D]."""
    received: dict[str, Tensor] = {}

    def take(name: str, vectors_BTD: Tensor) -> None:
        received[name] = vectors_BTD[0].clone()

    lm.forward(torch.from_numpy(tokens)[None], [layer, FINAL], take)
    return received[layer], received[FINAL]


def target_log_probs(lm: LanguageModel, final_QD: Tensor, targets_Q: Ids) -> Floats:
    """Return log p_LM of each target, [Q]; 0 for `UNKNOWN`."""
    known_Q = targets_Q != UNKNOWN
    found_Q = np.zeros(len(targets_Q))
    finals = final_QD[torch.from_numpy(known_Q).to(final_QD.device)]
    found_Q[known_Q] = lm.target_log_probs(finals, torch.from_numpy(targets_Q[known_Q])).numpy()
    return found_Q


def _trusts(plans: Sequence[RowPlan], gains_Q: Floats) -> Iterator[float]:
    """The trust at each place of all plans; a place's gain is read only when the trust at the next one is due."""
    start = 0
    for plan in plans:
        stop = start + len(plan.places_Q)
        yield from trusts((float(gains_Q[at]) for at in range(start, stop - 1)), plan.trust)
        start = stop


def _ends(plans: Sequence[RowPlan]) -> dict[int, tuple[Ids, Retrieval]]:
    """The last of each plan's mixed places, numbered among those of all: the texts that end there, and what reads."""
    start, found = 0, {}
    for plan in plans:
        places = plan.places_Q[plan.outputs_Q >= 0]
        for at in range(max(0, len(places) - _BRANCHES), len(places)):
            found[start + at] = plan.tokens[: places[at] + 1], plan.retrieval
        start += len(places)
    return found


def _standing(log_probs_V: Tensor, shares: TokenShares, number: int, lambdas_N: Floats, trust_N: Floats) -> _Standing:
    part = slice(*np.searchsorted(shares.rows_M, [number, number + 1]))
    tokens_M, lam = shares.tokens_M[part], float(lambdas_N[number])
    lm_M = log_probs_V[torch.from_numpy(tokens_M).to(log_probs_V.device)].double().cpu().numpy()
    gains_M = token_gains(mix(lm_M, shares.log_probs_M[part], lam), lm_M)
    with np.errstate(divide="ignore"):
        other = float(np.log1p(-lam))
    return _Standing(float(trust_N[number]), tokens_M.astype(np.int32), gains_M.astype(np.float32), other)


def _key(text: Ids, retrieval: Retrieval) -> _Key:
    # Weak: what was read with an older generation of a datastore must not keep its files and tokens.
    return ref(retrieval), blake2b(text.astype(np.int32).tobytes(), digest_size=16).digest()

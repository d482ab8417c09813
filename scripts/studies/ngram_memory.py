"""An exact n-gram memory of a store's text beside its kNN memory: the rows of docs/ngram-memory.md.

    .venv/bin/python scripts/studies/ngram_memory.py --model MODEL --text TEXT

The rows of the store are sorted by their context read backwards: a suffix array of the reversed text that has one entry
for each key. The longest end of a query's context that a row's context ends in too is found by bisection, and the
values of all such rows are counted (the ∞-gram of Liu et al. 2024). A row's context stops where its document begins, so
that no match crosses a border. λ is a logistic function of the length of the match and the number of its rows, as
the gate of `knnlm.knn.mixing` is of distance and disagreement. A tenth of the text is held out as in `layer_study.py`.
Shapes: N rows of the store, Q queries, F inputs of λ.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from layer_study import split_text
from mixing_study import Part, report, searched
from numpy.typing import NDArray

from knnlm.config import KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.evaluation.queries import Queries
from knnlm.knn.fitting import fit, fit_gate, fit_lambda
from knnlm.knn.mixing import Floats, logit, mix, sigmoid
from knnlm.model.loading import load_model
from knnlm.pipeline import build
from knnlm.store.datastore import Datastore

Ints = NDArray[np.int64]
# As in `knnlm.knn.fitting`: the weight of the prior for one λ for all, in tokens.
PRIOR_TOKENS = 10.0
TOKEN_BYTES = 4


@dataclass(frozen=True)
class Contexts:
    """The context of every row of a datastore, read backwards: bytes that compare as the tokens do."""

    backwards: bytes
    starts_N: Ints
    """The place in `backwards` of the token before the row's value."""
    ends_N: Ints
    """The place behind the first token of the row's document."""

    @classmethod
    def of(cls, values_N: NDArray[np.int32], documents: Ints) -> Contexts:
        """Contexts of a datastore, from its `values` and `documents`."""
        count, firsts = len(values_N), documents[:, 0]
        before_N = np.concatenate([values_N[:1], values_N[:-1]])
        before_N[firsts] = documents[:, 1]
        lengths = np.diff(np.append(firsts, count))
        rows_N = np.arange(count, dtype=np.int64)
        return cls(before_N[::-1].astype(">u4").tobytes(), count - 1 - rows_N, count - np.repeat(firsts, lengths))

    def __len__(self) -> int:
        return len(self.starts_N)

    def get(self, row: int, length: int | None = None) -> bytes:
        """The last `length` tokens of a row's context, the nearest first; None: all that its document has."""
        start, end = int(self.starts_N[row]), int(self.ends_N[row])
        return self.backwards[TOKEN_BYTES * start : TOKEN_BYTES * (end if length is None else min(end, start + length))]


def sorted_rows(contexts: Contexts) -> Ints:
    """Rows in the order of their contexts, by prefix doubling (Manber & Myers 1993)."""
    tokens_N = np.frombuffer(contexts.backwards, ">u4")[contexts.starts_N]
    lengths_N, rows_N = contexts.ends_N - contexts.starts_N, np.arange(len(contexts))
    rank_N, known = np.unique(tokens_N, return_inverse=True)[1].astype(np.int64) + 1, 1
    while known < lengths_N.max() and rank_N.max() < len(rank_N):
        # 0, before all else, where the context has ended.
        rest_N = np.where(lengths_N > known, rank_N[np.maximum(rows_N - known, 0)], 0)
        rank_N = np.unique(rank_N * (len(rank_N) + 1) + rest_N, return_inverse=True)[1].astype(np.int64) + 1
        known *= 2
    return np.argsort(rank_N, kind="stable")


@dataclass(frozen=True)
class Match:
    """The rows whose contexts share the longest end with a query's context."""

    length: int
    """Tokens that agree; 0: the last token never stands before a value, and all rows count."""
    low: int
    """The first of the rows, in sorted order."""
    high: int
    """The place behind the last of them."""


@dataclass(frozen=True)
class NgramMemory:
    """Counts of what followed, after the longest match of a context."""

    contexts: Contexts
    order_N: Ints
    values_N: NDArray[np.int32]
    """The value of each row in sorted order."""

    @classmethod
    def of(cls, values_N: NDArray[np.int32], documents: Ints) -> NgramMemory:
        """The memory of a datastore, from its `values` and `documents`."""
        contexts = Contexts.of(values_N, documents)
        order_N = sorted_rows(contexts)
        return cls(contexts, order_N, values_N[order_N])

    def match(self, context: bytes) -> Match:
        """The rows that match most of a context, as `Contexts.get` gives it."""
        order = self.order_N
        place = bisect_left(order, context, key=self.contexts.get)
        near = [self.contexts.get(row) for row in order[max(place - 1, 0) : place + 1]]
        length = max(_shared(context, other) for other in near)
        end, key = context[: TOKEN_BYTES * length], lambda row: self.contexts.get(row, length)
        return Match(length, bisect_left(order, end, key=key), bisect_right(order, end, key=key))

    def counted(self, queries: Contexts, targets_Q: NDArray[np.int32]) -> Counts:
        """What followed the longest match of each query."""
        found = [self.match(queries.get(row)) for row in range(len(queries))]
        followed = (self.values_N[one.low : one.high] for one in found)
        hits = [np.count_nonzero(values == target) for values, target in zip(followed, targets_Q, strict=True)]
        rows = [one.high - one.low for one in found]
        return Counts(np.array([one.length for one in found]), np.array(rows), np.array(hits))


def _shared(one: bytes, other: bytes) -> int:
    """Tokens at the beginning that agree, by bisection."""
    low, high = 0, min(len(one), len(other)) // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if one[: TOKEN_BYTES * middle] == other[: TOKEN_BYTES * middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class Counts:
    """For each query: the tokens of its longest match, the rows that have it, and those among them with the target."""

    lengths_Q: Ints
    rows_Q: Ints
    hits_Q: Ints

    @property
    def log_probs_Q(self) -> Floats:
        """The n-gram's log-probability of each target; -inf where it never followed."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.hits_Q) - np.log(self.rows_Q))

    @property
    def inputs_QF(self) -> Floats:
        """What λ depends on, besides 1: logs of the match's length and of the number of its rows."""
        return np.column_stack([np.log1p(self.lengths_Q), np.log(self.rows_Q)])


@dataclass(frozen=True)
class LengthGate:
    """λ of the n-gram by the match: a logistic function of its inputs, fitted by penalised likelihood."""

    lam: float
    """The fixed λ, which the prior pulls to."""
    means_F: Floats
    scales_F: Floats
    weights: Floats
    """The offset, then a slope for each standardised input."""

    @classmethod
    def fitted(cls, counts: Counts, base_Q: Floats, steps: int = 1000) -> LengthGate:
        """EM against the log-probabilities `base_Q`, its steps bounded as by Böhning & Lindsay 1988: none loses."""
        inputs_QF = counts.inputs_QF
        lam = fit_lambda(base_Q, counts.log_probs_Q)
        gate = cls(
            lam, inputs_QF.mean(axis=0), np.maximum(inputs_QF.std(axis=0), 1e-9), np.zeros(1 + inputs_QF.shape[1])
        )
        design, gains_Q = gate._design(counts), counts.log_probs_Q - base_Q
        curvature = design.T @ design / 4 + PRIOR_TOKENS * np.eye(design.shape[1])
        weights = gate.weights
        for _ in range(steps):
            logits_Q = logit(lam) + design @ weights
            step = np.linalg.solve(
                curvature, design.T @ (sigmoid(logits_Q + gains_Q) - sigmoid(logits_Q)) - PRIOR_TOKENS * weights
            )
            weights = weights + step
            if np.abs(step).max() < 1e-7:
                break
        return cls(lam, gate.means_F, gate.scales_F, weights)

    def lambdas(self, counts: Counts) -> Floats:
        """λ of each query."""
        return sigmoid(logit(self.lam) + self._design(counts) @ self.weights)

    def _design(self, counts: Counts) -> Floats:
        scaled_QF = (counts.inputs_QF - self.means_F) / self.scales_F
        return np.column_stack([np.ones(len(scaled_QF)), scaled_QF])

    def mixed(self, counts: Counts, base_Q: Floats) -> Floats:
        """log(λ p_n-gram + (1 - λ) p_base) of each target."""
        return mix(base_Q, counts.log_probs_Q, self.lambdas(counts))


def knn_by_query(whole: Part, tuning_Q: NDArray[np.bool_]) -> Floats:
    """Log-probabilities of the kNN-LM with λ by query, fitted on the tuning part."""
    tuning = whole.rows(tuning_Q)
    setting = fit_gate(tuning.search, tuning.lm_Q, fit(tuning.search, tuning.lm_Q))
    lambdas_Q = setting.lambdas(whole.search.distances_QK, whole.search.values_QJ)
    return -whole.losses(setting, lambda search: lambdas_Q)


def with_ngrams(counts: Counts, base_Q: Floats, tuning_Q: NDArray[np.bool_]) -> Floats:
    """Log-probabilities of the mixture of the n-grams with another model, fitted on the tuning part."""
    few = Counts(counts.lengths_Q[tuning_Q], counts.rows_Q[tuning_Q], counts.hits_Q[tuning_Q])
    return LengthGate.fitted(few, base_Q[tuning_Q]).mixed(counts, base_Q)


def compare(whole: Part, queries: Queries, counts: Counts) -> None:
    """Print the rows: each against the LM, and both together against the kNN-LM alone and the n-grams alone."""
    parts, tuning_Q = queries.parts, queries.parts.tuning_Q
    knn_Q = knn_by_query(whole, tuning_Q)
    alone_Q = with_ngrams(counts, whole.lm_Q, tuning_Q)
    both_Q = with_ngrams(counts, knn_Q, tuning_Q)
    told, clusters_Q = parts.reporting_Q, parts.clusters_Q[parts.reporting_Q]
    seen = f"{counts.lengths_Q[told].mean():.2f} tokens matched, target among what followed {_share(counts, told):.1%}"
    print(f"LM {np.exp(-whole.lm_Q[told].mean()):.2f} on {told.sum():,} tokens, {seen}")
    for name, log_probs_Q, base_Q, against in _rows(whole.lm_Q, alone_Q, knn_Q, both_Q):
        report(name, -log_probs_Q[told], -base_Q[told], clusters_Q, against)


def _rows(lm_Q: Floats, alone_Q: Floats, knn_Q: Floats, both_Q: Floats) -> Iterator[tuple[str, Floats, Floats, str]]:
    yield "n-gram", alone_Q, lm_Q, "against the LM"
    yield "kNN", knn_Q, lm_Q, "against the LM"
    yield "both", both_Q, lm_Q, "against the LM"
    yield "both", both_Q, knn_Q, "against kNN"
    yield "both", both_Q, alone_Q, "against n-gram"


def _share(counts: Counts, chosen_Q: NDArray[np.bool_]) -> float:
    return float((counts.hits_Q[chosen_Q] > 0).mean())


def remember(store: Datastore, queries: Queries) -> Counts:
    """The store's n-grams, counted for all queries; prints what that took."""
    start = time.perf_counter()
    memory = NgramMemory.of(np.asarray(store.values), store.documents)
    made = time.perf_counter() - start
    contexts = Contexts.of(np.asarray(queries.store.values), queries.store.documents)
    counts = memory.counted(contexts, queries.targets_Q)
    each = (time.perf_counter() - start - made) / len(contexts)
    print(f"suffix array of {store.count:,} rows in {made:.2f} s, {each * 1e6:.0f} µs a query")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--layer", default="-1.ffn_input")
    parser.add_argument("--max-tokens", type=int, default=50_000)
    parser.add_argument("--eval-tokens", type=int, default=5_000)
    args = parser.parse_args()
    lm, text = load_model(args.model), TextConfig(max_tokens=args.max_tokens)
    settings = Settings(text=text, layers=LayerConfig(layers=args.layer), knn=KNNConfig(index="exact"))
    with tempfile.TemporaryDirectory() as folder:
        training, held_out = split_text(args.text, Path(folder))
        store = build(lm, [training], Path(folder) / "store", settings=settings)
        with searched(lm, store, [held_out], args.eval_tokens, settings) as (whole, queries):
            compare(whole, queries, remember(store, queries))


if __name__ == "__main__":
    main()

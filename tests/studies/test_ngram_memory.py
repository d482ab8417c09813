"""The exact n-gram memory of the study script against counting in all rows, one after the other."""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import numpy as np
import pytest

from tests.source_files import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "studies"))
    return importlib.import_module("ngram_memory")


Document = list[int]


def stored(documents: list[Document]) -> tuple[np.ndarray, np.ndarray]:
    """`values` and `documents` of a datastore of them (docs/format.md)."""
    values, table = [], []
    for number, tokens in enumerate(documents):
        table.append((len(values), tokens[0], 0, number + 1))
        values += tokens[1:]
    return np.array(values, np.int32), np.array(table, np.int64)


def rows_of(documents: list[Document]) -> list[tuple[Document, int]]:
    """Each row's context and value."""
    return [(tokens[:place], tokens[place]) for tokens in documents for place in range(1, len(tokens))]


def agreeing(one: Document, other: Document) -> int:
    """Tokens at the end of both that agree."""
    pairs = list(zip(reversed(one), reversed(other), strict=False))
    return next((number for number, (a, b) in enumerate(pairs) if a != b), len(pairs))


def counted_one_by_one(documents: list[Document], context: Document, target: int) -> tuple[int, int, int]:
    """Length of the longest match, rows that have it, and those with the target."""
    lengths = [agreeing(context, other) for other, _ in rows_of(documents)]
    followed = [value for length, (_, value) in zip(lengths, rows_of(documents), strict=True) if length == max(lengths)]
    return max(lengths), len(followed), followed.count(target)


def random_documents(rng: np.random.Generator, count: int, most: int, tokens: list[int]) -> list[Document]:
    return [rng.choice(tokens, size=rng.integers(2, most)).tolist() for _ in range(count)]


# The second has tokens over 255 and 65,535, whose bytes have to compare as the tokens do.
@pytest.mark.parametrize(("tokens", "seed"), [([0, 1], 0), ([1, 255, 256, 70_000], 1), (list(range(40)), 2)])
def test_counts_are_those_of_a_look_at_every_row(script: ModuleType, tokens: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    documents = random_documents(rng, 12, 30, tokens)
    queries = [*random_documents(rng, 6, 30, tokens), documents[3], documents[5][:4]]
    memory, (values, table) = script.NgramMemory.of(*stored(documents)), stored(queries)
    found = memory.counted(script.Contexts.of(values, table), values)
    expected = [counted_one_by_one(documents, context, target) for context, target in rows_of(queries)]
    assert list(zip(found.lengths_Q, found.rows_Q, found.hits_Q, strict=True)) == expected
    probabilities = np.array([hits / rows for _, rows, hits in expected], np.float64)
    np.testing.assert_allclose(np.exp(found.log_probs_Q), probabilities, rtol=1e-14)


def test_a_match_ends_where_its_document_begins(script: ModuleType) -> None:
    documents = [[7, 8, 1], [2, 3, 4], [9, 2, 3, 5]]
    memory, (values, table) = script.NgramMemory.of(*stored(documents)), stored([[1, 2, 3, 4]])
    found = memory.counted(script.Contexts.of(values, table), values)
    # "1 2" stands only across a border; "2 3" stands in two documents, once with 4 after it.
    assert found.lengths_Q.tolist() == [0, 1, 2]
    assert (found.rows_Q[2], found.hits_Q[2]) == (2, 1)


def test_shares_of_all_tokens_are_one(script: ModuleType) -> None:
    documents = random_documents(np.random.default_rng(3), 8, 20, list(range(5)))
    memory, (values, table) = script.NgramMemory.of(*stored(documents)), stored(documents[:2])
    contexts = script.Contexts.of(values, table)
    shares = [np.exp(memory.counted(contexts, np.full(len(values), token)).log_probs_Q) for token in range(5)]
    np.testing.assert_allclose(np.sum(shares, axis=0), 1, rtol=1e-12)


def penalised(script: ModuleType, counts: object, base_Q: np.ndarray, lam: float, weights: np.ndarray) -> float:
    """The log-likelihood that a gate maximises, written as sums of probabilities."""
    inputs_QF = np.column_stack([np.log1p(counts.lengths_Q), np.log(counts.rows_Q)])
    scaled_QF = (inputs_QF - inputs_QF.mean(axis=0)) / inputs_QF.std(axis=0)
    total = 0.0
    for inputs, rows, hits, base in zip(scaled_QF, counts.rows_Q, counts.hits_Q, base_Q, strict=True):
        odds = lam / (1 - lam) * math.exp(weights[0] + inputs @ weights[1:])
        total += math.log((odds * hits / rows + math.exp(base)) / (1 + odds))
    return total - script.PRIOR_TOKENS / 2 * float(weights @ weights)


def test_fitted_weights_are_the_best_and_lambda_is_theirs(script: ModuleType) -> None:
    rng = np.random.default_rng(4)
    lengths_Q, rows_Q = rng.integers(0, 9, 400), rng.integers(1, 30, 400)
    hits_Q = rng.binomial(rows_Q, np.clip(lengths_Q / 12, 0, 1))
    counts, base_Q = script.Counts(lengths_Q, rows_Q, hits_Q), np.log(rng.uniform(0.01, 0.5, 400))
    gate = script.LengthGate.fitted(counts, base_Q)
    best = penalised(script, counts, base_Q, gate.lam, gate.weights)
    assert best > penalised(script, counts, base_Q, gate.lam, np.zeros(3)) + 5 and gate.weights[1] > 0
    for change in 0.02 * np.vstack([np.eye(3), -np.eye(3)]):
        assert penalised(script, counts, base_Q, gate.lam, gate.weights + change) < best
    gained = (gate.mixed(counts, base_Q)).sum() - script.PRIOR_TOKENS / 2 * float(gate.weights @ gate.weights)
    assert gained == pytest.approx(best, rel=1e-12)

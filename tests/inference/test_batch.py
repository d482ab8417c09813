"""Rows that are continued together, come and go, against teacher forcing of each row alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from knnlm import KNNLM
from knnlm.inference import batch as module
from knnlm.inference.batch import RowModel, RunningBatch
from knnlm.inference.sampling import choose
from knnlm.knn.mixing import Mix
from knnlm.knn.retrieval import Retrieval
from tests.inference.test_generation import TOLERANCE, forced, knn_of, stores  # noqa: F401 - fixtures
from tests.tiny_models import VOCABULARY

# With no cache at all: openai-gpt. With a window of 24 tokens: mistral, in every second block gemma2.
KINDS = ("gpt2", "llama", "falcon", "bloom", "mixtral", "mpt", "gpt-neo", "openai-gpt", "mistral", "gemma2")
SETTINGS = (Mix(64, 4.0, 0.6), Mix(16, 2.0, 0.0), Mix(64, 4.0, 0.6), Mix(8, 1.0, 1.0))


def alone(model: KNNLM, tokens: list[int], setting: Mix) -> torch.Tensor:
    """Teacher forcing of one row with its own setting: log p at all positions, [T, V]."""
    model.retrieval = Retrieval(model.retrieval.searcher, setting)
    return forced(model, tokens)


def with_settings(model: KNNLM, settings: Sequence[Mix]) -> list[Retrieval]:
    return [Retrieval(model.retrieval.searcher, setting) for setting in settings]


class Rows:
    """A batch, and the tokens that its rows must have."""

    def __init__(self, model: KNNLM) -> None:
        self.model, self.rows = RowModel(model, VOCABULARY), []
        self.reference = model
        self.batch: RunningBatch | None = None

    def enter(self, *rows: tuple[list[int], Mix]) -> None:
        retrievals = with_settings(self.reference, [setting for _, setting in rows])
        added, log_probs_BV = self.model.prefill([tokens for tokens, _ in rows], retrievals)
        self.check(rows, log_probs_BV)
        if self.batch is None:
            self.batch = added
        else:
            self.batch.join(added)
        self.rows += rows

    def step(self, random: np.random.Generator) -> None:
        new = random.integers(0, VOCABULARY - 1, len(self.rows)).tolist()
        self.rows = [([*tokens, token], setting) for (tokens, setting), token in zip(self.rows, new, strict=True)]
        self.check(self.rows, self.batch.step(new))

    def select(self, *chosen: int) -> None:
        self.batch.select(chosen)
        self.rows = [self.rows[row] for row in chosen]

    def check(self, rows, log_probs_BV) -> None:
        assert len(log_probs_BV) == len(rows)
        for (tokens, setting), log_probs_V in zip(rows, log_probs_BV, strict=True):
            due = alone(self.reference, tokens, setting)[-1]
            np.testing.assert_allclose(log_probs_V.exp().numpy(), due.exp().numpy(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_come_and_go_are_those_alone(kind, knn_of) -> None:  # noqa: F811
    random = np.random.default_rng(0)
    prompts = [random.integers(0, VOCABULARY - 1, size).tolist() for size in (3, 40, 11, 1, 30)]
    rows = Rows(knn_of(kind))
    rows.enter((prompts[0], SETTINGS[0]))
    rows.step(random)
    rows.enter((prompts[1], SETTINGS[1]), (prompts[2], SETTINGS[2]))  # longer than what runs, and than a window
    rows.step(random)
    rows.step(random)
    rows.select(2, 0, 0)  # the longest leaves, and one is there twice
    assert rows.batch.tokens_BT.shape[1] == max(len(tokens) for tokens, _ in rows.rows)
    rows.step(random)
    rows.enter((prompts[3], SETTINGS[3]))  # shorter
    rows.step(random)
    rows.enter((prompts[4], SETTINGS[0]))
    for _ in range(3):
        rows.step(random)
    assert rows.model.keeps_cache == (kind != "openai-gpt")


@pytest.mark.parametrize("scores", [1 << 24, 5 * VOCABULARY])
@pytest.mark.parametrize("kind", ["gpt2", "bloom", "openai-gpt", "mistral"])
def test_all_positions_of_prompts_are_those_alone(kind, scores, knn_of, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(module, "_PROMPT_SCORES", scores)
    random = np.random.default_rng(1)
    prompts = [random.integers(0, VOCABULARY - 1, size).tolist() for size in (7, 29)]
    knn, parts = knn_of(kind), []
    batch, last_BV = RowModel(knn, VOCABULARY).prefill(
        prompts, with_settings(knn, SETTINGS[:2]), lambda *part: parts.append(part)
    )
    assert [start for start, _ in parts] == list(range(0, 29, 2 if scores < 1e6 and batch.cache else 29))
    whole_BTV = torch.cat([log_probs for _, log_probs in parts], 1)
    for row, (prompt, setting) in enumerate(zip(prompts, SETTINGS, strict=False)):
        due = alone(knn, prompt, setting)
        np.testing.assert_allclose(whole_BTV[row, -len(prompt) :].numpy(), due.numpy(), **TOLERANCE)
        np.testing.assert_array_equal(last_BV[row], whole_BTV[row, -1])


def test_one_search_serves_all_rows_of_one_setting(knn_of) -> None:  # noqa: F811
    model, searches = knn_of(), []

    class Watching:
        def __init__(self, inner) -> None:
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def neighbors(self, vectors_QD, k):
            searches.append((len(vectors_QD), k))
            return self.inner.neighbors(vectors_QD, k)

    model.retrieval = replace(model.retrieval, searcher=Watching(model.retrieval.searcher))
    rows = RowModel(model, VOCABULARY)
    searches.clear()
    rows.prefill([[1, 2], [3], [4, 5, 6], [7]], with_settings(model, SETTINGS))
    assert searches == [(2, 64), (1, 8)]  # none for lambda 0, none at other positions than the last


# One token


def test_temperature_zero_takes_the_likeliest() -> None:
    log_probs = torch.log_softmax(torch.randn(50), 0)
    assert choose(log_probs, 0.0, 0.1, np.random.default_rng(0)) == int(log_probs.argmax())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.3), (1.0, 0.0)])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_p) -> None:
    log_probs = torch.log_softmax(2 * torch.randn(12), 0)
    scores = (log_probs / temperature)[None]
    if top_p > 0:
        scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
        expected = torch.softmax(scores[0], 0).numpy()
    else:
        expected = np.eye(12)[int(log_probs.argmax())]
    random = np.random.default_rng(0)
    drawn = [choose(log_probs, temperature, top_p, random) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=12) / 4000, expected, atol=0.03)
    assert not set(drawn) & set(np.flatnonzero(expected == 0))


@pytest.mark.parametrize("temperature", [1e-300, 1e-5, 1.0, 2.0])
def test_what_cannot_be_is_never_drawn(temperature) -> None:
    log_probs = torch.tensor([-torch.inf, 0.0, -torch.inf, -torch.inf])
    random = np.random.default_rng(0)
    assert {choose(log_probs, temperature, 1.0, random) for _ in range(50)} == {1}

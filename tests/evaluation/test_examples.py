"""Tokens helped and hurt: the right ones, with the neighbours' own text beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from knnlm.config import KNNConfig
from knnlm.model.encoding import Tokenizer
from knnlm.model.lm import LanguageModel
from tests.evaluation.test_evaluate_oracle import run_tiny, texts
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.tokenizers_of_all_kinds import sentencepiece


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("examples")
    return run_tiny("gpt2", folder, KNNConfig(k=20, temperature=2.0, lam=0.5), "-1.ffn_input")[0]


def test_helped_tokens_gained_and_hurt_tokens_lost_most_first(result) -> None:
    gains = [np.log(one.mixed_probability / one.lm_probability) for one in result.helped]
    losses = [np.log(one.mixed_probability / one.lm_probability) for one in result.hurt]
    assert len(gains) == len(losses) == 12
    assert gains == sorted(gains, reverse=True)
    assert losses == pytest.approx(sorted(losses))
    assert min(gains) > 0 > max(losses)


def test_probabilities_mix(result) -> None:
    for one in (*result.helped, *result.hurt):
        mixed = 0.5 * one.knn_probability + 0.5 * one.lm_probability
        assert one.mixed_probability == pytest.approx(mixed, rel=1e-4)


def test_texts_stand_in_their_sources(result) -> None:
    stored, evaluated = texts(0, 6), texts(1, 2)
    for one in (*result.helped, *result.hurt):
        assert any(one.before + one.token + one.after in text for text in evaluated)
        assert one.neighbors
        for neighbor in one.neighbors:
            name, number = neighbor.source.split(":")
            assert name == "train.jsonl"
            assert neighbor.before + neighbor.token in stored[int(number) - 1]


def test_neighbours_are_nearest_first_with_shares_of_one(result) -> None:
    for one in result.helped:
        distances = [neighbor.distance for neighbor in one.neighbors]
        assert distances == sorted(distances)
        assert 0 < sum(neighbor.weight for neighbor in one.neighbors) <= 1 + 1e-6


def test_examples_changed_by_more_than_a_tenth(tmp_path: Path) -> None:
    """With a small weight of the neighbours no token loses much: there is nothing to show as hurt."""
    result = run_tiny("gpt2", tmp_path, KNNConfig(k=20, temperature=2.0, lam=0.05), "-1.ffn_input")[0]
    assert result.helped
    assert not result.hurt
    assert all(one.mixed_probability > 1.1 * one.lm_probability for one in result.helped)


@pytest.mark.parametrize(("kind", "shown"), [(tiny_tokenizer, "⟨E2⟩"), (sentencepiece, "⟨E2⟩")])
def test_a_part_of_a_character_is_shown_as_its_bytes(kind: Callable[[], Tokenizer], shown: str) -> None:
    tokenizer = kind()
    lm = LanguageModel.from_model(tiny_model("gpt2", vocabulary=len(tokenizer)), tokenizer, name="tiny")
    parts = [lm.token_text(int(token)) for token in lm.encode("⚕")]
    assert shown in parts
    assert "".join(parts[-3:]) == "⟨E2⟩⟨9A⟩⟨95⟩"
    assert lm.token_text(int(lm.encode("a")[-1])).strip() == "a"

"""What `build` keeps back and fits on it, and what `evaluate` stores of its fit."""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import build, evaluate
from knnlm.pipeline.kept_back import share_to_keep
from knnlm.pipeline.steps import fitted_settings
from knnlm.progress import Silent
from knnlm.store.datastore import Datastore, open_datastore
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import tiny_model, tiny_tokenizer

SETTINGS = Settings(
    text=TextConfig(context=32, stride=16),
    layers=LayerConfig(layers="1.ffn_input"),
    knn=KNNConfig(max_k=32),
    evaluation=EvalConfig(examples=2),
)


class Listening(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, line: str) -> None:
        self.told.append(line)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "text.jsonl", texts(0, 40))


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        (None, None),  # 1 % of what comes
        (10_000_000, 20_000),
        (1_000_000, 10_000),
        (100_000, 2_000),
        (10_000, 1_000),
        (1_280, 128),
        (1_279, 0),
        (0, 0),
    ],
)
def test_a_hundredth_is_kept_back_within_limits(tokens: int | None, kept: float | None) -> None:
    share = share_to_keep(tokens)
    assert share == 0.01 if tokens is None else share * tokens == pytest.approx(kept)


@pytest.mark.parametrize("index", ["auto", "IVF8,Flat"])
def test_what_is_kept_back_is_told_and_not_stored_and_fitted_on(
    index: str, lm: LanguageModel, corpus: Path, tmp_path: Path
) -> None:
    """The same fit as an evaluation on these documents alone through the same index, and its perplexity is told."""
    settings = replace(SETTINGS, knn=KNNConfig(max_k=32, index=index))
    progress = Listening()
    store = build(lm, [corpus], tmp_path / "out", settings=settings, progress=progress)
    kept_back, gain = progress.told[-2:]
    numbers = [int(number) for number in re.findall(r"text\.jsonl (\d+)", kept_back)]
    stored = [text for number, text in enumerate(texts(0, 40), 1) if number not in numbers]
    assert np.array_equal(store.values, np.concatenate([lm.encode(text)[1:] for text in stored]))
    file = write_jsonl(tmp_path / "kept.jsonl", [texts(0, 40)[number - 1] for number in numbers])
    tokens = sum(len(lm.encode(texts(0, 40)[number - 1])) - 1 for number in numbers)
    assert f"not stored: {tokens:,} tokens (" in kept_back
    found = evaluate(lm, store, [file], settings=settings, dry_run=True)
    assert store.manifest.fitted == fitted_settings(found)
    assert found.layers[0].by_query is not None
    mixed = found.layers[0].by_query.perplexity
    figures = f"{found.lm.perplexity:.2f} → {mixed:.2f} with the memory of 1.ffn_input"
    assert gain.startswith(f"perplexity on {found.lm.tokens:,} held-out tokens: {figures}")


def test_a_text_to_fit_on_leaves_the_whole_text_to_be_stored(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", texts(1, 9))
    store = build(lm, [corpus], tmp_path / "out", eval_text=[other], settings=SETTINGS)
    assert store.count == sum(len(lm.encode(text)) - 1 for text in texts(0, 40))
    assert store.manifest.fitted == fitted_settings(evaluate(lm, store, [other], settings=SETTINGS, dry_run=True))


@pytest.mark.parametrize(
    ("count", "protocol", "reason"),
    [(4, "documents", "is too short to keep some back"), (40, "knn-transformers", "stores the whole text")],
)
def test_where_nothing_is_kept_back_it_is_told(
    count: int, protocol: str, reason: str, lm: LanguageModel, tmp_path: Path
) -> None:
    text, progress = write_jsonl(tmp_path / "text.jsonl", texts(0, count)), Listening()
    settings = replace(SETTINGS, text=replace(SETTINGS.text, protocol=protocol))
    store = build(lm, [text], tmp_path / "out", settings=settings, progress=progress)
    assert store.manifest.fitted is None
    (line,) = progress.told
    assert line.startswith("k, λ and T are not fitted: ") and reason in line


# What an evaluation stores


@pytest.fixture
def store(lm: LanguageModel, corpus: Path, tmp_path: Path) -> Datastore:
    layers, knn = LayerConfig(layers="1.ffn_input,2.ffn_input"), KNNConfig(max_k=32, index="IVF8,Flat")
    return build(lm, [corpus], tmp_path / "out", settings=replace(SETTINGS, layers=layers, knn=knn))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "other.jsonl", texts(1, 9))


def test_evaluation_stores_its_fit_and_keeps_that_of_other_layers(
    lm: LanguageModel, store: Datastore, other: Path
) -> None:
    before = dict(store.manifest.fitted)
    result = evaluate(lm, store.folder, [other], settings=replace(SETTINGS, layers=LayerConfig(layers="2.ffn_input")))
    after = open_datastore(store.folder).manifest.fitted
    assert after["2.ffn_input"] == fitted_settings(result)["2.ffn_input"] != before["2.ffn_input"]
    assert after["1.ffn_input"] == before["1.ffn_input"]


def test_a_dry_run_stores_nothing(lm: LanguageModel, store: Datastore, other: Path) -> None:
    before = (store.folder / "datastore.json").read_bytes()
    evaluate(lm, store, [other], settings=replace(SETTINGS, layers=LayerConfig()), dry_run=True)
    assert (store.folder / "datastore.json").read_bytes() == before


@pytest.mark.parametrize(
    ("knn", "reason"),
    [
        (KNNConfig(lam=0.0), "as `lam` was given"),
        (KNNConfig(k=4, temperature=2.0), "as `k`, `temperature` was given"),
        (KNNConfig(metric="cosine", index="exact"), "searched in another way"),
    ],
)
def test_nothing_is_stored_where_generation_would_search_in_another_way(
    knn: KNNConfig, reason: str, lm: LanguageModel, store: Datastore, other: Path
) -> None:
    before, progress = store.manifest.fitted, Listening()
    settings = replace(SETTINGS, layers=LayerConfig(), knn=knn)
    evaluate(lm, store, [other], settings=settings, progress=progress)
    assert open_datastore(store.folder).manifest.fitted == before
    assert reason in progress.told[-1]


def test_exact_search_is_stored_only_for_the_layers_that_are_searched_exactly(
    lm: LanguageModel, store: Datastore, other: Path
) -> None:
    (indexed,) = store.manifest.indexes
    before = store.manifest.fitted
    settings = replace(SETTINGS, layers=LayerConfig(), knn=KNNConfig(max_k=32, index="exact"))
    evaluate(lm, store, [other], settings=settings)
    after = open_datastore(store.folder).manifest.fitted
    assert {layer for layer in after if after[layer] != before[layer]} == set(store.layers) - {indexed}


def test_a_datastore_that_cannot_be_written_to_is_evaluated_with_a_note(
    lm: LanguageModel, store: Datastore, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_given: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("knnlm.store.changeable.write_json", refuse)
    progress = Listening()
    result = evaluate(lm, store, [other], settings=replace(SETTINGS, layers=LayerConfig()), progress=progress)
    assert len(result.layers) == 2
    assert progress.told[-1].startswith("the fitted k, λ and T are not stored: cannot write ")

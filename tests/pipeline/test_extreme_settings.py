"""Settings at the ends of what is allowed, the whole way: lambda 1, extreme temperatures, one layer, no examples."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from knnlm.config import KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.documents import from_document, to_document
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import evaluate, run
from knnlm.report import write_reports
from knnlm.results import EvalResult
from knnlm.store.datastore import open_datastore
from tests.evaluation.test_evaluate_oracle import run_tiny, texts, write_jsonl
from tests.tiny_models import tiny_model, tiny_tokenizer

LAYERS = "1.ffn_input,2.ffn_input,final_norm"


def run_with(folder: Path, knn: KNNConfig, layers: str = LAYERS) -> EvalResult:
    folder.mkdir(exist_ok=True)
    return run_tiny("gpt2", folder, knn, layers, "float32")[0]


def test_lambda_one_has_infinite_perplexity_and_says_why(tmp_path: Path) -> None:
    """It gave a regret of -100 % and nan, exit status 0, and no word about it."""
    result = run_with(tmp_path, KNNConfig(k=4, lam=1.0))
    assert [one.perplexity for one in result.layers] == [math.inf] * 3
    assert (result.best, result.regret) == ("", None)
    warning = next(one for one in result.warnings if "`lam`" in one)
    assert f"have probability zero under the kNN distribution of {result.selected}, which makes" in warning
    assert {one.knn_probability for one in result.hurt} == {0}
    files = write_reports(result, tmp_path)
    again = from_document(json.loads(files.json.read_text(encoding="utf-8")))
    assert to_document(again) == to_document(result)
    assert "∞" in files.html.read_text(encoding="utf-8")


def test_tiny_temperature_is_the_nearest_neighbour(tmp_path: Path) -> None:
    """All of these were NaN below 3e-39."""
    tiny = run_with(tmp_path / "a", KNNConfig(k=8, temperature=1e-40, lam=0.5))
    tinier = run_with(tmp_path / "b", KNNConfig(k=8, temperature=1e-300, lam=0.5))
    nearest = run_with(tmp_path / "c", KNNConfig(k=1, temperature=1.0, lam=0.5))
    expected = pytest.approx([one.perplexity for one in nearest.layers], rel=1e-9)
    assert [one.perplexity for one in tiny.layers] == [one.perplexity for one in tinier.layers] == expected
    shown = (*tiny.helped, *tiny.hurt)
    assert {one.neighbors[0].weight for one in shown} == {1}
    assert {one.knn_probability for one in shown} <= {0, 1}


def test_huge_temperature_weighs_all_neighbours_the_same(tmp_path: Path) -> None:
    result = run_with(tmp_path, KNNConfig(k=8, temperature=1e300, lam=0.5))
    assert all(math.isfinite(one.perplexity) for one in result.layers)
    assert {neighbor.weight for one in result.helped for neighbor in one.neighbors} == {1 / 8}


def test_store_of_one_layer_has_nothing_to_regret_and_may_show_no_examples(tmp_path: Path) -> None:
    lm = LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="gpt2")
    settings = Settings(
        text=TextConfig(context=32, stride=16), knn=KNNConfig(max_k=8), layers=LayerConfig(layers="-1.ffn_input")
    )
    settings = replace(settings, evaluation=replace(settings.evaluation, examples=0))
    training, held_out = (write_jsonl(tmp_path / f"{seed}.jsonl", texts(seed, 6)) for seed in (0, 1))
    first = run(lm, [training], tmp_path / "out", eval_text=[held_out], settings=settings)
    second = evaluate(lm, open_datastore(tmp_path / "out"), [held_out], settings=settings)
    for result in (first, second):
        assert (len(result.layers), result.regret, result.helped, result.hurt) == (1, None, (), ())
        assert result.best == result.layers[0].layer
        assert result.layers[0].versus_best == 0

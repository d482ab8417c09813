"""What verbs say they expect is what they do, and takes about as long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index.exact import ExactIndex
from index.metric import Metric
from index.source import ArraySource
from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.knn.reckoning import Reckoning, reckon
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import build, evaluate, run, score
from knnlm.progress import Advance, Silent, Stage, ignore
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import tiny_model, tiny_tokenizer

SETTINGS = Settings(
    text=TextConfig(context=32, stride=16),
    knn=KNNConfig(max_k=16, index="IVF8,Flat"),
    evaluation=EvalConfig(eval_tokens=800, examples=2),
)


class Recorder(Silent):
    """Keeps what is planned and was not opened, and the names of the stages that were not planned or out of turn."""

    def __init__(self) -> None:
        self.waiting: list[Stage] = []
        self.unexpected: list[str] = []
        self.opened = 0

    def plan(self, stages: Sequence[Stage]) -> None:
        assert all(stage.amount and stage.amount >= 1 for stage in stages)
        self.waiting = list(stages)

    @contextmanager
    def stage(self, name: str, unit: str) -> Iterator[Advance]:
        self.opened += 1
        if not self.waiting or self.waiting.pop(0).name != name:
            self.unexpected.append(name)
        yield ignore


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="tiny")


VERBS: dict[str, Callable[[LanguageModel, Path, Path, Settings, Recorder], object]] = {
    "score": lambda lm, text, out, settings, seen: score(lm, [text], settings=settings, progress=seen),
    "build": lambda lm, text, out, settings, seen: build(lm, [text], out, settings=settings, progress=seen),
    "run": lambda lm, text, out, settings, seen: run(lm, [text], out, settings=settings, progress=seen),
    "eval": lambda lm, text, out, settings, seen: evaluate(
        lm, build(lm, [text], out, settings=settings), [text], settings=settings, progress=seen
    ),
}


@pytest.mark.parametrize(
    ("verb", "layers"), [("score", None), ("build", None), ("build", "-1.*"), ("run", "-1.*"), ("eval", "-1.ffn_input")]
)
def test_every_stage_is_in_the_plan_and_in_its_order(lm, verb, layers, tmp_path):
    text, seen = write_jsonl(tmp_path / "text.jsonl", texts(0, 30)), Recorder()
    VERBS[verb](lm, text, tmp_path / "out", replace(SETTINGS, layers=LayerConfig(layers=layers)), seen)
    assert seen.unexpected == (["reading the evaluation text"] if verb == "eval" else [])  # before its size is known
    assert [stage.name for stage in seen.waiting] == (["writing the report"] if verb == "run" else [])  # by the screen
    assert seen.opened >= 2


def test_a_search_is_reckoned_right_within_a_factor_of_two():
    rng = np.random.default_rng(0)
    keys_ND, queries_QD = rng.standard_normal((20_000, 384), np.float32), rng.standard_normal((600, 384), np.float32)
    index = ExactIndex(ArraySource(keys_ND), Metric.L2)
    ratios = []
    for _ in range(3):  # beside other work, as both are measured by the wall clock
        here, start = reckon(), time.perf_counter()
        index.search(queries_QD, 1024)
        ratios.append(
            (here.searching(20_000, 600, 384, 1024) - 600 * 90e-6 * here.slowness) / (time.perf_counter() - start)
        )
    assert 0.5 < sorted(ratios)[1] < 2


def test_reckoning_grows_with_the_work():
    here = Reckoning(1.0)
    one = here.searching(10_000, 1000, 512, 1024)
    assert 1.1 < here.searching(20_000, 1000, 512, 1024) / one < 2
    assert here.searching(10_000, 2000, 512, 1024) == pytest.approx(2 * one)
    assert Reckoning(3.0).searching(10_000, 1000, 512, 1024) == pytest.approx(3 * one)

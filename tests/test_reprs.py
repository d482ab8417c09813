"""How results, models and datastores show themselves: a few lines in a console, a table of HTML in a notebook."""

from __future__ import annotations

import dataclasses
import math
import xml.etree.ElementTree as ET

import pytest
import torch

import knnlm
from knnlm.results import (
    SCORES,
    Choice,
    EvalResult,
    Interval,
    LayerResult,
    LayerScore,
    Perplexity,
    ScoreResult,
    TokenExample,
    VectorScores,
)
from knnlm.shown import UNKNOWN, Shown, Table, brief, change, figure
from knnlm.statistics import CorrelationEstimate
from knnlm.studies.correlate.study import LayerCorrelation, Scatter, Study
from knnlm.studies.rank_models.ranking import ModelGap, Ranking
from knnlm.studies.slices.measure import LayerSlices, SetSlices, SlicesResult
from knnlm.studies.slices.statistics import Estimate
from knnlm.studies.train.result import TrainPoint, TrainResult, Validation

BETWEEN = Interval(0.1, 0.2)
EVIL = "<script>&\n"


def score(layer: str, dispersion: float = 0.5) -> LayerScore:
    return LayerScore(layer, dispersion, BETWEEN, 0.4, 0.3, 0.2, 12.0, 0.6, BETWEEN)


def layer(name: str, perplexity: float, **others: object) -> LayerResult:
    curve = tuple((step / 100, perplexity) for step in range(100))
    return LayerResult(
        name, perplexity, BETWEEN, perplexity / 40 - 1, 0.0, BETWEEN, 8, 0.25, 3.5, 1.0, 50.0, curve, **others
    )


def evaluated() -> EvalResult:
    layers = (layer("0.ffn_input", 36.5, score=score("0.ffn_input")), layer(EVIL, 31.25), layer("lost", math.inf))
    return EvalResult(Perplexity(40.0, 1.0, 60.0, 5000), layers, best=EVIL, selected="0.ffn_input", keys=12345)


def correlation() -> CorrelationEstimate:
    return CorrelationEstimate(-0.5, math.nan, BETWEEN, BETWEEN, 9)


def results() -> list[Shown]:
    names = tuple(f"{number}.ffn_input" for number in range(40))
    scores, choice = tuple(map(score, names)), Choice("3.ffn_input", "dispersion", names, "it is the most dispersed")
    one = correlation()
    studied = LayerCorrelation("final_norm", 1.0, 0.5, 0.5, one, one, one, one, one)
    within = Estimate(0.25, BETWEEN)
    asked = SetSlices("questions", 120, (LayerSlices("final_norm", within, math.nan),), Estimate(0.75, BETWEEN))
    point = TrainPoint(0, Validation(50.0, 0.5))
    return [
        *(evaluated(), scores[0], choice, evaluated().layers[0]),
        ScoreResult(scores, choice, 1000, 10, 5, False, {}, {}),
        VectorScores(scores, 100, 80, {}, {}),
        TokenExample("before " * 99, "a\nb", "after", 0.1, 0.2, 0.15, ()),
        Study("gpt2", "within", 64, 10, 5, 2, 40.0, 3, 4, (studied,), Scatter("final_norm", (), ())),
        SlicesResult((asked,), asked),
        Ranking((ModelGap("a", 0.5, 0.2, 0.3, 10, 20, "lm_head", False), *[])),
        TrainResult("out", (point, dataclasses.replace(point, step=9)), "final_norm", 100, 10, 1000, 500, 2.0),
    ]


@pytest.mark.parametrize("result", results(), ids=lambda one: type(one).__name__)
def test_repr_is_at_most_twelve_readable_lines(result) -> None:
    lines = repr(result).split("\n")
    assert lines[0] == f"{type(result).__name__}:"
    assert 2 <= len(lines) <= 12 and max(map(len, lines)) <= 170
    assert "nan" not in repr(result) and "inf" not in repr(result)


def test_results_that_are_held_to_it_are_all_that_there_are() -> None:
    kinds = {getattr(knnlm, name) for name in dir(knnlm) if isinstance(getattr(knnlm, name), type)}
    assert {kind for kind in kinds if issubclass(kind, Shown)} == {type(one) for one in results()}


def test_main_figures_of_an_evaluation_are_told() -> None:
    shown = " ".join(repr(evaluated()).split())
    assert "LM: perplexity 40 on 5,000 tokens" in shown
    assert "chosen: 0.ffn_input, perplexity 36.5, -8.8 %" in shown
    assert "best: <script>&, perplexity 31.25" in shown.replace("& ,", "&,")
    assert "3 layers, 12,345 keys" in shown


def cells(html: str) -> list[list[str]]:
    """Of a table, which has to be well-formed XML too; its heads come first."""
    return [["".join(cell.itertext()) for cell in row] for row in ET.fromstring(html).iter("tr")]


def test_table_of_an_evaluation() -> None:
    html = evaluated()._repr_html_()
    assert "<script>" not in html
    heads, *rows = cells(html)
    assert heads == ["layer", "dispersion", "perplexity", "against LM", "k", "λ", "T"]
    assert rows[0] == ["0.ffn_input ◀ chosen", "0.5000", "36.500", "-8.8 %", "8", "0.250", "3.5"]
    assert rows[1][:2] == [f"{EVIL} ◀ best", UNKNOWN]
    assert rows[2] == ["lost", UNKNOWN, UNKNOWN, UNKNOWN, "8", "0.250", "3.5"]


def test_table_of_scores_has_every_score_and_marks_the_chosen_layer() -> None:
    found = next(one for one in results() if isinstance(one, ScoreResult))
    heads, *rows = cells(found._repr_html_())
    assert heads == ["layer", *(kind.title for kind in SCORES)] and len(rows) == 40
    assert [row[0] for row in rows if "◀" in row[0]] == ["3.ffn_input ◀ chosen"]
    assert rows[0][1:] == ["0.5000", "0.4000", "0.3000", "0.2000", "12.0", "0.600", UNKNOWN, UNKNOWN, UNKNOWN]


TABLES = {result._repr_html_(): type(result).__name__ for result in results() if result._repr_html_()}


@pytest.mark.parametrize("html", TABLES, ids=TABLES.get)
def test_rows_of_a_table_are_as_long_as_its_heads(html) -> None:
    assert len({len(row) for row in cells(html)}) == 1
    assert "nan" not in html and ">inf" not in html


def test_table_escapes_title_heads_and_cells() -> None:
    html = Table(EVIL, (EVIL,), ((EVIL,),)).html()
    assert cells(html) == [[EVIL], [EVIL]] and html.count("&lt;script&gt;") == 3


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_unknown_is_a_dash(value) -> None:
    assert figure(value) == change(value) == UNKNOWN


def test_long_lists_are_cut() -> None:
    assert brief(["a", "b", "c"]) == "a, b, c" and brief(list("abcdef")) == "a, b, …, f"


def test_what_people_print_has_a_table() -> None:
    verbs = {"EvalResult", "ScoreResult", "VectorScores", "Study", "SlicesResult", "Ranking", "TrainResult"}
    assert set(TABLES.values()) == verbs


def test_store_and_models_are_a_few_lines(store_folder) -> None:
    store = knnlm.open_datastore(store_folder)
    lm = knnlm.load_model(store.model, device="cpu")
    model = knnlm.KNNLM.from_store(store, store.layers[0], 8, 4.0, 0.5, lm=lm)
    for shown in (repr(store), repr(lm), repr(model), str(model)):
        assert shown.count("\n") < 12 and "Linear" not in shown and "<bound" not in shown
    assert f"{len(store):,} keys" in repr(store) and str(store_folder) in repr(store)
    assert f"{lm.vocabulary:,} tokens in the vocabulary" in repr(lm) and lm.name in repr(lm)
    assert f"keys of {store.layers[0]}" in repr(model) and "k 8, λ 0.5, T 4" in repr(model)
    inner = next(iter(model.children()))
    assert repr(inner) == torch.nn.Module.__repr__(inner) and "Embedding(" in repr(inner)

"""The label-free scores are listed once, and every place that shows scores shows all of them."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from knnlm.cli.tables import IN_EVAL_TABLE, IN_SCORE_TABLE, eval_table, score_table, shown_scores
from knnlm.documents import from_document, score_document, score_from_document, to_document
from knnlm.errors import InputError
from knnlm.evaluation.summary import correlations
from knnlm.report.html import render
from knnlm.report.view import make_view
from knnlm.results import SCORES, Choice, LayerScore
from knnlm.scores import sample_scores as scores
from knnlm.scores.dispersion import Span, dispersion
from knnlm.scores.layer_scorer import FOR_CHOICE, FUNCTIONS, SEGMENT_FUNCTIONS, LayerScorer
from knnlm.scores.pilot import Pilot
from knnlm.scores.sample import Sample
from knnlm.scores.sample_search import SampleSearch, search_sample
from tests.sample_results import sample_result, sample_scores
from tests.source_files import ROOT

NAMES = tuple(kind.name for kind in SCORES)
LATER = ("participation_ratio", "intrinsic_dimension", "pilot")
"""Scores that files of an older version lack."""


NONE = np.empty(0)


def test_each_score_has_a_field_and_a_function() -> None:
    known = {field.name: field.type for field in fields(LayerScore)}
    assert {name for name, kind in known.items() if kind == "float"} == set(NAMES)
    assert known.keys() - {"layer"} == FUNCTIONS.keys()


def test_scores_of_a_segment_are_some_of_them() -> None:
    assert SEGMENT_FUNCTIONS.keys() < set(NAMES)
    vectors = np.random.default_rng(0).normal(size=(40, 6)) + 1
    assert all(math.isfinite(function(vectors)) for function in SEGMENT_FUNCTIONS.values())


def test_each_score_is_told_in_one_line_with_names_of_its_own() -> None:
    assert len({kind.title for kind in SCORES}) == len({kind.short for kind in SCORES}) == len(SCORES)
    for kind in SCORES:
        assert 0 < len(kind.meaning) < 90
        assert kind.digits > 0


def test_scorer_gives_each_score_of_what_it_saw() -> None:
    vectors = torch.randn(4, 25, 6, generator=torch.manual_seed(0)) + 1
    tokens = np.random.default_rng(0).integers(0, 5, (4, 25))
    scorer = LayerScorer({"a": 6}, seed=3)
    scorer.begin_batch([Span(row, 0, 25, row) for row in range(4)], list(tokens))
    scorer.receive("a", vectors)
    (found,) = scorer.scores()
    sample, cluster = vectors.flatten(0, 1).numpy(), np.repeat(np.arange(4), 25)
    searched = search_sample(Sample(sample, tokens.ravel(), cluster), seed=3)
    probe = scores.retrieval_probe(searched)
    asked: list[SampleSearch] = []
    (piloted,) = scorer.scores(measure_pilot=lambda search: asked.append(search) or Pilot(7.5, NONE, NONE))
    assert (found.pilot, piloted.pilot) == (pytest.approx(math.nan, nan_ok=True), 7.5)
    assert np.array_equal(asked[0].distances_QK, searched.distances_QK)
    expected = {
        "dispersion": dispersion(sample),
        "dispersion_within": np.mean([dispersion(row) for row in vectors]),
        "dispersion_segments": dispersion(vectors[:, -1]),
        "dispersion_standardized": scores.standardized_dispersion(sample),
        "effective_rank": scores.effective_rank(scores.spectrum(sample)),
        "probe": probe.value,
        "participation_ratio": scores.participation_ratio(scores.spectrum(sample)),
        "intrinsic_dimension": scores.intrinsic_dimension(sample, seed=3),
    }
    assert {name: getattr(found, name) for name in NAMES if name != "pilot"} == pytest.approx(expected, rel=1e-6)
    (quick,) = scorer.scores(only=FOR_CHOICE)
    assert math.isnan(quick.effective_rank)
    assert (quick.dispersion, quick.probe) == (found.dispersion, found.probe)
    assert replace(scorer.completed([quick])[0], pilot=0.0) == replace(found, pilot=0.0)
    assert found.probe_interval == probe.interval


@pytest.mark.parametrize(
    ("show", "in_scores", "in_evaluation"),
    [
        (None, IN_SCORE_TABLE, IN_EVAL_TABLE),
        ("all", NAMES, NAMES),
        ("probe, within,effective_rank", *(("probe", "dispersion_within", "effective_rank"),) * 2),
    ],
)
def test_tables_show_what_is_asked_for(
    show: str | None, in_scores: tuple[str, ...], in_evaluation: tuple[str, ...]
) -> None:
    titles = {kind.title: kind for kind in SCORES}
    best = min(sample_result().layers, key=lambda one: one.perplexity)
    for table, first, names in (
        (score_table(sample_scores(), show), sample_scores().layers[0], in_scores),
        (eval_table(sample_result(), show), best.score, in_evaluation),
    ):
        columns = {str(column.header): next(iter(column.cells)) for column in table.columns}
        assert [titles[title].name for title in columns if title in titles] == list(names)
        for title, kind in titles.items():
            if title in columns:
                assert str(columns[title]).startswith(f"{getattr(first, kind.name):.{kind.digits}f}")


def test_unknown_score_is_one_line_that_lists_them() -> None:
    with pytest.raises(InputError, match=r"--show 'rank' is no score; there are all, dispersion, within, .*probe"):
        shown_scores("probe,rank", ())


def test_report_has_a_column_with_a_value_for_each_score() -> None:
    view = make_view(sample_result(), title="t")
    page = render(sample_result(), title="t")
    for kind in SCORES:
        (column,) = (column for column in view.columns if column.key == kind.name)
        assert column.help.lower() == kind.meaning.lower()
        assert f"{column.label}</" in page
        assert all(row.cells[kind.name].order is not None for row in view.rows)


def test_every_score_is_correlated_with_perplexity() -> None:
    layers = sample_result().layers
    choice = Choice("7.ffn_input", "dispersion", tuple(one.layer for one in layers[:5]), "")
    found = correlations(layers, choice)
    assert [one.score for one in found] == [*NAMES, *NAMES]


def test_documents_hold_each_score_and_give_it_back() -> None:
    result, scored = sample_result(), sample_scores()
    for document in (to_document(result), score_document(scored)):
        assert all(document["layers"][0][name] is not None for name in NAMES)
    assert from_document(to_document(result)).layers[0].score == result.layers[0].score
    assert score_from_document(score_document(scored)).layers == scored.layers


def test_documents_of_an_older_version_lack_later_scores() -> None:
    result, scored = sample_result(), sample_scores()
    for write, read, score_of in (
        (to_document, from_document, lambda one: one.score),
        (score_document, score_from_document, lambda one: one),
    ):
        document = write(result if read is from_document else scored)
        for row in document["layers"]:
            for name in LATER:
                del row[name]
        score, expected = (
            score_of(one.layers[0]) for one in (read(document), result if read is from_document else scored)
        )
        assert all(math.isnan(getattr(score, name)) for name in LATER)
        assert replace(score, **dict.fromkeys(LATER, 0.0)) == replace(expected, **dict.fromkeys(LATER, 0.0))


@pytest.mark.parametrize("name", NAMES)
def test_every_score_is_explained_in_the_documentation(name: str) -> None:
    for file in ("metrics.md", "report-json.md"):
        assert f"`{name}`" in (ROOT / "docs" / file).read_text(encoding="utf-8")

"""Dispersion against perplexity: the protocol written out plainly, transformers' loss, NumPy's correlation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from knnlm.errors import InputError, LayerError
from knnlm.model.lm import LanguageModel
from knnlm.studies.correlate.document import correlate_document
from knnlm.studies.correlate.study import CorrelateConfig, Study, check_model, make_groups, study_correlation
from tests.cosine_oracle import mean_distance
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.scores.test_sample_scores import slow_effective_rank, slow_two_nn
from tests.tiny_models import tiny_model, tiny_tokenizer

SMALL = {"context": 24, "group_size": 7}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", texts(1, 16))


def pearson(x, y) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x, y) -> float:
    """Without ties."""
    return pearson(np.argsort(np.argsort(x)), np.argsort(np.argsort(y)))


# Grouping


def groups_by_protocol(perplexities: list[float], size: int, grid: int, cut: float) -> list[list[int]]:
    """Step by step as the released code does it (research notes, steps 4 to 6)."""
    order = sorted(range(len(perplexities)), key=lambda number: perplexities[number])
    groups = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    means = [math.fsum(perplexities[number] for number in group) / size for group in groups]
    step = (max(means) - min(means)) / (grid - 1)
    taken = []
    for target in (min(means) + step * place for place in range(grid)):
        nearest = min(range(len(groups)), key=lambda group: abs(means[group] - target))
        if nearest not in taken:
            taken.append(nearest)
    return [groups[group] for group in taken if means[group] < cut]


@pytest.mark.parametrize(("count", "size", "grid"), [(100, 10, 100), (103, 10, 4), (5000, 10, 100), (30, 10, 100)])
@pytest.mark.parametrize("quantile", [0.5, 1.0])
def test_groups_are_those_of_the_protocol(count, size, grid, quantile):
    perplexities = np.exp(np.random.default_rng(count).normal(4, 0.7, count))
    cut = float(np.quantile(perplexities, quantile))
    expected = groups_by_protocol(perplexities.tolist(), size, grid, cut)
    found = make_groups(perplexities, size, grid=grid, max_perplexity=cut)
    assert [group.tolist() for group in found] == expected
    assert 0 < len(found) <= grid


def test_one_outlier_makes_the_grid_coarse_and_is_cut_after_it():
    perplexities = np.append(np.linspace(10, 20, 990), np.full(10, 1e4))
    assert [len(make_groups(perplexities, 10)), len(make_groups(perplexities, 10, max_perplexity=25))] == [3, 2]


def test_too_few_segments_make_no_group():
    assert make_groups(np.arange(1.0, 10), 10) == []


# The study


def segments_of(corpus: Path, lm: LanguageModel, context: int) -> tuple[list[list[int]], list[int]]:
    """Tokens of each segment, and its document."""
    tokens, documents = [], []
    for number, line in enumerate(corpus.read_text().splitlines()):
        ids = lm.tokenizer(json.loads(line)["text"])["input_ids"]
        while len(ids) >= context:
            tokens.append(ids[:context])
            documents.append(number)
            ids = ids[context:]
    return tokens, documents


def figures(tokens: list[list[int]]) -> tuple[list, ...]:
    """Of each segment: perplexity, final-token perplexity, dispersion behind the last norm, last vector, vectors."""
    model = tiny_model("gpt2")
    perplexities, finals, within, last, every = [], [], [], [], []
    for one in tokens:
        ids = torch.tensor([one])
        labels = torch.full_like(ids, -100)
        labels[0, -1] = ids[0, -1]
        with torch.inference_mode():
            output = model(ids, labels=ids, output_hidden_states=True)
            finals.append(float(model(ids, labels=labels).loss.exp()))
        perplexities.append(float(output.loss.exp()))
        vectors = output.hidden_states[-1][0].double().numpy()
        within.append(mean_distance(vectors))
        last.append(vectors[-1])
        every.append(vectors)
    return perplexities, finals, within, last, every


def test_correlations_are_those_of_the_protocol(lm, corpus):
    (study,) = study_correlation(lm, [corpus], config=CorrelateConfig(**SMALL, layers="final_norm"))
    tokens, documents = segments_of(corpus, lm, 24)
    perplexities, finals, within, last, _ = figures(tokens)
    (layer,) = study.layers
    assert (study.segments, study.documents) == (len(tokens), len(set(documents)))
    assert study.perplexity == pytest.approx(math.exp(np.log(perplexities).mean()), rel=1e-5)
    assert layer.within == pytest.approx(np.mean(within), abs=1e-6)
    for estimate, x in ((layer.ungrouped, perplexities), (layer.final_ungrouped, finals)):
        assert estimate.count == len(tokens)
        assert estimate.pearson == pytest.approx(pearson(x, within), abs=1e-4)
        assert estimate.spearman == pytest.approx(spearman(x, within), abs=1e-4)
    for estimate, x in ((layer.grouped, perplexities), (layer.final_grouped, finals)):
        groups = groups_by_protocol(x, 7, 100, math.inf)
        points = [[np.mean([values[number] for number in group]) for group in groups] for values in (x, within)]
        assert estimate.count == len(groups) >= 8
        assert estimate.pearson == pytest.approx(pearson(*points), abs=1e-3)
        assert estimate.spearman == pytest.approx(spearman(*points), abs=1e-3)
    groups = groups_by_protocol(perplexities, 7, 100, math.inf)
    means = [np.mean([perplexities[number] for number in group]) for group in groups]
    across = [mean_distance([last[number] for number in group]) for group in groups]
    assert study.groups == layer.across.count == len(groups)
    assert layer.across.pearson == pytest.approx(pearson(means, across), abs=1e-3)
    assert study.scatter.segments[3] == pytest.approx((perplexities[3], within[3]), rel=1e-4)
    assert [x for x, _ in study.scatter.groups] == pytest.approx(means, rel=1e-4)


def covariance_ratio(vectors_TD) -> float:
    power = np.linalg.eigvalsh(np.cov(vectors_TD.T))
    return power.sum() ** 2 / (power**2).sum()


@pytest.mark.parametrize(
    ("score", "definition"),
    [
        ("effective_rank", slow_effective_rank),
        ("participation_ratio", covariance_ratio),
        ("intrinsic_dimension", slow_two_nn),
        ("standardized", lambda vectors_TD: mean_distance(vectors_TD / vectors_TD.std(axis=0))),
    ],
)
def test_another_score_takes_the_place_of_dispersion(lm, corpus, score, definition):
    config = CorrelateConfig(**SMALL, layers="final_norm", score=score)
    (study,) = study_correlation(lm, [corpus], config=config)
    perplexities, _, within, _, vectors = figures(segments_of(corpus, lm, 24)[0])
    values = [definition(vectors_TD) for vectors_TD in vectors]
    (layer,) = study.layers
    assert study.score.endswith(score)
    assert layer.within == pytest.approx(np.mean(within), abs=1e-6)
    assert layer.score == pytest.approx(np.mean(values), rel=1e-3)
    assert layer.ungrouped.pearson == pytest.approx(pearson(perplexities, values), abs=2e-3)
    assert study.scatter.segments[3] == pytest.approx((perplexities[3], values[3]), rel=1e-3)


def test_interval_leaves_out_documents_and_not_segments(lm, tmp_path):
    """Two segments of one text say less than two of two: a corpus of copies must not narrow the interval."""
    config = CorrelateConfig(context=24, layers="final_norm")
    documents = texts(2, 10)
    once = write_jsonl(tmp_path / "once.jsonl", documents)
    # Each document eight times over, so that most of its segments come again and again.
    copies = write_jsonl(tmp_path / "copies.jsonl", [" ".join([one] * 8) for one in documents])
    narrow, wide = (
        study_correlation(lm, [path], config=config)[0].layers[0].ungrouped.spearman_interval for path in (once, copies)
    )
    assert wide.high - wide.low > 0.5 * (narrow.high - narrow.low)


def test_contexts_and_default_layers(lm, corpus):
    config = CorrelateConfig(context=24, contexts=(16, 24, 48), clusters=("kmeans",), cluster_size=9)
    studies = study_correlation(lm, [corpus], config=config)
    assert [study.context for study in studies] == [24, 16, 48]
    for study in studies:
        assert [one.layer for one in study.layers] == [*(f"{block}.block_output" for block in range(3)), "final_norm"]
        assert [one.depth for one in study.layers] == pytest.approx([1 / 3, 2 / 3, 1, 1])
        assert study.segments == len(segments_of(corpus, lm, study.context)[0])
    assert [bool(study.clusters) for study in studies] == [True, False, False]


def test_clusters_are_given_for_every_layer(lm, corpus):
    config = CorrelateConfig(context=24, clusters=("ngram", "kmeans"), ngram=2, cluster_size=5)
    (study,) = study_correlation(lm, [corpus], config=config)
    assert [(one.layer, one.kind) for one in study.clusters] == [
        (layer.layer, kind) for layer in study.layers for kind in ("ngram", "kmeans")
    ]
    for one in study.clusters:
        assert 0 < one.distances.within < one.distances.between < 2


def test_joined_documents_lose_no_rest(lm, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", ["The nurse counts a pulse ."] * 40)
    with pytest.raises(InputError, match="no document of the text is as long as one segment"):
        study_correlation(lm, [rows], config=CorrelateConfig(context=64))
    (study,) = study_correlation(lm, [rows], config=CorrelateConfig(context=64, join=True))
    tokens = lm.encode(" ".join(["The nurse counts a pulse ."] * 40))
    assert (study.segments, study.documents) == (len(tokens) // 64, 1)


def test_max_segments_bounds_the_pass(lm, corpus):
    (study,) = study_correlation(lm, [corpus], config=CorrelateConfig(context=24, max_segments=11))
    assert study.segments == 11


def test_broken_confidence_is_still_a_number(corpus):
    """A head that is as sure as can be of wrong tokens: 1 / p has no float64."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight.mul_(3e4)
    lm = LanguageModel.from_model(model, tiny_tokenizer(), name="sure")
    (study,) = study_correlation(lm, [corpus], config=CorrelateConfig(**SMALL))
    assert all(math.isfinite(one.final_ungrouped.spearman) for one in study.layers)


# What cannot be


def test_too_few_segments_for_the_preset_are_a_note(lm, corpus):
    (study,) = study_correlation(lm, [corpus], config=CorrelateConfig(context=48))
    assert study.segments < 300 and math.isnan(study.layers[0].grouped.pearson)
    assert math.isfinite(study.layers[0].ungrouped.pearson)
    (note,) = study.notes
    assert f"{study.segments} segments leave" in note and "take `group_size=" in note


def test_too_few_segments_for_groups_that_were_asked_for_are_an_error(lm, corpus, monkeypatch):
    monkeypatch.setattr(lm, "forward", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=r"segments make \d+ group\(s\) of 60, but a correlation needs 3"):
        study_correlation(lm, [corpus], config=CorrelateConfig(context=24, group_size=60))
    with pytest.raises(InputError, match=r"segments make \d+ group\(s\) of 20"):
        study_correlation(lm, [corpus], config=CorrelateConfig(context=24, contexts=(128,), group_size=20))


def test_no_clusters_are_found_before_the_model_runs(lm, corpus, monkeypatch):
    monkeypatch.setattr(lm, "forward", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match="no two 10-grams that follow 100 contexts"):
        study_correlation(lm, [corpus], config=CorrelateConfig(context=24, clusters=("ngram",)))
    with pytest.raises(InputError, match="distances between clusters need 2"):
        study_correlation(lm, [corpus], config=CorrelateConfig(context=24, clusters=("kmeans",), cluster_size=5000))


def test_model_is_checked_before_the_text_is_read(lm):
    with pytest.raises(InputError, match="`context` is 512, but tiny sees at most 128 tokens"):
        study_correlation(lm, ["absent.txt"])
    with pytest.raises(InputError, match="`contexts` is 200"):
        study_correlation(lm, ["absent.txt"], config=CorrelateConfig(context=64, contexts=(200,)))
    with pytest.raises(LayerError, match=r"no layer fits '9\.ffn_input'"):
        study_correlation(lm, ["absent.txt"], config=CorrelateConfig(context=64, layers="9.ffn_input"))


def test_a_model_without_a_limit_takes_any_context():
    assert check_model("bloom", ["0.block_output", "final_norm"], None, CorrelateConfig(context=9000))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"context": 1}, "`context` is 1"),
        ({"contexts": (16, 0)}, "`context` is 0"),
        ({"max_segments": 0}, "`max_segments` is 0"),
        ({"group_size": -1}, "`group_size` is -1"),
        ({"max_perplexity": 0.0}, r"`max_perplexity` is 0\.0"),
        ({"max_perplexity": math.nan}, "`max_perplexity` is nan"),
        ({"clusters": ("ngrams",)}, "`clusters` is 'ngrams'"),
        ({"ngram": 0}, "`ngram` is 0"),
        ({"cluster_size": 1}, "`cluster_size` is 1"),
        ({"seed": -1}, "`seed` is -1"),
    ],
)
def test_wrong_settings_are_refused(wrong, words):
    with pytest.raises(InputError, match=words):
        CorrelateConfig(**wrong)


# JSON


def document(*studies: Study) -> dict:
    return correlate_document(studies, settings={"seed": 0}, versions={"knnlm": "0"})


def test_document_is_strict_json_with_what_the_issue_names(lm, corpus):
    config = CorrelateConfig(**SMALL, contexts=(128,), clusters=("kmeans",), cluster_size=9)
    studies = study_correlation(lm, [corpus], config=config)
    found = document(*studies)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["segments"] == studies[0].segments and [one["context"] for one in found["others"]] == [128]
    fields = {"pearson", "spearman", "interval", "spearman_interval", "count"}
    for row, final, study in zip(found["layers"], found["final_token"]["layers"], studies[0].layers, strict=True):
        assert row["layer"] == final["layer"] == study.layer
        assert set(row["ungrouped"]) == set(row["grouped"]) == set(row["across"]["grouped"]) == fields
        assert set(final["ungrouped"]) == set(final["grouped"]) == fields
        assert row["ungrouped"]["pearson"] == study.ungrouped.pearson
        low, high = row["ungrouped"]["interval"]
        assert -1 <= low <= study.ungrouped.pearson <= high <= 1
        assert final == {"layer": study.layer, **row["final_token"]}
    assert found["protocol"]["ours"] and found["protocol"]["released"] and not found["notes"]


def test_what_could_not_be_computed_is_null_and_has_a_note(lm, corpus):
    found = document(*study_correlation(lm, [corpus], config=CorrelateConfig(context=24)))
    assert found["layers"][0]["grouped"]["pearson"] is None and found["notes"]

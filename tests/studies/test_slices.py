"""Slices, AUC and ranks against brute force; the verb on tiny models; what it refuses, each in one line."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from knnlm.errors import InputError
from knnlm.extraction.prompts import log_likelihoods, most_likely_next, read_prompts
from knnlm.model.lm import LanguageModel
from knnlm.results import Interval
from knnlm.studies.slices.document import slices_document
from knnlm.studies.slices.likelihoods import score_choices
from knnlm.studies.slices.measure import SliceConfig, measure_slices
from knnlm.studies.slices.page import render_slices
from knnlm.studies.slices.questions import read_questions
from knnlm.studies.slices.statistics import (
    draw_slices,
    jackknifed,
    mean,
    right_minus_wrong,
    slice_size,
    tail_auc,
)
from knnlm.text.windows import Window
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.studies.test_slices_likelihoods import random_questions
from tests.tiny_models import CONTEXT, tiny_model, tiny_tokenizer

LAYERS = ("1.ffn_input", "final_norm")


def pairwise(vectors: np.ndarray) -> float:
    """Mean of 1 - cos over all pairs, one pair at a time."""
    units = [row / np.linalg.norm(row) for row in vectors.astype(np.float64)]
    return float(np.mean([1 - a @ b for a, b in itertools.combinations(units, 2)]))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def question_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sets") / "questions.jsonl"
    rng = np.random.default_rng(3)
    rows = [
        {"question": one.text, "choices": list(one.choices), "answer": int(rng.integers(len(one.choices)))}
        for one in random_questions(90)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def prompt_file(question_file: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sets") / "prompts.jsonl"
    rows = [json.loads(line) for line in question_file.read_text().splitlines()]
    path.write_text("".join(json.dumps({"question": row["question"]}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("sets") / "text.jsonl", texts(1, 12))


# Vectors and answers


def query(tokens: list[int], first: int = 0) -> Window:
    ids = np.array(tokens, np.int32)
    return Window(ids[:-1], ids[1:], first, 0, 0, "file", 1)


def test_queries_of_any_length_come_back_in_their_order(lm):
    rng = np.random.default_rng(0)
    queries = [query(rng.integers(0, 288, length).tolist()) for length in (5, 90, 3, 40, 60, 17)]
    found = read_prompts(lm, queries, LAYERS)
    for at, one in enumerate(queries):
        with torch.inference_mode():
            states = lm.model.transformer(torch.from_numpy(one.inputs)[None].long()).last_hidden_state[0].numpy()
        np.testing.assert_allclose(found["final_norm"].last_QD[at], states[-1], atol=2e-5)
        assert found["final_norm"].within_Q[at] == pytest.approx(pairwise(states), abs=1e-6)


def test_endings_and_next_tokens_are_those_of_the_model(lm):
    rng = np.random.default_rng(1)
    queries = [query(rng.integers(0, 288, length).tolist(), first) for length, first in ((9, 3), (50, 48), (20, 0))]
    sums = log_likelihoods(lm, queries)
    tokens, probabilities = most_likely_next(lm, read_prompts(lm, queries, ["final_norm"])["final_norm"].last_QD)
    for at, one in enumerate(queries):
        with torch.inference_mode():
            table = torch.log_softmax(lm.model(torch.from_numpy(one.inputs)[None].long()).logits[0].double(), -1)
        due = sum(float(table[place, one.targets[place]]) for place in range(one.first, len(one.inputs)))
        assert sums[at] == pytest.approx(due, abs=1e-4)
        assert tokens[at] == int(table[-1].argmax())
        assert probabilities[at] == pytest.approx(float(table[-1].max().exp()), rel=1e-4)


# Slices


def vectors_and_answers(right: int, wrong: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(right + wrong, 6)) + 1
    correct = rng.permutation(np.arange(right + wrong) < right)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), correct


def test_slices_have_exactly_the_accuracy_asked():
    # A right query is the first axis, a wrong one the second: the dispersion of a slice counts its pairs of two kinds.
    correct = np.arange(150) < 60
    units = np.where(correct[:, None], [1.0, 0.0], [0.0, 1.0])
    curve = draw_slices(units, correct, 60, draws=3, seed=0)
    assert [one.accuracy for one in curve.slices] == pytest.approx([level / 10 for level in range(11)])
    for one in curve.slices:
        right = round(60 * one.accuracy)
        assert one.dispersion == pytest.approx(right * (60 - right) / (60 * 59 / 2))
        assert one.interval.high - one.interval.low < 1e-9


def test_slices_are_drawn_without_replacement():
    # As many right queries as a slice has: at 100 % all of them, in every draw.
    units, correct = vectors_and_answers(40, 90)
    last = draw_slices(units, correct, 40, draws=4, seed=1).slices[-1]
    assert last.dispersion == pytest.approx(pairwise(units[correct]))
    assert last.interval.high - last.interval.low < 1e-12


def test_band_holds_as_many_draws_as_it_says():
    units, correct = vectors_and_answers(400, 400)
    inside = []
    for seed in range(200):
        band = draw_slices(units, correct, 20, draws=5, seed=seed).slices[5].interval
        rng = np.random.default_rng(1000 + seed)
        halves = [rng.choice(np.flatnonzero(kind), 10, replace=False) for kind in (correct, ~correct)]
        inside.append(band.low <= pairwise(units[np.concatenate(halves)]) <= band.high)
    assert 0.9 <= np.mean(inside) <= 0.99


def test_seeds_are_reproducible_and_differ():
    units, correct = vectors_and_answers(80, 80)
    first, again, other = (draw_slices(units, correct, 40, draws=3, seed=seed) for seed in (7, 7, 8))
    assert first == again and first != other


@pytest.mark.parametrize(
    ("wanted", "right", "wrong", "size"),
    [(100, 300, 100, 100), (100, 99, 400, 90), (100, 400, 25, 20), (100, 19, 400, None), (40, 500, 500, 40)],
)
def test_slices_shrink_to_what_a_set_has(wanted, right, wrong, size):
    assert slice_size(wanted, right, wrong) == size


# What finds wrong answers


@pytest.mark.parametrize("ties", [False, True])
def test_auc_against_all_pairs(ties):
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 6, 60).astype(np.float64) if ties else rng.normal(size=60)
    wrong = rng.random(60) < 0.4
    pairs = [1.0 if low < high else 0.5 if low == high else 0.0 for low in scores[wrong] for high in scores[~wrong]]
    found = tail_auc(scores, wrong, np.arange(60))
    assert found.value == pytest.approx(np.mean(pairs))
    assert 0 <= found.interval.low < found.value < found.interval.high <= 1


def test_auc_of_a_perfect_order_and_of_one_kind():
    wrong = np.arange(40) < 10
    assert tail_auc(np.arange(40.0), wrong, np.arange(40)).value == 1
    assert tail_auc(-np.arange(40.0), wrong, np.arange(40)).value == 0
    nothing = tail_auc(np.arange(40.0), np.zeros(40, bool), np.arange(40))
    assert np.isnan(nothing.value) and nothing.interval == Interval(0, 1)


def test_interval_of_the_auc_covers_chance_when_there_is_nothing_to_find():
    covered = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        interval = tail_auc(rng.normal(size=60), rng.random(60) < 0.3, np.arange(60)).interval
        covered.append(interval.low <= 0.5 <= interval.high)
    assert 0.9 <= np.mean(covered) <= 0.99


def test_items_of_one_document_widen_the_interval():
    rng = np.random.default_rng(4)
    documents = np.repeat(np.arange(20), 10)
    scores = rng.normal(size=20)[documents] + 0.1 * rng.normal(size=200)
    wrong = (rng.normal(size=20)[documents] + 0.1 * rng.normal(size=200)) > 0
    by_document, by_item = tail_auc(scores, wrong, documents), tail_auc(scores, wrong, np.arange(200))
    width = [one.interval.high - one.interval.low for one in (by_document, by_item)]
    assert by_document.value == by_item.value and width[0] > 2 * width[1]


def nothing_to_find(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores, vectors and wrong answers that documents shift, each by itself: 12 documents, of which one holds half."""
    rng, documents = np.random.default_rng(seed), np.repeat(np.arange(12), [110] + [10] * 11)
    scores = 0.5 * rng.normal(size=12)[documents] + rng.normal(size=220)
    wrong = rng.random(220) < 1 / (1 + np.exp(-0.7 - 0.7 * rng.normal(size=12)[documents]))
    vectors = 1 + 0.5 * rng.normal(size=(12, 8))[documents] + rng.normal(size=(220, 8))
    return scores, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), wrong, documents


def test_intervals_cover_where_one_document_holds_half():
    covered = []
    for seed in range(300):
        scores, units, wrong, documents = nothing_to_find(seed)
        found = (
            (mean(scores, documents, (-9.0, 9.0)), 0),
            (tail_auc(scores, wrong, documents), 0.5),
            (right_minus_wrong(units, ~wrong, documents), 0),
        )
        covered.append([one.interval.low <= truth <= one.interval.high for one, truth in found])
    # Without the documents' sizes 88, 92 and 93 %.
    assert (np.mean(covered, axis=0) >= 0.94).all()


def test_right_minus_wrong_against_pairs_and_a_jackknife_by_hand():
    units, correct = vectors_and_answers(30, 40)
    found = right_minus_wrong(units, correct, np.arange(70))

    def difference(kept: np.ndarray) -> float:
        return pairwise(units[kept & correct]) - pairwise(units[kept & ~correct])

    by_hand = jackknifed(difference, np.arange(70), (-2.0, 2.0))
    assert found.value == pytest.approx(by_hand.value)
    assert found.interval.low == pytest.approx(by_hand.interval.low)
    assert found.interval.high == pytest.approx(by_hand.interval.high)


def test_right_minus_wrong_finds_nothing_in_random_answers_where_slices_seem_to():
    steady, covered = [], []
    for seed in range(100):
        units, correct = vectors_and_answers(60, 60, seed=seed)
        found = right_minus_wrong(units, correct, np.arange(120)).interval
        covered.append(found.low <= 0 <= found.high)
        along = draw_slices(units, correct, 50, draws=5, seed=seed).correlation.spearman_interval
        steady.append(along.low > 0 or along.high < 0)
    assert 0.9 <= np.mean(covered) <= 0.99
    # The draws share their items: their correlation is no test, and the page says so.
    assert np.mean(steady) > 0.5


# The verb


def test_sets_from_the_least_dispersed_on(lm, question_file, prompt_file, text):
    config = SliceConfig(layers="1.ffn_input,final_norm", slice_size=20, context=24, tail=5)
    result = measure_slices(lm, [question_file, prompt_file], cloze=[text], config=config)
    assert result.first.name == "questions.jsonl" and len(result.sets) == 3
    within = [one.layers[-1].within.value for one in result.sets]
    assert within == sorted(within)
    for one in result.sets:
        assert [layer.layer for layer in one.layers] == list(LAYERS)
        dispersions = [row["dispersion"] for row in one.tail]
        assert dispersions == sorted(dispersions) and len(dispersions) == 5
        assert [row["rank"] for row in one.tail] == [1, 2, 3, 4, 5]


def test_labelled_and_unlabelled_prompts_are_the_same_prompts(lm, question_file, prompt_file):
    labelled, bare = (measure_slices(lm, [path]).first for path in (question_file, prompt_file))
    assert labelled.layers[0].within == bare.layers[0].within and labelled.layers[0].between == bare.layers[0].between
    assert (bare.accuracy, bare.chance, bare.confidence_auc, bare.layers[0].curve) == (None, None, None, None)
    assert labelled.accuracy is not None and 0 < labelled.accuracy.value < 1
    assert labelled.layers[0].tail_auc is not None and labelled.length_auc is not None


def test_cloze_items_against_the_model_itself(lm, text):
    result = measure_slices(lm, cloze=[text], config=SliceConfig(context=24, tail=1000)).first
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    right = []
    for document in rows:
        tokens = lm.encode(document)
        for start in range(0, len(tokens) - 24, 25):
            with torch.inference_mode():
                logits = lm.model(torch.from_numpy(tokens[start : start + 24].astype(np.int64))[None]).logits[0, -1]
            right.append(int(logits.argmax()) == tokens[start + 24])
    assert result.items == len(right) == len(result.tail)
    assert result.accuracy.value == pytest.approx(np.mean(right))
    assert sum(row["correct"] for row in result.tail) == sum(right)
    assert (result.accuracy_normalized, result.chance, result.length_auc) == (None, None, None)
    first = min(result.tail, key=lambda row: (row["number"], row["start"]))
    assert rows[0].startswith(first["text"] + first["next"])


def test_fewer_cloze_items_are_drawn_by_the_seed(lm, text):
    def items(seed: int) -> list[tuple[int, int]]:
        config = SliceConfig(context=24, max_segments=30, tail=30, seed=seed)
        rows = measure_slices(lm, cloze=[text], config=config).first.tail
        return sorted((row["number"], row["start"]) for row in rows)

    assert items(0) == items(0) != items(1) and len(items(0)) == 30


def test_a_set_with_few_right_answers_says_that_its_slices_shrank(lm, question_file):
    result = measure_slices(lm, [question_file]).first
    right = round(result.accuracy.value * result.items)
    size = min(right, result.items - right) // 10 * 10
    assert result.layers[0].curve.size == size < 100
    note = f"questions.jsonl has {right} right and {90 - right} wrong answers, so slices have {size} items and not 100"
    assert note in result.notes
    # Some prompts of this set are longer than the model's context: said once.
    assert [one for one in result.notes if f"over {CONTEXT} tokens: their beginning is left out" in one] == [
        result.notes[0]
    ]


def test_too_few_of_one_kind_for_any_slice(lm, question_file, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(question_file.read_text().splitlines(keepends=True)[:30]))
    result = measure_slices(lm, [few]).first
    assert result.layers[0].curve is None and result.layers[0].right_minus_wrong is None
    assert result.notes[-1].endswith("too few of one kind for slices of 20, so there are none")
    assert result.layers[0].tail_auc is not None


def test_correlation_over_sets_needs_three_of_one_kind(lm, question_file, prompt_file, text, tmp_path):
    lines = question_file.read_text().splitlines(keepends=True)
    parts = [tmp_path / f"part-{at}.jsonl" for at in range(3)]
    for at, part in enumerate(parts):
        part.write_text("".join(lines[30 * at : 30 * at + 30]))
    result = measure_slices(lm, [*parts, prompt_file])
    assert result.set_correlation is not None and result.set_correlation.count == 3
    page = render_slices(slices_document(result, model="m", settings={}, versions={}))
    assert 'id="chart-ranked"' in page and "points rise" in page
    order = np.argsort([one.layers[-1].within.value for one in result.sets if one.accuracy])
    right = np.array([one.accuracy.value for one in result.sets if one.accuracy])[order]
    if len(set(right)) == 3:
        assert result.set_correlation.spearman == pytest.approx(np.corrcoef(right.argsort().argsort(), range(3))[0, 1])
    config = SliceConfig(context=24, max_segments=40)
    assert measure_slices(lm, parts, cloze=[text], config=config).set_correlation is None
    assert measure_slices(lm, parts[:2]).set_correlation is None


# The command line


def test_json_is_one_document(call, gpt2_folder, question_file, text):
    options = ("--cloze", text, "--context", 24, "--slice-size", 20, "--layers", "1.ffn_input,final_norm", "--json")
    done = call("slices", "--model", gpt2_folder, "--questions", question_file, *options)
    assert done.status == 0, done.errors
    document = json.loads(done.out)
    assert document["set"] == "questions.jsonl" and len(document["sets"]) == 2 and document["set_correlation"] is None
    assert document["slices"] == document["layers"][-1]["slices"] and document["layer"] == "final_norm"
    assert [one["accuracy"] for one in document["slices"]] == pytest.approx([level / 10 for level in range(11)])
    for one in document["slices"]:
        assert one["interval"][0] <= one["dispersion"] <= one["interval"][1]
    for name in ("accuracy", "accuracy_normalized", "tail_auc", "within", "confidence_auc", "right_minus_wrong"):
        low, high = document[f"{name}_interval"]
        assert low <= document[name] <= high
    assert document["item_correlation"]["count"] == document["items"] == 90
    assert (document["settings"]["slice_size"], document["settings"]["seeds"]) == (20, 10)


def test_table_tail_and_report(call, gpt2_folder, question_file, prompt_file, tmp_path):
    tail, folder = tmp_path / "a" / "tail.jsonl", tmp_path / "b" / "c"
    options = ("--slice-size", 20, "--tail", 4, "--tail-out", tail, "--report", folder)
    done = call("slices", "--model", gpt2_folder, "--questions", question_file, prompt_file, *options)
    assert (done.status, done.errors) == (0, ())
    rows = [json.loads(line) for line in tail.read_text().splitlines()]
    assert {name: [row["rank"] for row in rows if row["set"] == name] for name in ("questions.jsonl", "prompts.jsonl")}
    assert len(rows) == 8 and all("choices" in row for row in rows if row["set"] == "questions.jsonl")
    questions = question_file.read_text().splitlines()
    for row in rows:
        assert row["question"] == json.loads(questions[row["number"] - 1])["question"]
    document = json.loads((folder / "slices.json").read_text())
    assert re.search(rf"questions\.jsonl +90 +{100 * document['accuracy']:.1f}%", done.out)
    assert done.out.splitlines()[-2:] == [f"Items of lowest dispersion: {tail}", f"Report: {folder / 'slices.html'}"]


def test_page_tells_what_was_ours_and_escapes_names(lm, question_file, prompt_file):
    config = SliceConfig(slice_size=20)
    result = measure_slices(lm, [question_file, prompt_file], config=config)
    document = slices_document(result, model="a<b>/c&d", settings={"seeds": 10}, versions={})
    page = render_slices(document)
    assert "a<b>" not in page.split("<script")[0] and "a&lt;b&gt;/c&amp;d" in page
    for key in ("slices-questions-jsonl", "auc", "ranking"):
        assert f'id="chart-{key}"' in page
    for sentence in document["protocol"]["ours"]:
        assert sentence.split("`")[0].split("'")[0] in page


def test_page_of_a_set_without_answers(lm, prompt_file):
    result = measure_slices(lm, [prompt_file])
    page = render_slices(slices_document(result, model="m", settings={}, versions={}))
    assert "no answers to check it" in page and 'id="chart-' not in page


@pytest.mark.parametrize("count", [1, 12])
def test_a_set_whose_answers_are_all_right(count, call, gpt2_folder, lm, tmp_path):
    questions = random_questions(count)
    path, folder = tmp_path / "easy.jsonl", tmp_path / "report"
    rows = [
        {"question": one.text, "choices": list(one.choices), "answer": int(answer)}
        for one, answer in zip(questions, score_choices(lm, questions).predicted_Q, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call("slices", "--model", gpt2_folder, "--questions", path, "--report", folder)
    assert (done.status, done.errors) == (0, ())
    document = json.loads((folder / "slices.json").read_text())
    assert (document["accuracy"], document["tail_auc"], document["slices"]) == (1.0, None, [])
    assert "of the answers are right, so nothing can be told apart" in (folder / "slices.html").read_text()


LONE = '{"question": "Why?", "choices": ["a"], "answer": 0}\n'


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--model": "absent/model/folder"}, "there is no folder absent/model/folder"),
        ({"--questions": "absent.jsonl"}, "there is no file or folder absent.jsonl"),
        ({"--questions": __file__}, "is no .jsonl file; give JSON Lines"),
        ({"--cloze": "absent.txt"}, "there is no file or folder absent.txt"),
        ({"--layers": "7.ffn_input"}, "no layer fits '7.ffn_input'"),
        ({"--slice-size": 25}, "--slice-size is 25, but must be a multiple of 10 from 20 on"),
        ({"--slice-size": 10}, "--slice-size is 10, but must be a multiple of 10 from 20 on"),
        ({"--seeds": 1}, "--seeds is 1, but a band needs at least 2 draws"),
        ({"--tail": 3}, "--tail N and --tail-out FILE go together"),
        ({"--tail-out": "rows.jsonl"}, "--tail N and --tail-out FILE go together"),
        ({"--tail": 0, "--tail-out": "rows.jsonl"}, "--tail is 0, but must be above 0"),
        ({"--tail": 3, "--tail-out": __file__}, "holds no items of a tail and is not replaced; choose another"),
        ({"--context": 1}, "--context is 1, but dispersion needs at least 2 tokens"),
        ({"--max-segments": 0}, "--max-segments is 0"),
        ({"--report": __file__}, "is not an empty folder"),
        ({"--seed": -1}, "--seed is -1"),
    ],
)
def test_bad_input_is_one_line(changed, words, call, gpt2_folder, question_file):
    given = {"--model": gpt2_folder, "--questions": question_file} | changed
    done = call("slices", *[part for pair in given.items() for part in pair])
    assert (done.status, done.out) == (2, "")
    (line,) = done.errors
    assert line.startswith("knnlm: ") and words in line


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "is empty (0 bytes)"), (LONE, "must be a list of at least 2 texts, got 1 of them"), ("{", "is not JSON")],
)
def test_bad_questions_are_one_line(content, words, call, gpt2_folder, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    done = call("slices", "--model", gpt2_folder, "--questions", path)
    assert (done.status, done.out) == (2, "") and words in done.errors[-1] and len(done.errors) == 1


@pytest.fixture
def no_model(monkeypatch) -> None:
    monkeypatch.setattr("knnlm.model.loading.load_model", lambda *_, **__: pytest.fail("the model was loaded"))


def test_context_over_the_limit_is_told_before_the_model_is_loaded(call, gpt2_folder, text, question_file, no_model):
    model = ("slices", "--model", gpt2_folder, "--context", CONTEXT + 1)
    done = call(*model, "--cloze", text)
    assert done.status == 2 and f"--context is {CONTEXT + 1}, but" in done.errors[-1]


def test_context_is_of_cloze_items_only(lm, question_file):
    assert measure_slices(lm, [question_file], config=SliceConfig(context=CONTEXT + 1)).first.items == 90


def test_a_text_without_a_stretch_is_not_told_of_an_option_that_slices_lacks(call, gpt2_folder, tmp_path):
    (tmp_path / "short.txt").write_text("The nurse.")
    done = call("slices", "--model", gpt2_folder, "--cloze", tmp_path / "short.txt")
    assert done.status == 2 and "as long as one segment" in done.errors[-1] and "--join" not in done.errors[-1]


def test_questions_are_parsed_once(call, gpt2_folder, question_file, monkeypatch):
    read = []
    monkeypatch.setattr(
        "knnlm.studies.slices.sets.read_questions", lambda path: read.append(path) or read_questions(path)
    )
    assert call("slices", "--model", gpt2_folder, "--questions", question_file).status == 0
    assert read == [str(question_file)]


def test_sets_of_one_base_name_are_told_apart(call, gpt2_folder, question_file, prompt_file, text, tmp_path):
    for name, source in (("sa/test.jsonl", question_file), ("sb/test.jsonl", prompt_file)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(source.read_bytes())
    paths = (tmp_path / "sa" / "test.jsonl", tmp_path / "sb" / "test.jsonl")
    done = call("slices", "--model", gpt2_folder, "--questions", *paths, "--cloze", text, "--context", 24, "--json")
    assert {one["set"] for one in json.loads(done.out)["sets"]} == {"sa/test.jsonl", "sb/test.jsonl", "text.jsonl"}


def test_the_same_file_twice_is_refused(call, gpt2_folder, question_file, no_model):
    again = question_file.parent / "." / ".." / question_file.parent.name / question_file.name
    done = call("slices", "--model", gpt2_folder, "--questions", question_file, again)
    assert done.status == 2 and f"{again} is given twice; leave one out" in done.errors[-1]


def test_overwrite_replaces_a_tail_and_nothing_else(call, gpt2_folder, prompt_file, tmp_path):
    tail, other = tmp_path / "tail.jsonl", tmp_path / "precious.jsonl"
    verb = ("slices", "--model", gpt2_folder, "--questions", prompt_file, "--overwrite", "--tail", 2, "--tail-out")
    other.write_text('{"question": "Why?"}\n')
    for _ in range(2):
        assert call(*verb, tail).status == 0
    done = call(*verb, other)
    assert done.status == 2 and "holds no items of a tail and is not replaced" in done.errors[-1]
    assert other.read_text() == '{"question": "Why?"}\n'
    os.mkfifo(tmp_path / "pipe")
    done = call(*verb, tmp_path / "pipe")
    assert done.status == 2 and "pipe is no regular file" in done.errors[-1]
    assert "--tail-out" in call("slices", "--help").out.split("--overwrite")[1].split("--trust")[0]


def test_no_set_and_a_cloze_context_over_the_limit(call, gpt2_folder, text):
    done = call("slices", "--model", gpt2_folder)
    assert done.status == 2 and "no set was given; name questions with --questions" in done.errors[-1]
    done = call("slices", "--model", gpt2_folder, "--cloze", text, "--context", CONTEXT + 1)
    assert done.status == 2 and f"sees at most {CONTEXT} tokens; take that" in done.errors[-1]


def test_questions_are_read_before_the_model_is_loaded(call, gpt2_folder, tmp_path, no_model):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    done = call("slices", "--model", gpt2_folder, "--questions", tmp_path / "bad.jsonl")
    assert done.status == 2 and "has no field 'question', only none" in done.errors[-1]


def test_wrong_settings_in_python():
    with pytest.raises(InputError, match="`max_segments` is 0"):
        SliceConfig(max_segments=0)

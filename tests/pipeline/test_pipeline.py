"""The verbs as a whole: what is stored, chosen, estimated, and what stops early."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.errors import FaissFailed
from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.errors import DatastoreError, DatastoreExists, InputError
from knnlm.evaluation.queries import open_queries
from knnlm.knn.indexing import index_layer, verify_store
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import build, evaluate, run, score, steps
from knnlm.pipeline.plan import EVALUATED_LAYERS, make_plan
from knnlm.progress import Silent
from knnlm.results import Interval
from knnlm.scores.choose import NEAR, candidate_layers
from knnlm.scores.layer_scorer import Settled
from knnlm.store.datastore import open_datastore
from knnlm.text.held_out import take_sample
from knnlm.text.windows import TokenDocument
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import tiny_model, tiny_tokenizer

SETTINGS = Settings(
    text=TextConfig(context=32, stride=16),
    knn=KNNConfig(max_k=32),
    evaluation=EvalConfig(eval_tokens=800, examples=2),
)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "text.jsonl", texts(0, 30))


def test_run_looks_at_every_block_and_part(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    result = run(lm, [corpus], tmp_path / "out", settings=replace(SETTINGS, layers=LayerConfig(layers="all")))
    assert tuple(one.layer for one in result.layers) == lm.layer_names
    assert result.selected in lm.layer_names
    assert result.regret is not None
    assert result.best in lm.layer_names
    assert result.index is not None
    assert (result.index.layer, result.index.spec, result.index.recall) == (result.selected, "exact", 1.0)
    assert {one.score for one in result.correlations} >= {"dispersion", "probe", "effective_rank"}
    assert result.tuning_tokens > 0


def test_run_evaluates_the_layers_that_can_matter(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    result = run(lm, [corpus], tmp_path / "out", settings=SETTINGS)
    layers = {one.layer for one in result.layers}
    assert {result.selected, "2.ffn_input"} < layers
    assert len(layers) == EVALUATED_LAYERS < len(lm.layer_names)
    assert tuple(one.layer for one in result.examined) == lm.layer_names
    pilots = {one.layer: one.pilot for one in result.examined}
    assert min(pilots, key=pilots.__getitem__) in layers
    assert open_datastore(tmp_path / "out").layers == tuple(one.layer for one in result.layers)
    measured = {one.layer for one in result.examined if not math.isnan(one.effective_rank)}
    assert measured == layers


def test_no_evaluation_token_is_in_the_sample_that_chooses(
    lm: LanguageModel, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[TokenDocument]] = {}

    def sampled(*given: Any, **named: Any) -> list[TokenDocument]:
        seen["sample"] = take_sample(*given, **named)
        return seen["sample"]

    def asked(lm: LanguageModel, documents: list[TokenDocument], *given: Any, **named: Any) -> Any:
        seen["evaluation"] = documents
        return open_queries(lm, documents, *given, **named)

    monkeypatch.setattr(steps, "take_sample", sampled)
    monkeypatch.setattr(steps, "open_queries", asked)
    run(lm, [corpus], tmp_path / "out", settings=SETTINGS)
    numbers = {kind: {document.number for document in documents} for kind, documents in seen.items()}
    assert numbers["sample"]
    assert numbers["evaluation"]
    assert not numbers["sample"] & numbers["evaluation"]


def test_evaluating_the_store_again_gives_the_same_perplexities(
    lm: LanguageModel, corpus: Path, tmp_path: Path
) -> None:
    held_out = write_jsonl(tmp_path / "eval.jsonl", texts(1, 9))
    settings = replace(SETTINGS, layers=LayerConfig(layers="*.ffn_input"))
    first = run(lm, [corpus], tmp_path / "out", eval_text=[held_out], settings=settings)
    again = evaluate(lm, open_datastore(tmp_path / "out"), [held_out], settings=SETTINGS)
    assert [one.perplexity for one in again.layers] == pytest.approx([one.perplexity for one in first.layers], rel=1e-9)
    assert again.selected == first.selected
    assert again.regret == first.regret


@pytest.mark.parametrize("kind", [str, Path])
def test_a_store_may_be_given_by_its_folder(kind: type, lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, layers=LayerConfig(layers="1.ffn_input,final_norm"))
    store = build(lm, [corpus], tmp_path / "out", settings=settings)
    by_folder, opened = (evaluate(lm, one, [corpus], settings=SETTINGS) for one in (kind(store.folder), store))
    assert by_folder.layers[0].perplexity == opened.layers[0].perplexity
    (other,) = set(store.layers) - set(store.manifest.indexes)
    assert index_layer(kind(store.folder), other).spec == "exact"
    assert set(open_datastore(store.folder).manifest.indexes) == set(store.layers)
    with pytest.raises(DatastoreError, match="nowhere"):
        evaluate(lm, kind(tmp_path / "nowhere"), [corpus])


def test_regret_is_measured_on_tokens_that_did_not_pick_the_best(
    lm: LanguageModel, corpus: Path, tmp_path: Path
) -> None:
    """Taking the best layer of the tuning part cannot look better than that layer: swapped roles, all tokens once."""
    settings = replace(SETTINGS, layers=LayerConfig(layers="*.ffn_input,*.attn_output"))
    result = run(lm, [corpus], tmp_path / "a", settings=settings)
    named = replace(settings, layers=replace(settings.layers, select=result.best))
    again = run(lm, [corpus], tmp_path / "b", settings=named)
    assert again.regret is not None
    low, high = again.regret.interval.low, again.regret.interval.high
    assert low <= again.regret.value <= high
    assert again.selected == result.best


def test_build_stores_the_chosen_layer_and_keeps_the_scores_of_all_that_compete(
    lm: LanguageModel, corpus: Path, tmp_path: Path
) -> None:
    store = build(lm, [corpus], tmp_path / "out", eval_text=[corpus], settings=SETTINGS)
    assert store.layers == (store.manifest.scores["choice"]["layer"],)
    scored = [one["layer"] for one in store.manifest.scores["layers"]]
    assert scored == ["0.attn_input", *(name for name in lm.layer_names if name.endswith("ffn_input"))]
    assert store.count == sum(len(lm.encode(text)) - 1 for text in texts(0, 30))


def test_build_chooses_by_documents_whatever_the_protocol(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    text = replace(SETTINGS.text, protocol="knn-transformers")
    store = build(lm, [corpus], tmp_path / "out", settings=replace(SETTINGS, text=text))
    assert len(store.layers) == 1


def test_build_takes_named_layers(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    for number, layers in enumerate((LayerConfig(layers="0.attn_input"), LayerConfig(select="0.attn_input"))):
        store = build(lm, [corpus], tmp_path / str(number), settings=replace(SETTINGS, layers=layers))
        assert store.layers == ("0.attn_input",)


def test_values_are_the_token_stream(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, layers=LayerConfig(layers="final_norm"))
    store = build(lm, [corpus], tmp_path / "out", eval_text=[corpus], settings=settings)
    expected = np.concatenate([lm.encode(text)[1:] for text in texts(0, 30)])
    assert np.array_equal(store.values, expected)


def test_an_index_that_is_not_exact_reports_its_own_perplexity(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, layers=LayerConfig(layers="-1.ffn_input"), knn=KNNConfig(max_k=16, index="IVF8,Flat"))
    result = run(lm, [corpus], tmp_path / "out", settings=settings)
    assert result.index is not None
    assert result.index.spec == "IVF8,Flat"
    assert 0.9 <= result.index.recall <= 1
    assert result.index.perplexity == pytest.approx(result.layers[0].perplexity, rel=0.05)


def fail_to_build(*_given: object, **_named: object) -> None:
    raise FaissFailed("FAISS says: no")


NO_INDEX = " has no index: FAISS says: no; the datastore is whole and is searched exactly, until"


@pytest.mark.parametrize("place", ["build_index", "tune_index", "measure_recall"])
def test_run_keeps_the_evaluation_where_the_index_fails(
    lm: LanguageModel, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    settings = replace(SETTINGS, layers=LayerConfig(layers="-1.ffn_input"), knn=KNNConfig(max_k=16, index="IVF8,Flat"))
    monkeypatch.setattr(f"knnlm.knn.indexing.{place}", fail_to_build)
    result = run(lm, [corpus], tmp_path / "out", settings=settings)
    assert result.index is None
    layer = "2.ffn_input"
    *_, warning = result.warnings
    assert warning.startswith(f"{layer}{NO_INDEX}")
    store = open_datastore(tmp_path / "out")
    assert (store.manifest.indexes, (tmp_path / "out" / "index").exists()) == ({}, False)
    assert store.manifest.fitted[layer]["k"] == result.layers[0].k


def test_build_keeps_the_datastore_where_the_index_fails(
    lm: LanguageModel, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the sentence that says so is true: `index_layer` makes the index later."""
    settings = replace(SETTINGS, layers=LayerConfig(layers="1.ffn_input"), knn=KNNConfig(max_k=16, index="IVF8,Flat"))
    told: list[str] = []
    progress = Silent()
    monkeypatch.setattr(progress, "note", told.append)
    with monkeypatch.context() as patched:
        patched.setattr("knnlm.knn.indexing.build_index", fail_to_build)
        store = build(lm, [corpus], tmp_path / "out", settings=settings, progress=progress)
    assert "1.ffn_input" + NO_INDEX + " knnlm.index_layer makes an index" in told
    assert verify_store(store.folder, progress) == ()
    exactly = evaluate(lm, store, [corpus], settings=settings)
    assert index_layer(store, "1.ffn_input", settings).spec == "IVF8,Flat"
    assert evaluate(lm, store, [corpus], settings=settings).layers[0].perplexity == pytest.approx(
        exactly.layers[0].perplexity, rel=0.05
    )


def test_index_that_was_never_noted_is_made_again(
    lm: LanguageModel, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run was stopped when the index was in its place and the manifest did not yet say so."""
    settings = replace(SETTINGS, layers=LayerConfig(layers="1.ffn_input"), knn=KNNConfig(max_k=16, index="IVF8,Flat"))

    def stopped(*_given: object, **_named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("knnlm.store.changeable.write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            build(lm, [corpus], tmp_path / "out", settings=settings)
    store = open_datastore(tmp_path / "out")
    assert (tmp_path / "out" / "index" / "1.ffn_input").exists()
    assert index_layer(store, "1.ffn_input", settings).spec == "IVF8,Flat"


def test_recall_of_exact_search_is_not_measured(
    lm: LanguageModel, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knnlm.knn.indexing.measure_recall", fail_to_build)
    settings = replace(SETTINGS, layers=LayerConfig(layers="1.ffn_input"), knn=KNNConfig(max_k=16))
    store = build(lm, [corpus], tmp_path / "out", settings=settings)
    assert store.manifest.indexes == {"1.ffn_input": {"metric": "l2", "spec": "exact", "recall": 1.0, "k": 16}}


def test_score_agrees_with_the_definition_over_all_keys(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    """O(N²) cosine distances of the stored keys, against the streaming score."""
    settings = replace(SETTINGS, layers=LayerConfig(layers="1.ffn_input,2.ffn_output"), key_dtype="float32")
    scored = score(lm, [corpus], settings=settings)
    store = build(lm, [corpus], tmp_path / "out", eval_text=[corpus], settings=settings)
    for one in scored.layers:
        keys = store.keys(one.layer)
        raw = keys.read(0, len(keys)).astype(np.float64) + keys.centre
        unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
        cosines = unit @ unit.T
        pairs = len(unit) * (len(unit) - 1)
        assert one.dispersion == pytest.approx(1 - (cosines.sum() - np.trace(cosines)) / pairs, abs=1e-6)
        assert scored.tokens == len(unit)


def test_plan_falls_back_to_the_candidates_and_says_so(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    unnamed = make_plan(lm, [corpus], tmp_path, SETTINGS)
    assert (unnamed.layers, unnamed.most) == (lm.layer_names, EVALUATED_LAYERS)
    assert unnamed.key_bytes is not None
    tight = make_plan(lm, [corpus], tmp_path, replace(SETTINGS, disk_budget=unnamed.key_bytes - 1))
    assert (tight.layers, tight.most) == (lm.layer_names, 1)
    assert "keeping to the chosen one" in tight.sentence
    named = replace(SETTINGS, layers=LayerConfig(layers="all"))
    plan = make_plan(lm, [corpus], tmp_path, named)
    assert (plan.layers, plan.most) == (lm.layer_names, len(lm.layer_names))
    assert plan.tokens == pytest.approx(sum(len(lm.encode(text)) for text in texts(0, 30)), rel=0.1)
    assert plan.key_bytes is not None
    tight = make_plan(lm, [corpus], tmp_path, replace(named, disk_budget=plan.key_bytes // 2))
    assert tight.layers == candidate_layers(LayerConfig(), lm.layer_names, lm.layer_names)
    assert "keeping to the" in tight.sentence
    with pytest.raises(InputError, match="`disk_budget`"):
        make_plan(lm, [corpus], tmp_path, replace(SETTINGS, disk_budget=10))


@pytest.mark.parametrize("pattern", [None, "-2.ffn_input", "-2.ffn_input,final_norm"])
@pytest.mark.parametrize("spec", ["auto", "exact", "IVF8,Flat"])
def test_settings_of_build_serve_evaluate(
    lm: LanguageModel, corpus: Path, tmp_path: Path, spec: str, pattern: str | None
) -> None:
    """-2 counts the model's blocks for `build`, and the datastore has but one block."""
    layers, knn = LayerConfig(layers=pattern), KNNConfig(max_k=16, index=spec, metric="cosine")
    settings = replace(SETTINGS, layers=layers, knn=knn)
    store = build(lm, [corpus], tmp_path / "out", settings=settings)
    result = evaluate(lm, store, [corpus], settings=settings)
    assert tuple(one.layer for one in result.layers) == store.layers


def test_own_index_serves_by_its_name_and_no_other(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, layers=LayerConfig(layers="final_norm"))
    store = build(lm, [corpus], tmp_path / "out", settings=replace(settings, knn=KNNConfig(index="IVF8,Flat")))
    evaluate(lm, store, [corpus], settings=replace(settings, knn=KNNConfig(max_k=16, index=" IVF8,Flat ")))
    with pytest.raises(InputError, match="`index` is 'IVF9,Flat', but a datastore has its own"):
        evaluate(lm, store, [corpus / "not read"], settings=replace(settings, knn=KNNConfig(index="IVF9,Flat")))


@pytest.mark.parametrize(("given", "used"), [((None, None), (32, 16)), ((12, None), (12, 12)), ((None, 8), (32, 8))])
def test_windows_are_the_datastores_where_nothing_else_is_given(
    lm: LanguageModel, corpus: Path, tmp_path: Path, given: tuple[int | None, int | None], used: tuple[int, int]
) -> None:
    settings = replace(SETTINGS, layers=LayerConfig(layers="final_norm"))
    store = build(lm, [corpus], tmp_path / "out", settings=settings)
    text = TextConfig(context=given[0], stride=given[1])
    result = evaluate(lm, store, [corpus], settings=replace(settings, text=text))
    assert (result.settings["context"], result.settings["stride"]) == used


def test_an_output_that_is_there_is_refused(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(DatastoreExists, match=r"not empty; choose another `out`$"):
        run(lm, [corpus], tmp_path / "out", settings=SETTINGS)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_lambda_zero_has_no_best_layer_and_nothing_to_regret(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, layers=LayerConfig(layers="*.ffn_input"), knn=KNNConfig(lam=0, index="exact"))
    result = run(lm, [corpus], tmp_path / "out", settings=settings)
    assert {one.perplexity for one in result.layers} == {result.lm.perplexity}
    assert (result.best, result.regret) == ("", None)


def test_layers_searched_unlike_one_another_are_warned_of(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, layers=LayerConfig(layers="*.ffn_input"), knn=KNNConfig(index="IVF4,Flat"))
    run(lm, [corpus], tmp_path / "out", settings=settings)
    store = open_datastore(tmp_path / "out")
    (indexed,) = store.manifest.indexes
    for index, told in (("auto", True), ("exact", False)):
        result = evaluate(lm, store, [corpus], settings=replace(SETTINGS, knn=KNNConfig(index=index)))
        assert any(f"{indexed} was searched through its index" in one for one in result.warnings) is told


def test_overlapping_evaluation_text_is_warned_of(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, layers=LayerConfig(layers="-1.ffn_input"))
    result = run(lm, [corpus], tmp_path / "out", eval_text=[corpus], settings=settings)
    assert any("13-grams" in warning for warning in result.warnings)
    fresh = write_jsonl(tmp_path / "fresh.jsonl", ["0123456789" * 3, "9876543210" * 3, "abcdefghijklm" * 3])
    result = run(lm, [corpus], tmp_path / "out2", eval_text=[fresh], settings=settings)
    assert not result.warnings


BELOW, ABOVE, UNSURE = Interval(-0.3, -0.1), Interval(0.1, 0.2), Interval(-0.1, 0.1)


@pytest.mark.parametrize(
    ("margins", "settled"),
    [
        ({"d": BELOW, "c": BELOW}, True),  # the leader, b, is the deepest that is near itself
        ({"d": ABOVE, "c": UNSURE}, True),  # d is near the leader, whatever c is
        ({"d": BELOW, "c": ABOVE}, True),
        ({"d": UNSURE, "c": BELOW}, False),
        ({"d": BELOW, "c": UNSURE}, False),
    ],
)
def test_scoring_stops_when_the_choice_is_settled(margins: dict[str, Interval], settled: bool) -> None:
    class Scorer:
        tokens = Settled.MINIMUM_TOKENS

        def dispersion(self, name: str) -> float:
            return {"a": 0.5, "b": 0.8, "c": 0.7, "d": 0.6}[name]

        def margin(self, name: str, leader: str, share: float) -> Interval:
            assert (leader, share) == ("b", NEAR)
            return margins[name]

    asked = Settled(("a", "b", "c", "d"))
    answers = [asked(Scorer()) for _ in range(Settled.EVERY_BATCHES)]  # type: ignore[arg-type]
    assert not any(answers[:-1])
    assert answers[-1] is settled is asked.met


def test_settings_and_results_survive_the_manifest(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    result = run(lm, [corpus], tmp_path / "out", settings=replace(SETTINGS, layers=LayerConfig(layers="*.ffn_input")))
    fitted = json.loads((tmp_path / "out" / "datastore.json").read_text())["fitted"]
    assert {name: one["k"] for name, one in fitted.items()} == {one.layer: one.k for one in result.layers}

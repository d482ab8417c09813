"""An evaluation of several datastores: that of one with all keys, and weights that are given or fitted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from knnlm import memory
from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.errors import DatastoreMismatch, InputError
from knnlm.evaluation.outcomes import evaluate_layers
from knnlm.evaluation.queries import Queries, open_queries
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import build, evaluate, merge
from knnlm.pipeline.job import Job
from knnlm.pipeline.needs import check_evaluation_memory
from knnlm.progress import Silent
from knnlm.store.datastore import Datastore
from knnlm.store.joint import as_store, open_datastores
from knnlm.text.windows import TokenDocument, WindowConfig
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import tiny_model, tiny_tokenizer

LAYERS, LAYER = ("1.ffn_input", "2.ffn_input"), "2.ffn_input"
SETTINGS = Settings(
    text=TextConfig(context=32, stride=16), layers=LayerConfig(layers=",".join(LAYERS)), key_dtype="float32"
)
EVAL = Settings(evaluation=EvalConfig(eval_tokens=400, examples=3), knn=KNNConfig(max_k=64))


class Told(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def made(lm, tmp_path_factory) -> tuple[Datastore, Datastore, Datastore]:
    """Two halves of a text with one frame, and another text, whose words are spelt backwards."""
    folder = tmp_path_factory.mktemp("made")
    stores: list[Datastore] = []
    backwards = [" ".join(word[::-1] for word in text.split()) for text in texts(20, 6)]
    for number, documents in enumerate((texts(0, 6), texts(10, 6), backwards)):
        text, frame = [write_jsonl(folder / f"{number}.jsonl", documents)], stores[0] if number == 1 else None
        stores.append(build(lm, text, folder / f"s{number}", eval_text=text, settings=SETTINGS, frame=frame))
    return stores[0], stores[1], stores[2]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("held-out") / "held-out.jsonl", texts(80, 4))


@pytest.fixture(scope="module")
def queries(lm) -> Iterator[Queries]:
    documents = [TokenDocument(lm.encode(text), "t", number) for number, text in enumerate(texts(80, 4), 1)]
    with open_queries(lm, documents, WindowConfig(32, 16), LAYERS) as found:
        yield found


def test_several_have_the_perplexity_of_one_with_all_keys(lm, made, held_out, tmp_path) -> None:
    first, second, _ = made
    told = Told()
    one = evaluate(lm, [first.folder, second], [held_out], settings=EVAL, progress=told)
    all_keys = merge([first, second], tmp_path / "merged")
    other = evaluate(lm, all_keys, [held_out], settings=EVAL)
    assert one.keys == other.keys == first.count + second.count and one.best == other.best
    for ours, theirs in zip(one.layers, other.layers, strict=True):
        assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-6)
        assert (ours.k, ours.weights, theirs.weights) == (theirs.k, (1.0, 1.0), ())
        assert (ours.lam, ours.temperature) == pytest.approx((theirs.lam, theirs.temperature), rel=1e-4)
        assert ours.by_query.perplexity == pytest.approx(theirs.by_query.perplexity, rel=1e-5)
    named = {near.source for example in one.helped for near in example.neighbors}
    assert {source.partition("/")[0] for source in named} == {"s0", "s1"}
    assert [near.source.partition("/")[2] for example in one.helped for near in example.neighbors] == [
        near.source for example in other.helped for near in example.neighbors
    ]
    assert "s0, s1 keeps what was fitted" in told.notes[-1] and "`weights=1,1`" in told.notes[-1]
    assert Datastore.open(first.folder).manifest == first.manifest


def brute_force(stores, weights, queries: Queries, k: int, temperature: float, lam: float) -> np.ndarray:
    """-log p of each target in float64, from raw keys."""
    keys_ND = np.concatenate([one.keys(LAYER).read(0, one.count) + one.keys(LAYER).centre for one in stores])
    values_N = np.concatenate([one.values for one in stores])
    weights_N = np.repeat(np.asarray(weights, np.float64), [one.count for one in stores])
    losses = []
    for vector_D, target, lm in zip(queries.vectors(LAYER), queries.targets_Q, queries.lm_Q, strict=True):
        far_N = ((vector_D.astype(np.float64) - keys_ND) ** 2).sum(axis=1)
        heavy_N = weights_N * np.exp((far_N.min() - far_N) / temperature)
        near = np.argsort(-heavy_N)[:k]
        share = heavy_N[near] @ (values_N[near] == target) / heavy_N[near].sum()
        losses.append(-np.log(lam * share + (1 - lam) * np.exp(lm)))
    return np.array(losses)


def test_a_bound_of_memory_counts_the_search_in_each_datastore(lm, made, monkeypatch) -> None:
    """Besides those of the merged search, 5 bytes for each neighbour from each: distances in float32, and hits."""
    monkeypatch.setattr(memory, "own_bytes", lambda: 10**9)
    queries, least = 10**6, {}
    for number in (1, 2, 3):
        store = as_store(made[:number])
        job = Job(lm, Settings(memory=1.0, knn=KNNConfig(max_k=64)), Silent())
        with pytest.raises(InputError) as found:
            check_evaluation_memory(job, store, queries)
        least[number] = float(re.search(r"give ([\d.]+)GB", str(found.value))[1])
    assert least[2] - least[1] == pytest.approx(2 * 5 * 64 * queries / 1e9, abs=0.11)
    assert least[3] - least[2] == pytest.approx(5 * 64 * queries / 1e9, abs=0.11)


@pytest.mark.parametrize("given", [{}, {"temperature": 3.0}])
def test_given_weights_are_those_of_the_fitted_temperature(given, made, queries) -> None:
    stores, weights = (made[0], made[2]), (1.0, 0.125)
    joint, knn = open_datastores(stores, weights), KNNConfig(max_k=64, **given)
    (found,) = evaluate_layers(joint, queries, [LAYER], knn)
    setting, reporting = found.mix, queries.parts.reporting_Q
    wanted_Q = brute_force(stores, weights, queries, setting.k, setting.temperature, setting.lam)
    np.testing.assert_allclose(found.losses_Q[reporting], wanted_Q[reporting], atol=1e-4)
    assert not given or setting.temperature == 3.0
    (plain,) = evaluate_layers(open_datastores(stores), queries, [LAYER], knn)
    assert np.abs(found.losses_Q - plain.losses_Q).max() > 0.01


def test_fitted_weights_tell_the_text_of_use_from_the_other(lm, made, held_out) -> None:
    first, _, other = made
    weigh = {
        name: evaluate(lm, stores, [held_out], settings=EVAL, fit_weights=True)
        for name, stores in (("useful first", [first, other]), ("useful second", [other, first]))
    }
    plain = evaluate(lm, [first, other], [held_out], settings=EVAL)
    for at in range(len(LAYERS)):
        useful, useless = weigh["useful first"].layers[at], weigh["useful second"].layers[at]
        assert useful.weights[0] == useless.weights[0] == 1
        assert useful.weights[1] < 1 < useless.weights[1]
        for one in (useful, useless):
            assert one.perplexity < plain.layers[at].perplexity


def test_fitted_weights_are_those_of_what_is_reported(made, queries) -> None:
    stores, knn = (made[0], made[2]), KNNConfig(max_k=64)
    (found,) = evaluate_layers(open_datastores(stores), queries, [LAYER], knn, fit_weights=True)
    weights = np.exp(-np.array(found.offsets) / found.mix.temperature)
    assert weights[0] == 1 and weights[1] < 1
    wanted_Q = brute_force(stores, weights, queries, found.mix.k, found.mix.temperature, found.mix.lam)
    reporting = queries.parts.reporting_Q
    np.testing.assert_allclose(found.losses_Q[reporting], wanted_Q[reporting], atol=1e-4)


def test_one_datastore_has_no_weights_to_fit(lm, made, held_out) -> None:
    with pytest.raises(InputError, match="`fit_weights` weighs several datastores"):
        evaluate(lm, made[0], [held_out], settings=EVAL, fit_weights=True)
    with pytest.raises(InputError, match="`fit_weights` weighs several datastores"):
        evaluate(lm, [made[0]], [held_out], settings=EVAL, fit_weights=True)


def test_weights_are_given_or_fitted(lm, made, held_out) -> None:
    joint = open_datastores(made[:2], [1, 0.5])
    with pytest.raises(InputError, match="`fit_weights` fits the `weights`, but some are given"):
        evaluate(lm, joint, [held_out], settings=EVAL, fit_weights=True)


def test_a_layer_that_one_lacks_is_left_out_or_refused(lm, made, held_out, tmp_path) -> None:
    text = [write_jsonl(tmp_path / "one.jsonl", texts(30, 2))]
    narrow = build(lm, text, tmp_path / "narrow", settings=replace(SETTINGS, layers=LayerConfig(layers=LAYER)))
    for stores in ([made[0], narrow], [narrow, made[0]]):
        assert [one.layer for one in evaluate(lm, stores, [held_out], settings=EVAL).layers] == [LAYER]
    with pytest.raises(DatastoreMismatch, match=r"narrow has no keys of layer 1\.ffn_input; it has 2\.ffn_input"):
        evaluate(lm, [made[0], narrow], [held_out], settings=replace(EVAL, layers=LayerConfig(layers="1.ffn_input")))

"""A kNN-LM with several datastores: what it says, cites, explains and holds back is what one with all keys would."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from knnlm import KNNLM
from knnlm.config import LayerConfig, Settings, TextConfig
from knnlm.errors import DatastoreMismatch, InputError
from knnlm.inference.copying import GuardProcessor
from knnlm.inference.explain import Explainer
from knnlm.knn.mixing import Gate
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import build, merge, remove
from knnlm.store.datastore import Datastore
from knnlm.store.joint import open_datastores
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import tiny_model, tiny_tokenizer

LAYERS, LAYER = ("1.ffn_input", "2.ffn_input"), "2.ffn_input"
SETTING = (64, 4.0, 0.6)
ATOL = 1e-5


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.from_model(tiny_model("llama"), tiny_tokenizer(), name="llama")


@pytest.fixture(scope="module")
def stores(lm, tmp_path_factory) -> tuple[Datastore, Datastore, Datastore]:
    """Two datastores, and both in one; the first with a fit."""
    folder = tmp_path_factory.mktemp("stores")
    settings = Settings(
        text=TextConfig(context=32, stride=16),
        layers=LayerConfig(layers=",".join(LAYERS), select=LAYER),
        key_dtype="float32",
    )
    made: list[Datastore] = []
    for number in range(2):
        text = [write_jsonl(folder / f"{number}.jsonl", texts(number, 5))]
        frame = made[0] if made else None
        made.append(build(lm, text, folder / "ab"[number], eval_text=text, settings=settings, frame=frame))
    return made[0], made[1], merge(made, folder / "merged")


@pytest.fixture(scope="module")
def text() -> str:
    """The beginning of the second's document 3."""
    return texts(1, 5)[2][:140]


def test_the_distribution_is_that_of_one_with_all_keys(lm, stores, text) -> None:
    tokens = torch.tensor([lm.encode(text).tolist()])
    gate = Gate(1.5, -0.35, -0.7)
    for metric_setting in (SETTING, (3, 0.5, 1.0)):
        several, one = (KNNLM.from_store(each, LAYER, *metric_setting, lm=lm) for each in (stores[:2], stores[2]))
        assert torch.allclose(several(tokens).logits.exp(), one(tokens).logits.exp(), atol=1e-6)
        for each in (several, one):
            each.retrieval = replace(each.retrieval, setting=replace(each.retrieval.setting, gate=gate, by_text=True))
        assert torch.allclose(several(tokens).logits.exp(), one(tokens).logits.exp(), atol=1e-6)
        prompt = {"input_ids": tokens[:, :8], "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(several.generate(**prompt), one.generate(**prompt))


def test_the_first_gives_layer_and_settings_and_weights_hold_in_every_layer(lm, stores) -> None:
    first, second, _ = stores
    joint = open_datastores([first.folder, second.folder], weights=[1, 0.25])
    several, alone = KNNLM.from_store(joint, lm=lm), KNNLM.from_store(first, lm=lm)
    assert several.retrieval.setting == alone.retrieval.setting and several.retrieval.layer == LAYER
    assert f"{first.folder} + {second.folder}" in repr(several)
    explainer = Explainer(lm, several.retrieval)
    for layer in LAYERS:
        retrieval = explainer.retrieval(layer)
        offset = -retrieval.setting.temperature * np.log(0.25)
        assert retrieval.searcher.offsets == pytest.approx((0, offset))


def test_citations_name_the_datastore(lm, stores, text) -> None:
    several, one = (KNNLM.from_store(each, LAYER, *SETTING, lm=lm) for each in (stores[:2], stores[2]))
    ours, theirs = several.cite(text).whole, one.cite(text).whole
    assert ours.log_prob == pytest.approx(theirs.log_prob, abs=ATOL)
    named = [(one.document.partition("/")[2], one.number) for one in ours.documents]
    assert named == [(one.document, one.number) for one in theirs.documents]
    for cited, same in zip(ours.documents, theirs.documents, strict=True):
        assert cited.document in ("a/0.jsonl", "b/1.jsonl")
        figures = [(each.share, each.gain, each.log_prob_without) for each in (cited, same)]
        assert figures[0] == pytest.approx(figures[1], abs=ATOL)
        assert (cited.overlap, cited.verbatim) == (same.overlap, same.verbatim)
    assert (ours.documents[0].document, ours.documents[0].number) == ("b/1.jsonl", 3)
    assert {one.document for one in ours.documents} == {"a/0.jsonl", "b/1.jsonl"}


def test_a_citation_is_what_deletion_gives_with_weights_too(lm, stores, text, tmp_path) -> None:
    first, second, _ = stores
    less = remove(Datastore.open(shutil.copytree(second.folder, tmp_path / "less")), [("1.jsonl", 3)])
    tokens = torch.tensor([lm.encode(text).tolist()])

    def model(*given: Datastore) -> KNNLM:
        return KNNLM.from_store(open_datastores(given, weights=[1, 0.3]), LAYER, *SETTING, lm=lm)

    def log_prob(model: KNNLM) -> float:
        return float(model(tokens[:, :-1]).logits[0].gather(1, tokens[0, 1:, None]).double().sum())

    cited = model(first, second).cite(text).whole
    assert cited.lm_share + sum(one.share for one in cited.documents) == pytest.approx(1, abs=1e-6)
    assert cited.log_prob == pytest.approx(log_prob(model(first, second)), abs=1e-4)
    gone = next(one for one in cited.documents if (one.document, one.number) == ("b/1.jsonl", 3))
    assert gone.gain > 1 and gone.log_prob_without == pytest.approx(log_prob(model(first, less)), abs=1e-3)


def test_neighbours_name_the_datastore(lm, stores, text) -> None:
    several, one = (
        Explainer(lm, KNNLM.from_store(each, LAYER, *SETTING, lm=lm).retrieval) for each in (stores[:2], stores[2])
    )
    ours, theirs = several.explain(text), one.explain(text)
    assert ours.mixed_perplexity == pytest.approx(theirs.mixed_perplexity, rel=1e-6)
    seen = set()
    for here, there in zip(ours.tokens, theirs.tokens, strict=True):
        for near, same in zip(here.neighbors[:5], there.neighbors[:5], strict=True):
            store, _, document = near.source.document.partition("/")
            assert replace(near.source, document=document) == same.source
            assert near.weight == pytest.approx(same.weight, abs=ATOL)
            seen.add(store)
    assert seen == {"a", "b"}


def test_the_guard_holds_over_every_text(lm, stores) -> None:
    first, second, _ = stores
    for number, weights in ((0, None), (1, None), (1, [1, 0])):
        document = lm.encode(texts(number, 5)[0]).tolist()
        model = KNNLM.from_store(open_datastores([first, second], weights), LAYER, *SETTING, lm=lm)
        guard = model.copy_guard(5)
        assert document[12] in guard.banned(document[7:12])
        banned = GuardProcessor(guard, 7)(torch.tensor([document[:12]]), torch.zeros(1, lm.vocabulary))
        assert banned[0, document[12]] == -torch.inf


def test_a_model_of_another_kind_is_refused(stores) -> None:
    other = LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="gpt2")
    with pytest.raises(DatastoreMismatch, match="was made with another model"):
        KNNLM.from_store(stores[:2], LAYER, *SETTING, lm=other)
    with pytest.raises(InputError, match="`k` is 99999, but the datastore has only"):
        KNNLM.from_store(stores[:2], LAYER, 99_999, 4.0, 0.6, lm=other)

"""Citations and the copying guard of a datastore from which documents were removed: `knnlm.remove`, with its index."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import knnlm
from knnlm import KNNLM
from knnlm.config import KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.knn.mixing import Gate, Mix
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import build
from knnlm.store.datastore import Datastore
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.inference.test_cite import log_probs
from tests.tiny_models import tiny_model, tiny_tokenizer

LAYER, SOURCE = "2.ffn_input", "text.jsonl"
SETTINGS = {"fixed": Mix(64, 4.0, 0.6), "gated": Mix(64, 4.0, 0.6, Gate(1.5, -0.35, -0.7))}


def model_of(lm: LanguageModel, store: Datastore, setting: Mix) -> KNNLM:
    model = KNNLM.from_store(store, LAYER, 2, 1.0, 0.5, lm=lm)
    model.retrieval = replace(model.retrieval, setting=setting)
    return model


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("index", ["exact", "IVF4,Flat"])
def test_after_removal_citations_are_what_another_removal_gives(index, name, tmp_path) -> None:
    lm = LanguageModel.from_model(tiny_model("llama"), tiny_tokenizer(), name="llama")
    settings = Settings(
        text=TextConfig(context=32, stride=16),
        layers=LayerConfig(layers=LAYER),
        knn=KNNConfig(index=index, max_k=64),
        key_dtype="float32",
    )
    source = write_jsonl(tmp_path / SOURCE, texts(0, 12))
    store = build(lm, [source], tmp_path / "store", eval_text=[source], settings=settings)
    text, setting = texts(0, 12)[3][:150], SETTINGS[name]
    before = model_of(lm, store, setting).cite(text).whole.documents
    first, second = before[0], next(one for one in before if one.number == 9)
    assert first.number == 4

    store = knnlm.remove(store, [(SOURCE, second.number)])
    model = model_of(lm, store, setting)
    cited, now = model.cite(text), log_probs(model, text)
    np.testing.assert_allclose([one.log_prob for one in cited.tokens], now, atol=1e-5)
    assert {one.number for one in cited.whole.documents} <= {number for number in range(1, 13) if number != 9}
    top = cited.whole.documents[0]
    assert top.number == 4

    store = knnlm.remove(store, [(SOURCE, top.number)])
    gone = log_probs(model_of(lm, store, setting), text)
    assert top.gain == pytest.approx(now.sum() - gone.sum(), rel=0.01) and top.gain > 1
    left = model_of(lm, store, setting).cite(text).whole.documents
    assert left and not {one.number for one in left} & {4, 9}

    run = lm.encode(text).tolist()[10:40]  # of the removed document, word for word
    longest = 1
    while len(model.citer.memory(store).text.followers(run[:longest])):
        longest += 1
    assert longest < len(run)  # the guard does not know it any more
    kept = lm.encode(texts(0, 12)[0]).tolist()[10:40]
    assert model.citer.memory(store).text.followers(kept).tolist() == [lm.encode(texts(0, 12)[0]).tolist()[40]]

"""`KNNLM.cite`: its predictions against datastores from which the cited documents are really gone."""

from __future__ import annotations

import gc
import json
import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from threading import Event

import numpy as np
import pytest
import torch

from knnlm import KNNLM
from knnlm.config import LayerConfig, Settings, TextConfig
from knnlm.errors import InputError
from knnlm.inference.cite import Citer
from knnlm.inference.store_text import StoreText
from knnlm.knn.citing import DocumentMap
from knnlm.knn.mixing import Gate, Mix
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import build
from knnlm.store.datastore import Datastore
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import tiny_model, tiny_tokenizer

DOCUMENTS, LAYER = 12, "2.ffn_input"
SETTINGS = {
    "fixed": Mix(64, 4.0, 0.6),
    "gated": Mix(64, 4.0, 0.6, Gate(1.5, -0.35, -0.7)),
    "wide": Mix(900, 4.0, 0.6),  # without one document fewer than k keys may be left
    "narrow": Mix(2, 1.0, 0.9),
    "zero": Mix(2, 1.0, 0.0),
}


@dataclass
class Stores:
    """A model, and datastores of its keys over some of the documents."""

    lm: LanguageModel
    folder: object

    def build(self, without: int | None = None) -> Datastore:
        kept = [text for number, text in enumerate(texts(0, DOCUMENTS), 1) if number != without]
        out = self.folder / f"store-{without}"
        if out.exists():
            return Datastore.open(out)
        settings = Settings(
            text=TextConfig(context=32, stride=16), layers=LayerConfig(layers=LAYER), key_dtype="float32"
        )
        text = [write_jsonl(self.folder / f"{without}.jsonl", kept)]
        # With a text to fit on, none of this one is kept back.
        return build(self.lm, text, out, eval_text=text, settings=settings)

    def model(self, setting: Mix, without: int | None = None) -> KNNLM:
        model = KNNLM.from_store(self.build(without), LAYER, 2, 1.0, 0.5, lm=self.lm)
        k = min(setting.k, self.build(without).count)
        model.retrieval = replace(model.retrieval, setting=replace(setting, k=k))
        return model


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Stores:
    lm = LanguageModel.from_model(tiny_model("llama"), tiny_tokenizer(), name="llama")
    return Stores(lm, tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def text() -> str:
    """A few sentences of document 4."""
    return texts(0, DOCUMENTS)[3][:150]


def log_probs(model: KNNLM, text: str) -> np.ndarray:
    """Teacher forcing: log p of each token but the first."""
    tokens = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    return model(tokens[:, :-1]).logits[0].gather(1, tokens[0, 1:, None])[:, 0].double().numpy()


@pytest.mark.parametrize("name", ["fixed", "gated", "wide", "narrow"])
def test_a_citation_is_what_deletion_gives(name, stores, text) -> None:
    setting = SETTINGS[name]
    model = stores.model(setting)
    cited, now = model.cite(text), log_probs(model, text)
    np.testing.assert_allclose([one.log_prob for one in cited.tokens], now, atol=1e-5)
    top = cited.whole.documents[0]
    assert top.number == 4 and top.document == "None.jsonl"
    gone = log_probs(stores.model(setting, top.number), text)
    assert top.gain == pytest.approx(now.sum() - gone.sum(), rel=0.01)
    assert top.log_prob_without == pytest.approx(gone.sum(), abs=1e-3)
    assert top.gain > 1 and top.gain > 4 * max(abs(one.gain) for one in cited.whole.documents[1:])
    for place in range(0, len(cited), 5):  # of single tokens too, where it is among the neighbours
        alone = {one.number: one.gain for one in cited.span(place, place + 1).documents}.get(4, 0.0)
        assert alone == pytest.approx(now[place] - gone[place], abs=1e-3)


@pytest.mark.parametrize("before", ["", "{}[] ~~ ;; || "])
def test_by_the_text_so_far_it_is_deletion_at_each_token(before, stores, text) -> None:
    """The trust is that of the whole datastore: p is w p_gated + (1 - w) p_LM, and p_gated that of the smaller one."""
    gated, by_text = (replace(SETTINGS["gated"], by_text=on) for on in (False, True))
    text = text[:100]
    plain, full, gone, now = (
        log_probs(stores.model(setting, without), before + text)
        for setting, without in ((SETTINGS["zero"], None), (gated, None), (gated, 4), (by_text, None))
    )
    trust, trusts = 0.5, []
    for ours, theirs in zip(np.exp(full), np.exp(plain), strict=True):
        trusts.append(trust if trust >= 0.01 else 0.0)
        trust = 0.001 + 0.998 * trust * ours / (trust * ours + (1 - trust) * theirs)
    due = np.log(np.array(trusts) * np.exp(gone) + (1 - np.array(trusts)) * np.exp(plain))
    cited = stores.model(by_text).cite(before + text)
    np.testing.assert_allclose([one.log_prob for one in cited.tokens], now, atol=1e-5)
    fourth = next(one for one in cited.whole.documents if one.number == 4)
    assert fourth.gain == pytest.approx(now.sum() - due.sum(), rel=0.01) and abs(fourth.gain) > 0.1
    assert cited.whole.lm_share + sum(one.share for one in cited.whole.documents) == pytest.approx(1, abs=1e-6)
    answer = stores.model(by_text).cite(text[60:], prompt=before + text[:60])
    same = cited.span(len(cited) - len(answer), len(cited))
    assert answer.whole.documents[0].gain == pytest.approx(same.documents[0].gain, abs=1e-6)


def test_what_is_known_of_a_datastore_is_kept_while_it_is_in_use_and_no_longer(stores, text) -> None:
    older, newer = Datastore.open(stores.build().folder), Datastore.open(stores.build().folder)
    citer = Citer(stores.lm)
    both = citer.memory(older), citer.memory(newer)
    runs = both[0].text
    for _ in range(2):  # requests of two generations take turns
        assert (citer.memory(older), citer.memory(newer)) == both and citer.memory(older).text is runs
    gone, kept = weakref.ref(both[0]), weakref.ref(older)
    del both, older, runs
    gc.collect()
    assert gone() is kept() is None and citer.memory(newer) is not None
    cited = stores.model(SETTINGS["fixed"]).cite(text)
    gc.collect()
    assert cited.whole.documents[0].overlap > 9  # nobody else has the datastore any more


def test_text_is_made_once_and_that_of_another_generation_is_not_waited_for(stores, monkeypatch) -> None:
    older, newer = Datastore.open(stores.build().folder), Datastore.open(stores.build().folder)
    citer, begun, go, made = Citer(stores.lm), Event(), Event(), []

    def make(store: Datastore, documents: DocumentMap) -> StoreText:
        made.append(store)
        if store is newer:
            begun.set()
            assert go.wait(60)
        return StoreText(store, documents)

    monkeypatch.setattr("knnlm.inference.cite.StoreText", make)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(lambda: citer.memory(newer).text)
        assert begun.wait(60)
        second = pool.submit(lambda: citer.memory(newer).text)
        try:
            assert pool.submit(lambda: citer.memory(older).text).result(20) is citer.memory(older).text
        finally:
            go.set()
        assert first.result() is second.result()
    assert made == [newer, older]


def test_a_random_document_is_told_right_too(stores, text) -> None:
    model = stores.model(SETTINGS["fixed"])
    other = next(one for one in model.cite(text).whole.documents if one.number == 9)
    gone = log_probs(stores.model(SETTINGS["fixed"], 9), text)
    assert other.gain == pytest.approx(log_probs(model, text).sum() - gone.sum(), abs=1e-3)


def test_shares_add_up_and_a_span_is_the_sum_of_its_tokens(stores, text) -> None:
    cited = stores.model(SETTINGS["gated"]).cite(text)
    span, tokens = cited.span(3, 9), cited.tokens[3:9]
    assert span.log_prob == pytest.approx(sum(one.log_prob for one in tokens))
    assert span.lm_share + sum(one.share for one in span.documents) == pytest.approx(1, abs=1e-6)
    gains = {number: sum(d.gain for one in tokens for d in one.documents if d.number == number) for number in range(13)}
    assert [one.gain for one in span.documents] == sorted((one.gain for one in span.documents), reverse=True)
    for one in span.documents:
        assert one.gain == pytest.approx(gains[one.number], abs=1e-9)


def test_verbatim_runs_stand_in_the_text_and_no_longer_ones_do(stores, text) -> None:
    lm, mixed = stores.lm, text[20:70] + " Holmes " + text[90:120]
    cited = stores.model(SETTINGS["fixed"]).cite(mixed)
    tokens = lm.encode(mixed).tolist()[1:]
    for one in cited.whole.documents:
        document = lm.encode(texts(0, DOCUMENTS)[one.number - 1]).tolist()
        runs = {tuple(document[at : at + one.overlap]) for at in range(len(document))}
        longer = {tuple(document[at : at + one.overlap + 1]) for at in range(len(document))}
        assert any(tuple(tokens[at : at + one.overlap]) in runs for at in range(len(tokens)))
        assert not any(tuple(tokens[at : at + one.overlap + 1]) in longer for at in range(len(tokens) - one.overlap))
        assert one.verbatim in mixed
    assert max(cited.whole.documents, key=lambda one: one.overlap).number == 4


def test_the_prompt_is_not_cited(stores, text) -> None:
    model = stores.model(SETTINGS["fixed"])
    whole, answer = model.cite(text), model.cite(text[60:], prompt=text[:60])
    assert 0 < len(answer) < len(whole)
    assert "".join(answer.pieces).endswith(text[65:]) and answer.pieces == whole.pieces[-len(answer) :]
    same = whole.span(len(whole) - len(answer), len(whole))
    assert answer.whole.log_prob == pytest.approx(same.log_prob)


def test_lambda_zero_cites_the_lm_alone(stores, text) -> None:
    cited = stores.model(Mix(8, 1.0, 0.0)).cite(text).whole
    assert cited.lm_share == pytest.approx(1) and all(one.share == one.gain == 0 for one in cited.documents)


def test_impossible_tokens_are_told_as_deletion_has_them(stores, text) -> None:
    """λ is 1: without a document a token may become impossible, or possible, as others move up."""
    setting = Mix(8, 1.0, 1.0)
    cited, now = stores.model(setting).cite(text), log_probs(stores.model(setting), text)
    gone = {number: log_probs(stores.model(setting, number), text) for number in (4, 9)}
    rescued = 0
    for first, last in [(place, place + 1) for place in range(len(cited))] + [(0, 9), (5, 40), (0, len(cited))]:
        for one in cited.span(first, last).documents:
            assert not math.isnan(one.gain) and not math.isnan(one.log_prob_without)
            if one.number in gone:
                assert one.log_prob_without == pytest.approx(gone[one.number][first:last].sum(), abs=1e-3)
                rescued += bool(np.isneginf(now[first:last].sum())) and np.isfinite(one.log_prob_without)
    assert np.isneginf(now).any() and rescued


def test_what_cannot_be_cited_is_refused(stores) -> None:
    model = stores.model(SETTINGS["fixed"])
    for text in ("", "a"):
        with pytest.raises(InputError, match="no token that something predicts"):
            model.cite(text)
    with pytest.raises(InputError, match="has 200 tokens, but llama takes 128"):
        model.cite("x" * 200)
    with pytest.raises(InputError, match="tokens 3 to 3 are no part"):
        model.cite("the nurse").span(3, 3)


def test_documents_cut_between_parts_are_whole(stores, text, tmp_path, monkeypatch) -> None:
    model = stores.model(SETTINGS["gated"])
    monkeypatch.setattr("knnlm.store.writer.PART_ROWS", 100)
    store = replace(stores, folder=tmp_path).build()
    assert len(store.manifest.parts) > DOCUMENTS
    cut = KNNLM.from_store(store, LAYER, 2, 1.0, 0.5, lm=stores.lm)
    cut.retrieval = replace(cut.retrieval, setting=model.retrieval.setting)
    found, due = (one.cite(texts(0, DOCUMENTS)[3][150:300]).whole.documents for one in (cut, model))
    assert [(one.number, one.overlap, one.verbatim) for one in found] == [
        (one.number, one.overlap, one.verbatim) for one in due
    ]
    np.testing.assert_allclose([one.gain for one in found], [one.gain for one in due], atol=1e-3)


ASKED = ("--layer", LAYER, "--k", 64, "--temperature", 4, "--lambda", 0.6)


def test_explain_cites_on_the_command_line(call, store_folder) -> None:
    words = texts(0, 24)[3][:150]
    done = call("explain", store_folder, "--text", words, *ASKED, "--cite", "--json")
    assert (done.status, done.errors) == (0, ())
    document = json.loads(done.out)
    cited = KNNLM.from_store(store_folder, LAYER, 64, 4.0, 0.6).cite(words)
    assert document["citation"] == json.loads(json.dumps(asdict(cited.whole)))
    assert [one["log_prob"] for one in document["token_citations"]] == [one.log_prob for one in cited.tokens]
    shown = call("explain", store_folder, "--text", words, *ASKED, "--cite").out
    first = cited.whole.documents[0]
    assert f"{first.gain / math.log(2):+.1f} bits" in shown and f"{first.overlap} tokens" in shown
    certain = call("explain", store_folder, "--text", "zq zq zq", *ASKED[:-1], 1, "--cite", "--json").out
    assert json.loads(certain)["citation"]["log_prob"] is None  # no neighbour has a token, and λ is 1
    assert f"of the probability of the {len(cited)} tokens" in shown


def test_generate_has_a_guard_on_the_command_line(call, store_folder) -> None:
    asked = ("generate", store_folder, "--prompt", "each patient", "--max-new-tokens", 16, *ASKED)
    free, held = (call(*asked, *more).out for more in ((), ("--max-copy", 1)))
    assert free != held
    refused = call(*asked, "--max-copy", 0)
    assert refused.status == 2
    assert refused.errors == ("knnlm: --max-copy is 0, but must be at least 1; leave it out for no limit",)

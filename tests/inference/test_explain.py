"""`Explainer`, `Continuing` and `knnlm explain` against a float64 brute force, `KNNLM` and `generate()`.

Settings are such that the neighbours change log-probabilities by several nats.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers.generation import TopPLogitsWarper

from index.neighbors import absent
from knnlm import KNNLM
from knnlm.cli.explain import _cells
from knnlm.config import LayerConfig, Settings, TextConfig
from knnlm.errors import DatastoreMismatch, InputError
from knnlm.inference.detokenizer import TokenTexts
from knnlm.inference.explain import SHOWN_NEIGHBORS, Explainer
from knnlm.knn.evidence import Evidence, Prediction, mixed_log_probs
from knnlm.knn.mixing import Gate, Mix
from knnlm.knn.retrieval import open_retrieval
from knnlm.knn.trust import Trust
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.pipeline import build
from knnlm.store.datastore import Datastore
from tests import oracle
from tests.evaluation.test_evaluate_oracle import MODULES, texts, write_jsonl
from tests.source_files import ROOT
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

CONTEXT, STRIDE = 32, 16
SETTING = Mix(64, 4.0, 0.6)
OTHER = Mix(7, 1.5, 0.25)
GATED = Mix(64, 4.0, 0.6, Gate(1.5, -0.35, -0.7))
BY_TEXT = replace(GATED, by_text=True)
# Nothing that the datastore knows: the trust falls.
FOREIGN = "{}[] ~~ ;; || %% {}[] the nurse"
LAYERS = "2.ffn_input,final_norm,1.ffn_output"
TEXT = "the nurse counts a pulse and each patient borrows one reference before Holmes ends it"
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def explainer(request, tmp_path_factory) -> Explainer:
    lm = LanguageModel.from_model(tiny_model(request.param), tiny_tokenizer(), name=request.param)
    folder = tmp_path_factory.mktemp("stores")
    settings = Settings(
        text=TextConfig(context=CONTEXT, stride=STRIDE), layers=LayerConfig(layers=LAYERS), key_dtype="float32"
    )
    text = [write_jsonl(folder / "text.jsonl", texts(0, 6))]
    store = build(lm, text, folder / "store", eval_text=text, settings=settings)
    gate = {"offset": 1.5, "distance": -0.35, "different": -0.7}
    fitted = {"k": 64, "temperature": 4.0, "lambda": 0.6}
    store.update_manifest(fitted={"final_norm": fitted | {"gate": gate}, "2.ffn_input": fitted | {"gate": gate}})
    return Explainer(lm, open_retrieval(store, "2.ffn_input", SETTING.k, SETTING.temperature, SETTING.lam))


def distributions(explainer: Explainer, tokens: list[int], setting: Mix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p_LM, p_kNN and their mixture with the fixed λ [T, V] for keys of 2.ffn_input, in float64, from raw keys."""
    model = explainer.lm.model
    path, take = MODULES[explainer.lm.name]["2.ffn_input"]
    documents = [explainer.lm.encode(text).tolist() for text in texts(0, 6)]
    store = oracle.run_documents(model, model.get_submodule(path), take, documents, CONTEXT, STRIDE)
    hidden, logits = oracle.forward(model, model.get_submodule(path), take, tokens)
    plain = np.exp(logits - logits.max(1, keepdims=True))
    plain /= plain.sum(1, keepdims=True)
    knn = np.zeros_like(plain)
    for position, query in enumerate(hidden):
        distances = ((store.keys - query) ** 2).sum(1)
        nearest = np.argsort(distances, kind="stable")[: setting.k]
        weights = np.exp(-(distances[nearest] - distances[nearest[0]]) / setting.temperature)
        np.add.at(knn[position], store.targets[nearest], weights / weights.sum())
    return plain, knn, setting.lam * knn + (1 - setting.lam) * plain


def forced(explainer: Explainer, tokens: list[int], layer: str, setting: Mix) -> np.ndarray:
    """log p [T, V] by teacher forcing through `KNNLM`."""
    model = KNNLM.from_retrieval(explainer.lm, replace(explainer.retrieval(layer), setting=setting))
    return model(torch.tensor([tokens])).logits[0].double().numpy()


def test_every_figure_equals_float64_brute_force(explainer) -> None:
    found = explainer.explain(TEXT)
    tokens = explainer.encode(TEXT)
    three = distributions(explainer, tokens[:-1], SETTING)
    expected = [[one[place, token] for one in three] for place, token in enumerate(tokens[1:])]
    told = [(one.lm_probability, one.knn_probability, one.mixed_probability) for one in found.tokens]
    np.testing.assert_allclose(told, expected, **TOLERANCE)
    changes = np.log2([mixed / lm for lm, _, mixed in expected])
    np.testing.assert_allclose([one.change for one in found.tokens], changes, atol=1e-4)
    assert np.abs(changes).max() > 3
    assert found.lm_perplexity == pytest.approx(np.exp(-np.mean(np.log([lm for lm, _, _ in expected]))), rel=1e-5)
    assert found.mixed_perplexity == pytest.approx(np.exp(-np.mean(np.log([m for *_, m in expected]))), rel=1e-5)
    for place, one in enumerate(found.tokens):
        for shown, all_V in zip((one.lm_likeliest, one.knn_likeliest, one.mixed_likeliest), three, strict=True):
            largest = np.sort(all_V[place])[::-1][:10]
            np.testing.assert_allclose([likely.probability for likely in shown], largest[largest > 0], **TOLERANCE)


@pytest.mark.parametrize("setting", [SETTING, OTHER, GATED, Mix(1, 0.5, 1.0), Mix(300, 20.0, 0.0)])
@pytest.mark.parametrize("layer", LAYERS.split(","))
def test_one_search_gives_what_teacher_forcing_gives_under_every_setting(layer, setting, explainer) -> None:
    tokens = explainer.encode(TEXT)
    log_probs = forced(explainer, tokens[:-1], layer, setting)
    for place, evidence in enumerate(explainer.evidence(tokens, layer)):
        under = evidence.under(setting)
        np.testing.assert_allclose(under.mixed_M, np.exp(log_probs[place, under.tokens_M]), **TOLERANCE)
        assert tokens[place + 1] in under.tokens_M.tolist()
        # Nothing that is left out is likelier than what is told.
        rest = np.delete(np.exp(log_probs[place]), under.tokens_M)
        assert rest.max(initial=0) <= np.sort(under.mixed_M)[-10] + 1e-6


def test_a_gate_moves_lambda_from_token_to_token(explainer) -> None:
    found = explainer.explain(TEXT, "final_norm")
    weights = np.array([one.lam for one in found.tokens])
    assert np.ptp(weights) > 0.1 and len(set(weights)) == len(weights)
    for one in found.tokens:
        mixed = one.lam * one.knn_probability + (1 - one.lam) * one.lm_probability
        assert one.mixed_probability == pytest.approx(mixed, rel=1e-9)


@pytest.mark.parametrize("text", [TEXT, FOREIGN, FOREIGN[:9] + TEXT])
def test_the_text_so_far_moves_lambda_as_in_teacher_forcing(text, explainer) -> None:
    found, tokens = explainer.explain(text, "final_norm"), explainer.encode(text)
    log_probs = forced(explainer, tokens[:-1], "final_norm", BY_TEXT)
    told = [
        (one.mixed_probability, one.trust * gated.lam)
        for one, gated in zip(found.tokens, gates(explainer, text), strict=True)
    ]
    expected = [(np.exp(log_probs[place, token]), found.tokens[place].lam) for place, token in enumerate(tokens[1:])]
    np.testing.assert_allclose(told, expected, **TOLERANCE)
    assert found.tokens[0].trust == 0.5 and abs(found.tokens[-1].trust - 0.5) > 0.1


def gates(explainer: Explainer, text: str) -> list[Prediction]:
    """The predictions at full trust."""
    return [one.under(GATED) for one in explainer.evidence(explainer.encode(text), "final_norm")]


def test_neighbours_stand_in_the_text(explainer) -> None:
    first = explainer.explain(TEXT).tokens[8]
    shown = first.neighbors
    assert len(shown) == SHOWN_NEIGHBORS
    assert [one.distance for one in shown] == sorted(one.distance for one in shown)
    weights = np.array([one.weight for one in shown])
    assert weights.sum() < 1 and (np.diff(weights) <= 0).all()
    agreeing = sum(one.weight for one in shown if one.source.token == first.text)
    assert 0 < agreeing <= first.knn_probability + 1e-9
    documents = texts(0, 6)
    for source in (one.source for one in shown):
        assert source.document == "text.jsonl"
        assert source.before + source.token + source.after in documents[source.number - 1]


def test_a_source_ends_with_its_document(explainer) -> None:
    ends = [*explainer.store.documents[1:, 0].tolist(), explainer.store.count]
    for end, text in zip(ends, texts(0, 6), strict=True):
        assert explainer.source(end - 1).after == ""
        assert text.endswith(explainer.source(end - 3).token + explainer.source(end - 3).after)


def test_without_any_neighbour_the_lm_speaks(explainer, monkeypatch) -> None:
    searcher = explainer.model().retrieval.searcher
    monkeypatch.setattr(type(searcher), "neighbors", lambda self, vectors_QD, k: absent(len(vectors_QD), k))
    found = explainer.explain(TEXT)
    for one in found.tokens:
        assert (one.mixed_probability, one.knn_probability, one.change, one.lam) == (one.lm_probability, 0, 0, 0)
        assert one.neighbors == one.knn_likeliest == ()


def test_each_layer_has_its_own_setting(explainer) -> None:
    assert explainer.retrieval("final_norm").setting == BY_TEXT
    assert explainer.retrieval("1.ffn_output").setting == explainer.retrieval().setting == SETTING  # nothing fitted
    assert [explainer.is_fitted(layer) for layer in ("final_norm", "1.ffn_output", "2.ffn_input")] == [
        True,
        False,
        False,
    ]
    assert explainer.explain(TEXT, "final_norm").setting == BY_TEXT
    with pytest.raises(DatastoreMismatch, match=r"has no keys of layer 0\.ffn_input"):
        explainer.explain(TEXT, "0.ffn_input")


@pytest.mark.parametrize(
    ("text", "message"), [("", "the text is empty"), ("a", "has one token"), ("x" * 129, "has 129 tokens, but .* 128")]
)
def test_what_cannot_be_explained_is_refused(text, message, explainer) -> None:
    with pytest.raises(InputError, match=message):
        explainer.explain(text)


# Going on


@pytest.mark.parametrize("text", [TEXT, FOREIGN])
@pytest.mark.parametrize("setting", [SETTING, OTHER, GATED, BY_TEXT])
def test_likeliest_tokens_are_those_of_generate(setting, text, explainer) -> None:
    tokens = explainer.encode(text)[:9]
    model = KNNLM.from_retrieval(explainer.lm, replace(explainer.model().retrieval, setting=setting))
    ids = torch.tensor([tokens])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    going = explainer.go_on(tokens, setting)
    steps = [going.step() for _ in range(12)]
    assert [one.token for one in steps] == expected[9:]
    log_probs = forced(explainer, expected[:-1], "2.ffn_input", setting)[8:]
    whole = explainer.evidence([*tokens, *(one.token for one in steps)])
    trust = Trust(
        setting, [one.gain(one.under(setting), token) for one, token in zip(whole, expected[1:9], strict=False)]
    )
    for step, log_probs_V in zip(steps, log_probs, strict=True):
        under = step.evidence.under(setting, trust.factor)
        trust.add(step.evidence.gain(under, step.token))
        np.testing.assert_allclose(under.mixed_M, np.exp(log_probs_V[under.tokens_M]), **TOLERANCE)


def test_a_token_is_mixed_once(explainer, monkeypatch) -> None:
    mixed, under = [], Evidence.under
    monkeypatch.setattr(Evidence, "under", lambda self, *given: (mixed.append(given), under(self, *given))[1])
    tokens = explainer.encode(TEXT)
    explainer.explain(TEXT)
    assert len(mixed) == len(tokens) - 1
    going = explainer.go_on(tokens, BY_TEXT)
    assert [going.step() for _ in range(3)] and len(mixed) == len(tokens) + 2


def test_an_architecture_without_a_cache_goes_on_too(explainer, monkeypatch) -> None:
    tokens = explainer.encode(TEXT)[:9]
    going, again = explainer.go_on(tokens, SETTING), explainer.go_on(tokens, SETTING)
    expected = [going.step().token for _ in range(5)]
    plain = KNNLM.unmixed

    def without(self, tokens_BT, past=None):
        assert past is None
        output, vectors_BTD = plain(self, tokens_BT)
        return type(output)(logits=output.logits), vectors_BTD

    monkeypatch.setattr(KNNLM, "unmixed", without)
    assert [again.step().token for _ in range(5)] == expected


def test_drawn_tokens_are_of_the_nucleus_and_repeat_with_the_seed(explainer) -> None:
    tokens = explainer.encode(TEXT)[:9]

    def drawn(seed: int, top_p: float) -> list[int]:
        going = explainer.go_on(tokens, SETTING, temperature=1.0, top_p=top_p, seed=seed)
        return [going.step().token for _ in range(6)]

    found = {seed: drawn(seed, 0.9) for seed in range(12)}
    assert drawn(3, 0.9) == found[3] and len({tuple(one) for one in found.values()}) > 1
    for new in found.values():
        scores_TV = torch.tensor(forced(explainer, [*tokens, *new[:-1]], "2.ffn_input", SETTING)[8:])
        kept_TV = TopPLogitsWarper(0.9)(None, scores_TV)
        assert torch.isfinite(kept_TV.gather(1, torch.tensor(new)[:, None])).all()
    greedy = explainer.go_on(tokens, SETTING)
    assert drawn(0, 1e-9) == [greedy.step().token for _ in range(6)]


@pytest.mark.parametrize("setting", [SETTING, OTHER, GATED, Mix(64, 4.0, 0.0), Mix(64, 4.0, 1.0)])
def test_tokens_are_drawn_from_the_mixed_distribution(setting, explainer) -> None:
    tokens = explainer.encode(TEXT)
    log_probs_TV = torch.log_softmax(explainer.lm.model(torch.tensor([tokens])).logits[0].detach(), -1)
    expected = np.exp(forced(explainer, tokens, "2.ffn_input", setting))
    for place, evidence in enumerate(explainer.evidence(tokens)):
        mixed_V = mixed_log_probs(evidence.under(setting), log_probs_TV[place]).exp()
        np.testing.assert_allclose(mixed_V, expected[place], **TOLERANCE)


def test_the_end_token_is_told(explainer, monkeypatch) -> None:
    end = tiny_tokenizer().eos_token_id
    going = explainer.go_on(explainer.encode(TEXT)[:9], SETTING)
    assert not going.step().ended
    monkeypatch.setattr("knnlm.inference.continuing.choose", lambda *_: end)
    assert going.step().ended


@pytest.mark.parametrize("text", ["the nurse", "é€ 🦀x", "日本語 text", "a\ufffdb", "\ufffd"])
def test_pieces_are_the_text_and_no_character_is_split(text, explainer) -> None:
    tokens = explainer.encode(text)
    pieces = explainer.pieces(tokens)
    assert "".join(pieces) == text and len(pieces) == len(tokens)
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)


def test_space_before_a_word_is_kept_where_a_tokenizer_drops_it() -> None:
    """As those of SentencePiece: a text's first word has no space, but its token has."""
    inner = Tokenizer(models.WordLevel({"▁the": 0, "▁nurse": 1, "s": 2}, unk_token="s"))
    inner.decoder = decoders.Metaspace()
    token_text = TokenTexts(SimpleNamespace(decode=inner.decode, encode=lambda text: np.array([0]), word="the"))
    assert inner.decode([1]) == "nurse"
    assert [token_text(token) for token in (1, 2)] == [" nurse", "s"]


# The command line

ASKED = ("--layer", "2.ffn_input", "--k", 64, "--temperature", 4, "--lambda", 0.6)


@pytest.fixture
def expected(store_folder: Path):
    store = Datastore.open(store_folder)
    retrieval = open_retrieval(store, "2.ffn_input", 64, 4.0, 0.6)
    return Explainer(load_model(store.model), retrieval).explain(TEXT)


def test_help_has_an_example(call) -> None:
    asked = call("explain", "--help")
    assert (asked.status, asked.errors) == (0, ())
    assert "Example: knnlm explain nursing.knn --text" in asked.out


def test_json_is_one_document_with_every_figure(call, expected, store_folder: Path) -> None:
    done = call("explain", store_folder, "--text", TEXT, *ASKED, "--json")
    assert (done.status, done.errors) == (0, ())
    document = json.loads(done.out)
    asked = {"store": str(store_folder), "text": TEXT, "layer": "2.ffn_input", "k": 64, "lambda": 0.6}
    assert document.items() >= asked.items()
    assert document["mixed_perplexity"] == expected.mixed_perplexity
    told = [asdict(one) for one in expected.tokens]
    assert document["tokens"] == json.loads(json.dumps([{"lambda": one.pop("lam"), **one} for one in told]))
    assert document["gate"] is None
    assert document["beginning"] + "".join(one["text"] for one in document["tokens"]) == TEXT


def test_table_has_a_line_for_each_token(call, expected, store_folder: Path) -> None:
    done = call("explain", store_folder, "--text", TEXT, *ASKED)
    assert (done.status, done.errors) == (0, ())
    lines = [line.split() for line in done.out.splitlines()]
    head = next(place for place, line in enumerate(lines) if line[:5] == ["token", "p_LM", "p_kNN", "λ", "p_mixed"])
    rows = lines[head + 2 : head + 2 + len(expected.tokens)]
    for row, one in zip(rows, expected.tokens, strict=True):
        assert row[0] == one.text.replace(" ", "␣")
        assert f"{one.change:+.1f} bits" in " ".join(row)
        assert row[-1] == one.neighbors[0].source.token.replace(" ", "␣")
    assert f"Perplexity of the {len(rows)} tokens: {expected.lm_perplexity:.2f}, with the memory" in done.out


def test_brackets_are_no_markup(expected) -> None:
    (token, *_) = _cells(replace(expected.tokens[0], text="[red]"))
    assert token.plain == "[red]"


def test_text_may_come_from_standard_input(call, expected, store_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{TEXT}\n".encode())))
    document = json.loads(call("explain", store_folder, *ASKED, "--json").out)
    assert (document["text"], len(document["tokens"])) == (TEXT, len(expected.tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", TEXT, "--layer", "final_norm"), "has no keys of layer final_norm"),
        (("--text", "", *ASKED), "the text is empty"),
        (("--text", "a", *ASKED), "has one token, which nothing predicts"),
        (("--text", "x" * 200, *ASKED), "takes 128; shorten it"),
        (("--text", TEXT, *ASKED, "--k", 0), "--k is 0"),
        (("--text", TEXT, *ASKED, "--model", "./nowhere"), "there is no folder ./nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(options, message, call, store_folder: Path) -> None:
    refused = call("explain", store_folder, *options)
    assert (refused.status, refused.out, len(refused.errors)) == (2, "", 1)
    assert message in refused.errors[0]


def test_another_model_is_refused(call, store_folder: Path, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "llama")
    refused = call("explain", store_folder, "--text", TEXT, *ASKED, "--model", other)
    assert refused.status == 2 and "was made with another model" in refused.errors[0]


def test_lines_in_the_documentation_run(store_folder: Path, tmp_path: Path, capsys) -> None:
    block = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "explorer.md").read_text(), re.DOTALL))
    copy = Path(shutil.copytree(store_folder, tmp_path / "book.knn"))
    layer = Datastore.open(copy).describe()["choice"]["layer"]
    Datastore.open(copy).update_manifest(fitted={layer: {"k": 8, "temperature": 4.0, "lambda": 0.5}})
    assert block.count('"book.knn"') == 2
    exec(block.replace('"book.knn"', repr(str(copy))))
    assert "Source(before='" in capsys.readouterr().out

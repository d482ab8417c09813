"""`generate`, `eval`, `explain` and `serve` with several datastores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

GIVEN = ("--layer", "2.ffn_input", "--k", 32, "--temperature", 4, "--lambda", 0.6)


@pytest.fixture(scope="module")
def second(tmp_path_factory, gpt2_folder: Path, store_folder: Path) -> Path:
    """A datastore with the frame of `store_folder` and other text."""
    from knnlm.config import LayerConfig, Settings, TextConfig
    from knnlm.model.loading import load_model
    from knnlm.pipeline import build
    from tests.evaluation.test_evaluate_oracle import texts, write_jsonl

    folder = tmp_path_factory.mktemp("second")
    text = write_jsonl(folder / "more.jsonl", texts(60, 6))
    settings = Settings(text=TextConfig(context=32, stride=16), layers=LayerConfig(layers="1.ffn_input,2.ffn_input"))
    lm = load_model(gpt2_folder)
    return build(lm, [text], folder / "second", eval_text=[text], settings=settings, frame=store_folder).folder


def told(done) -> dict:
    """The document of a command that succeeded."""
    assert done.status == 0, done.errors
    return json.loads(done.out)


def test_generate_and_explain_take_several(call, gpt2_folder, store_folder, second, tmp_path) -> None:
    both = tmp_path / "both"
    assert call("merge", store_folder, second, "--out", both).status == 0
    text = ("--prompt", "the nurse counts", "--max-new-tokens", 8)
    model = ("--model", gpt2_folder, "--json")
    one = told(call("generate", both, *text, *GIVEN, *model))
    several = told(call("generate", store_folder, second, *text, *GIVEN, *model))
    assert several["continuations"] == one["continuations"] and one["store"] == str(both)
    assert several["store"] == [str(store_folder), str(second)] and several["weights"] == [1.0, 1.0]
    said = ("--text", "the nurse counts a pulse and each patient", *GIVEN)
    whole = told(call("explain", both, *said, *model))
    explained = told(call("explain", store_folder, second, *said, *model, "--cite"))
    assert explained["mixed_perplexity"] == pytest.approx(whole["mixed_perplexity"], rel=1e-5)
    near = [one["source"]["document"] for token in explained["tokens"] for one in token["neighbors"]]
    cited = {one["document"] for one in explained["citation"]["documents"]}
    assert set(near) == cited == {"store/text.jsonl", "second/more.jsonl"}
    only = told(call("explain", store_folder, second, "--weights", "0,1", *said, *model))
    near = [one["source"]["document"] for token in only["tokens"] for one in token["neighbors"]]
    assert set(near) == {"second/more.jsonl"}
    assert only["weights"] == [0, 1]
    shown = call("explain", store_folder, second, *said, "--model", gpt2_folder)
    assert shown.status == 0 and "store/text.jsonl: " in shown.out


def test_eval_takes_several_and_fits_their_weights(call, gpt2_folder, store_folder, second, text_file) -> None:
    before = (store_folder / "datastore.json").read_bytes()
    given = ("--eval-text", text_file, "--eval-tokens", 400, "--model", gpt2_folder, "--json", "--verify")
    plain = call("eval", store_folder, second, *given)
    fitted = call("eval", store_folder, second, "--fit-weights", *given)
    for done, layers in ((plain, told(plain)["layers"]), (fitted, told(fitted)["layers"])):
        assert len(layers) == 2 and all(len(one["weights"]) == 2 for one in layers)
        assert "none of store, second keeps what was fitted" in done.errors[-1]
        assert "--weights 1," in done.errors[-1] and "--temperature " in done.errors[-1]
    assert all(one["weights"] == [1, 1] for one in told(plain)["layers"])
    given_back = told(call("eval", store_folder, second, "--weights", "1,0.5", *given))["layers"]
    assert [one["weights"] for one in given_back] == [[1, 0.5], [1, 0.5]]
    assert (store_folder / "datastore.json").read_bytes() == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("{a}", "--weights", "1,2"), "--weights are for several datastores"),
        (("{a}", "{b}", "--weights", "1"), "--weights are 1, but there are 2 datastores"),
        (("{a}", "{b}", "--weights", "1;2"), "is not one number for each datastore"),
        (("{a}", "{b}", "--weights", "nan,1"), "--weights are nan, 1, but must be finite"),
        (("{a}", "{a}"), "is given twice"),
        (("{a}", "{b}", "--layer", "0.ffn_input"), "store has no keys of layer 0.ffn_input; it has 1.ffn_input"),
    ],
)
def test_what_does_not_fit_is_one_line(given, said, call, store_folder, second) -> None:
    named = [one.format(a=store_folder, b=second) for one in given]
    refused = call("generate", *named, "--prompt", "a")
    assert (refused.status, len(refused.errors)) == (2, 1) and said in refused.errors[0], refused.errors


def test_eval_refuses_weights_to_fit_for_one(call, store_folder, text_file, gpt2_folder) -> None:
    given = ("--eval-text", text_file, "--model", gpt2_folder)
    refused = call("eval", store_folder, "--fit-weights", *given)
    assert refused.status == 2 and "--fit-weights weighs several datastores" in refused.errors[0]
    missing = call("eval", *given)
    assert missing.status == 2 and "STORE comes first" in missing.errors[0]


def test_serve_names_them_all(call, gpt2_folder, store_folder, second, monkeypatch) -> None:
    from fastapi.testclient import TestClient

    from knnlm.server import run

    found, text = {}, "the nurse counts a pulse"

    def ask(app, *given) -> None:
        with TestClient(app, base_url="http://127.0.0.1") as client:
            found["models"] = [one["id"] for one in client.get("/v1/models").json()["data"]]
            found["store"] = client.get("/explorer/store").json()
            asked = {"model": found["models"][0], "prompt": text, "max_tokens": 6, "temperature": 0}
            found["answer"] = client.post("/v1/completions", json={**asked, "knn": {"citations": True}}).json()
            found["explained"] = client.post("/explorer/explain", json={"text": text}).json()

    monkeypatch.setattr(run, "serve", ask)
    assert call("serve", store_folder, second, "--port", 0, "--model", gpt2_folder, *GIVEN).status == 0
    assert found["models"] == ["store+second"] and found["store"]["store"] == "store+second"
    (choice,) = found["answer"]["choices"]
    cited = {one["document"] for one in choice["citations"]["documents"]}
    assert cited == {"store/text.jsonl", "second/more.jsonl"}
    assert {source for source, _ in found["explained"]["documents"].values()} == cited

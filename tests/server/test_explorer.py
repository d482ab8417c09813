"""The explorer's calls: what the page is told equals `Evidence`, what is wrong is refused, who goes away is let go."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import asdict, replace
from http.client import HTTPConnection

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from knnlm.knn.mixing import Gate, Mix
from knnlm.server.explorer import wire
from knnlm.server.explorer.routes import PAGE
from tests import explorer_server
from tests.explorer_server import FITTED, GATE, SOURCE, Running, running
from tests.server_process import until

explainer, server = explorer_server.explainer, explorer_server.server

TEXT = "the nurse counts a pulse and each patient borrows one reference"
ON = {"k": 40, "temperature": 9.0, "lambda": 0.35}


def ask(server: Running, path: str, body: object = None) -> dict:
    status, headers, content = server.ask(path, body)
    assert (status, headers["content-type"]) == (200, "application/json"), content
    return json.loads(content)


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


# The page


@pytest.mark.parametrize(
    ("path", "kind"), [("/", "text/html"), ("/explorer.css", "text/css"), ("/explorer.js", "text/javascript")]
)
def test_page_is_served_with_a_strict_policy(path, kind, server) -> None:
    status, headers, content = server.ask(path)
    assert (status, headers["content-type"]) == (200, f"{kind}; charset=utf-8")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert content == (PAGE / {"/": "index.html"}.get(path, path[1:])).read_bytes()


def test_page_has_nothing_of_its_own_inline_and_nothing_from_elsewhere() -> None:
    page, style, script = ((PAGE / f"{name}").read_text() for name in ("index.html", "explorer.css", "explorer.js"))
    assert not re.search(r"\s(style|on\w+)\s*=", page)
    assert "<script>" not in page and "<style" not in page
    for text in (page.replace("http://www.w3.org/2000/svg", ""), style, script):
        assert "http://" not in text and "https://" not in text and "url(" not in text
    assert not [
        word for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "document.write") if word in script
    ]


# What it asks for


def test_store_tells_layers_and_settings(server) -> None:
    told = ask(server, "/explorer/store")
    assert told["model"] == "where/tiny" and told["store"] == "tiny.knn"
    assert (told["keys"], told["documents"], told["max_tokens"]) == (server.explainer.store.count, 7, 128)
    assert [one["name"] for one in told["layers"]] == list(FITTED)
    for one in told["layers"]:
        assert {name: one[name] for name in ("k", "temperature", "lambda", "gate")} == {"gate": None} | FITTED[
            one["name"]
        ]
        assert (one["fitted"], one["first"], one["depth"]) == (True, one["name"] == "2.ffn_input", 1024)


@pytest.mark.parametrize("layer", [None, "1.ffn_input"])
def test_explanation_is_the_evidence(layer, server) -> None:
    told = ask(server, "/explorer/explain", {"text": TEXT, "layer": layer})
    tokens = server.explainer.encode(TEXT)
    assert told["layer"] == layer or (layer is None and told["layer"] == "2.ffn_input")
    assert [one["token"] for one in told["tokens"]] == tokens
    assert "".join(one["text"] for one in told["tokens"]) == TEXT
    assert told["tokens"][0]["evidence"] is None
    for one, evidence in zip(told["tokens"][1:], server.explainer.evidence(tokens, layer), strict=True):
        sent = one["evidence"]
        assert sent["tokens"] == evidence.tokens_M.tolist() and sent["rows"] == evidence.found.rows_K.tolist()
        assert [sent["tokens"][at] for at in sent["votes"]] == evidence.found.values_K.tolist()
        assert (floats(sent["distances"]) == evidence.found.distances_K).all()
        np.testing.assert_array_equal(floats(sent["lm"]), evidence.lm_M.astype(np.float32))
        assert {told["texts"][str(token)] for token in sent["tokens"]}


def test_tokens_may_be_given_in_place_of_the_text(server) -> None:
    by_text = ask(server, "/explorer/explain", {"text": TEXT})
    assert ask(server, "/explorer/explain", {"tokens": [one["token"] for one in by_text["tokens"]]}) == by_text


def test_a_text_of_one_token_is_told_without_evidence(server) -> None:
    (only,) = ask(server, "/explorer/explain", {"text": "a"})["tokens"]
    assert (only["text"], only["evidence"]) == ("a", None)


def test_sources_are_those_of_the_explainer(server) -> None:
    rows = [0, server.explainer.store.count - 1, 300]
    told = ask(server, "/explorer/sources", {"rows": rows})["sources"]
    assert told == [asdict(server.explainer.source(row)) for row in rows]
    assert {one["document"] for one in told} == {SOURCE}


def events(server: Running, body: dict) -> list[dict]:
    status, headers, content = server.ask("/explorer/continue", body)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), content
    parts = content.decode().split("\n\n")
    assert parts.pop() == ""
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_continuation_tells_each_token_with_its_evidence(server) -> None:
    tokens = server.explainer.encode(TEXT)
    told = events(server, {"tokens": tokens, "layer": "1.ffn_input", **ON, "max_new_tokens": 6})
    going = server.explainer.go_on(tokens, Mix(40, 9.0, 0.35), "1.ffn_input")
    for event in told:
        (one,), step = event["tokens"], going.step()
        assert (one["token"], one["evidence"]["tokens"]) == (step.token, step.evidence.tokens_M.tolist())
        assert (floats(one["evidence"]["distances"]) == step.evidence.found.distances_K).all()
    assert [event["finish_reason"] for event in told] == [None] * 5 + ["length"]
    new = [event["tokens"][0]["token"] for event in told]
    whole = server.explainer.lm.decode([*tokens, *new])
    assert TEXT + "".join(event["tokens"][0]["text"] for event in told) == whole


def test_gate_of_the_layer_moves_lambda_where_it_is_asked_for(server) -> None:
    tokens = server.explainer.encode(TEXT)
    asked = {"tokens": tokens, "k": 64, "temperature": 4.0, "lambda": 0.625, "max_new_tokens": 10}
    setting = Mix(64, 4.0, 0.625)
    found = {}
    for gated, own in ((False, setting), (True, replace(setting, gate=Gate(**GATE)))):
        going = server.explainer.go_on(tokens, own)
        found[gated] = [event["tokens"][0]["token"] for event in events(server, {**asked, "gated": gated})]
        assert found[gated] == [going.step().token for _ in range(10)]
    assert found[True] != found[False]


def test_continuation_can_be_drawn_and_repeated(server) -> None:
    asked = {"tokens": server.explainer.encode(TEXT), **ON, "max_new_tokens": 8, "temperature_lm": 1, "top_p": 0.9}
    first, again, other = (events(server, {**asked, "seed": seed}) for seed in (1, 1, 2))
    assert first == again != other


def test_continuation_ends_where_the_model_takes_no_more(server) -> None:
    told = events(server, {"tokens": [5] * 125, **ON, "max_new_tokens": 40})
    assert [event["finish_reason"] for event in told] == [None, None, "length"]


def test_continuation_ends_with_the_end_token(server, monkeypatch) -> None:
    end = server.explainer.lm.tokenizer.eos_token_id
    monkeypatch.setattr("knnlm.inference.continuing.choose", lambda *_: end)
    told = events(server, {"tokens": [5, 6], **ON})
    assert [event["finish_reason"] for event in told] == ["stop"]


def test_who_goes_away_is_not_computed_for(explainer) -> None:
    with running(explainer) as server, server.held() as turns:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = {"tokens": explainer.encode("the"), **ON, "max_new_tokens": 100}
        connection.request("POST", "/explorer/continue", json.dumps(body), {"content-type": "application/json"})
        turns.release(2)
        answer = connection.getresponse()
        answer.read(1)
        until(lambda: server.work == 2 and server.waiting == 1)
        answer.close()
        connection.close()
        until(lambda: server.waiting == 0)  # although nothing is computed
    assert server.work == 2


# What is refused

TOKENS = {"tokens": [5, 6], **ON}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("explain", {}, "give text or tokens, one of them"),
        ("explain", {"text": "a", "tokens": [1]}, "give text or tokens, one of them"),
        ("explain", {"text": ""}, "text: must have at least 1 character"),
        ("explain", {"text": "x" * 20_001}, "text: must have at most 20000 characters"),
        ("explain", {"text": "é" * 100}, "the text has 200 tokens"),
        ("explain", {"text": "\ud800"}, "text: must be a valid string, unable to parse raw data as a unicode"),
        ("explain", {"text": "abc \ud800" * 9}, "text: must be a valid string, unable to parse raw data"),
        ("explain", {"text": "a", "layer": "\ud800"}, "there is no layer '\\ud800'"),
        ("explain", {"text": "a", "\ud800": 1}, "���: There is no such field, only generation, text, tokens, layer"),
        ("explain", {"text": 7}, "text: must be a valid string"),
        ("explain", {"text": "a", "layer": "0.ffn_input"}, "there is no layer '0.ffn_input'; the datastore has 1.ffn_"),
        ("explain", {"text": "a", "more": 1}, "more: There is no such field, only generation, text, tokens, layer"),
        ("explain", {"tokens": [288]}, "token 288 is none of the model's 288"),
        ("explain", {"tokens": [5] * 129}, "the text has 129 tokens, but at most 128 are explained"),
        ("explain", [], "the body is no JSON object"),
        ("continue", {"tokens": [5]}, "k: this field is required"),
        ("continue", {**TOKENS, "k": 2000}, "k is 2000, but at most 1024 neighbours are searched for"),
        ("continue", {**TOKENS, "k": 0}, "k: must be greater than or equal to 1"),
        ("continue", {**TOKENS, "k": True}, "k: must be a valid integer"),
        ("continue", {**TOKENS, "lambda": 1.5}, "lambda: must be less than or equal to 1"),
        ("continue", {**TOKENS, "temperature": 0}, "temperature: must be greater than 0"),
        ("continue", {**TOKENS, "temperature": float("inf")}, "temperature: must be a finite number"),
        ("continue", {**TOKENS, "max_new_tokens": 201}, "max_new_tokens: must be less than or equal to 200"),
        ("continue", {**TOKENS, "layer": "x"}, "there is no layer 'x'"),
        ("continue", {**TOKENS, "tokens": [5] * 128}, "the text has 128 tokens, and at most 128 are explained"),
        ("sources", {"rows": [10**9]}, "row 1000000000 is none of the datastore's"),
        ("sources", {"rows": [-1]}, "rows.0: must be greater than or equal to 0"),
        ("sources", {"rows": [0] * 101}, "rows: must have at most 100 items"),
    ],
)
def test_what_is_wrong_is_told_as_openai_does(path, body, message, server) -> None:
    status, headers, content = server.ask(f"/explorer/{path}", body)
    assert (status, headers["content-type"]) == (400, "application/json")
    error = json.loads(content)["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["message"].startswith(message)


def test_of_many_unknown_fields_one_is_told() -> None:
    with pytest.raises(ValidationError) as found:
        wire.ExplainRequest.model_validate({f"field{number}": 0 for number in range(50_000)})
    assert found.value.error_count() == 1


def test_what_is_no_json_is_told_so(server) -> None:
    for raw in (b"{", b"\xff", b"", b'{"text": "a"'):
        status, _, content = server.ask("/explorer/explain", raw=raw)
        assert status == 400, (raw, content)
        assert json.loads(content)["error"]["message"].startswith("the body is no JSON object"), raw


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("text", "tokens", "rows", "layer", "max_new_tokens", "temperature_lm", "top_p", "seed", *ON)
BODIES = JSON | st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(st.integers(0, 400), max_size=4), max_size=9)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["explain", "continue", "sources"]), body=BODIES)
def test_whatever_is_sent_never_breaks_it(path, body, server) -> None:
    status, _, content = server.ask(f"/explorer/{path}", raw=json.dumps(body).encode())
    assert status == 200 or (status == 400 and json.loads(content)["error"]["message"])


def test_limits_hold_without_a_limit_of_the_model(explainer, monkeypatch) -> None:
    monkeypatch.setattr(explainer.lm, "context_limit", None)
    assert wire.max_tokens(explainer) == wire.MAX_TOKENS

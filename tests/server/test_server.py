"""`knnlm serve` through the official client: completions, what they are made of, and what is refused."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import torch
from pydantic import ValidationError

from knnlm import KNNLM
from knnlm.server import wire
from tests.server_process import LAMBDA, LAYER, NAME, TEMPERATURE, K, Paced, Running, make_service, running, until
from tests.source_files import ROOT

PROMPT = "the nurse counts a pulse"
OTHERS = ("each patient", "borrows one reference before Holmes ends", "The")


@pytest.fixture(scope="module")
def server(store_folder):
    with running(make_service(store_folder)) as found:
        yield found


def ask(client: openai.OpenAI, prompt=PROMPT, *, knn: dict | None = None, **options):
    body = {} if knn is None else {"knn": knn}
    return client.completions.create(model=NAME, prompt=prompt, extra_body=body, **options)


def texts(answer) -> list[str]:
    return [choice.text for choice in answer.choices]


def encode(server: Running, text: str) -> list[int]:
    return server.service.lm.encode(text).tolist()


def greedy(model, lm, prompt: str, tokens: int) -> str:
    ids = torch.tensor([lm.encode(prompt).tolist()])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return lm.decode(found[0].tolist()).removeprefix(prompt)


def test_the_model_is_listed_by_its_name(client) -> None:
    assert [one.id for one in client.models.list().data] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "knnlm"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here"):
        client.models.retrieve("gpt-4")


def test_greedy_text_is_that_of_generate(client, server, knn) -> None:
    answer = ask(client, max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert choice.text == greedy(knn, server.service.lm, PROMPT, 12) and choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(encode(server, PROMPT))
    assert answer.usage.completion_tokens == 12 and answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert (answer.object, answer.model, choice.index, choice.logprobs) == ("text_completion", NAME, 0, None)


def test_lambda_zero_is_the_plain_model(client, server) -> None:
    lm = server.service.lm
    mixed, plain = (
        ask(client, max_tokens=16, temperature=0),
        ask(client, max_tokens=16, temperature=0, knn={"lambda": 0}),
    )
    assert texts(plain) == [greedy(lm.model, lm, PROMPT, 16)] != texts(mixed)


@pytest.mark.parametrize("given", [{"k": 4}, {"temperature": 0.5}, {"lambda": 1.0, "k": 8, "temperature": 2.0}, {}])
def test_a_request_has_its_own_setting(given, client, server, store_folder) -> None:
    setting = {"k": K, "temperature": TEMPERATURE, "lambda": LAMBDA} | given
    lm = server.service.lm
    own = KNNLM.from_store(store_folder, LAYER, setting["k"], setting["temperature"], setting["lambda"], lm=lm)
    assert texts(ask(client, max_tokens=10, temperature=0, knn=given)) == [greedy(own, lm, PROMPT, 10)]


def test_all_forms_of_a_prompt_are_one(client, server) -> None:
    options = {"max_tokens": 8, "temperature": 0}
    alone = [texts(ask(client, prompt, **options))[0] for prompt in (PROMPT, *OTHERS)]
    tokens = [encode(server, prompt) for prompt in (PROMPT, *OTHERS)]
    assert texts(ask(client, tokens[0], **options)) == alone[:1]
    assert texts(ask(client, [PROMPT, *OTHERS], **options)) == texts(ask(client, tokens, **options)) == alone


def test_streamed_pieces_are_the_whole(client) -> None:
    options = {"max_tokens": 24, "seed": 5, "n": 3, "logprobs": 2, "echo": True, "stop": ["e", "zz"]}
    whole = ask(client, [PROMPT, OTHERS[0]], **options)
    pieces = list(ask(client, [PROMPT, OTHERS[0]], **options, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [one.choices[0] for one in pieces[:-1] if one.choices[0].index == choice.index]
        assert "".join(one.text for one in own) == choice.text
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        joined = [name for one in own if one.logprobs for name in one.logprobs.tokens]
        values = [value for one in own if one.logprobs for value in one.logprobs.token_logprobs]
        assert joined == choice.logprobs.tokens
        assert values[0] is None and values[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-5)
    assert pieces[-1].choices == [] and pieces[-1].usage == whole.usage
    assert len({piece.id for piece in pieces}) == 1


def test_pieces_come_before_the_end(store_folder) -> None:
    service = make_service(store_folder)
    paced = Paced(service)
    with running(service) as server, server.client() as client:
        paced.allow(1)
        pieces = iter(ask(client, max_tokens=3, temperature=0, stream=True))
        assert next(pieces).choices[0].finish_reason is None
        until(lambda: service.thread.running == 1)
        paced.allow(2)
        assert [piece.choices[0].finish_reason for piece in pieces][-1] == "length"


def test_seed_and_n(client) -> None:
    options = {"max_tokens": 12, "n": 4}
    first, again, other = (texts(ask(client, **options, seed=seed)) for seed in (7, 7, 8))
    assert first == again != other and len({*first, *other}) == 8
    assert texts(ask(client, max_tokens=12, seed=7)) == first[:1]
    assert texts(ask(client, max_tokens=12)) != texts(ask(client, max_tokens=12))
    assert texts(ask(client, max_tokens=12, seed=-1)) == texts(ask(client, max_tokens=12, seed=-1))


def test_top_p_leaves_the_likeliest(client) -> None:
    assert texts(ask(client, max_tokens=10, top_p=0, seed=1)) == texts(ask(client, max_tokens=10, temperature=0))


def test_text_ends_before_a_stop(client) -> None:
    (text,) = texts(ask(client, max_tokens=40, temperature=0))
    for stop in (text[7:9], text[11:15], [text[20:23], text[11:15]], ["never there", text[30]]):
        stops = [stop] if isinstance(stop, str) else stop
        due = min((text.find(one) for one in stops if one in text), default=len(text))
        answer = ask(client, max_tokens=40, temperature=0, stop=stop, logprobs=0)
        assert (texts(answer), answer.choices[0].finish_reason) == ([text[:due]], "stop")
        assert all(offset < due for offset in answer.choices[0].logprobs.text_offset)
        streamed = [one.choices[0].text for one in ask(client, max_tokens=40, temperature=0, stop=stop, stream=True)]
        assert "".join(streamed) == text[:due]
    nothing = ask(client, max_tokens=40, temperature=0, stop=text[0], logprobs=2).choices[0].logprobs
    assert (nothing.tokens, nothing.token_logprobs, nothing.top_logprobs, nothing.text_offset) == ([], [], [], [])


def test_the_end_token_ends_and_is_no_text(client, server, knn) -> None:
    end, lm = server.service.lm.tokenizer.eos_token_id, server.service.lm
    choices = ask(client, OTHERS[0], n=16, max_tokens=80, seed=0, logprobs=0, temperature=2).choices
    ended = [one for one in choices if one.finish_reason == "stop"]
    assert ended, "no choice came to its end: take another seed"
    for one in ended:
        assert one.logprobs.tokens[-1] == lm.decode([end]) and lm.decode([end]) not in one.text
        assert one.logprobs.text_offset[-1] <= len(one.text)


# Log-probabilities


def forced(model: KNNLM, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0].double()


@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, *OTHERS]])
def test_echoed_log_probabilities_are_teacher_forcing(prompts, client, server, knn) -> None:
    answer = ask(client, prompts, max_tokens=0, logprobs=3, echo=True)
    assert texts(answer) == prompts and answer.usage.completion_tokens == 0
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        tokens, scores = encode(server, prompt), choice.logprobs
        due = forced(knn, tokens)
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
        targets = due[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        np.testing.assert_allclose(scores.token_logprobs[1:], targets.numpy(), atol=1e-5, rtol=0)
        for named, log_probs in zip(scores.top_logprobs[1:], due, strict=False):
            assert sorted(named.values(), reverse=True)[:3] == pytest.approx(
                log_probs.topk(3).values.tolist(), abs=1e-5
            )
            assert 3 <= len(named) <= 4
        assert "".join(scores.tokens) == prompt
        assert scores.text_offset == [len("".join(scores.tokens[:at])) for at in range(len(tokens))]


def test_log_probabilities_of_what_is_drawn_are_teacher_forcing(client, server, knn) -> None:
    lm, prompt = server.service.lm, encode(server, PROMPT)
    choice = ask(client, prompt, max_tokens=9, seed=3, temperature=0.7, logprobs=0, echo=True).choices[0]
    names = [server.service._words.name(token) for token in range(lm.vocabulary)]
    tokens = [*prompt, *(names.index(name) for name in choice.logprobs.tokens[len(prompt) :])]
    due = forced(knn, tokens)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], due.numpy(), atol=1e-5, rtol=0)
    assert choice.text == lm.decode(tokens)


def test_what_cannot_be_has_a_finite_log_probability(client) -> None:
    scores = ask(client, max_tokens=0, logprobs=5, echo=True, knn={"lambda": 1, "k": 1}).choices[0].logprobs
    assert min(scores.token_logprobs[1:]) == -9999.0
    assert all(math.isfinite(value) for named in scores.top_logprobs[1:] for value in named.values())


# Together


def test_requests_together_are_as_each_alone(client, server) -> None:
    options = [
        {
            "prompt": [PROMPT, *OTHERS][number % 4] * (1 + number % 3),
            "max_tokens": 4 + 3 * (number % 7),
            "seed": number,
            "n": 1 + number % 2,
            "temperature": (0, 0.7, 1.5)[number % 3],
            "top_p": (1, 0.8)[number % 2],
            "logprobs": (None, 1)[number % 2],
            "echo": number % 5 == 0,
            "knn": ({}, {"lambda": 0}, {"k": 8, "temperature": 1.0})[number % 3],
        }
        for number in range(24)
    ]
    alone = [texts(ask(client, **one)) for one in options]
    before = counts(server)
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda one: texts(ask(client, **one)), options))
    assert together == alone
    steps, tokens = (after - one for after, one in zip(counts(server), before, strict=True))
    assert steps < tokens / 3, "they were not together"


def counts(server: Running) -> tuple[int, int]:
    """Steps, and tokens that were generated."""
    text = httpx.get(f"{server.url}/metrics").text
    names = ("knnlm_steps_total", 'knnlm_tokens_total{kind="generated"}')
    steps, tokens = (int(re.search(rf"^{re.escape(name)} (\d+)$", text, re.MULTILINE)[1]) for name in names)
    return steps, tokens


def test_a_long_prompt_does_not_change_a_short_one_beside_it(client) -> None:
    options = {"max_tokens": 20, "temperature": 0}
    short, long = "The", " ".join([PROMPT, *OTHERS])
    alone = [texts(ask(client, prompt, **options))[0] for prompt in (short, long)]
    assert texts(ask(client, [short, long], **options)) == alone


# What is refused


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 99_999}, "max_tokens", "max_tokens is 99999, but can be at most 2048"),
        ({"max_tokens": 2.5}, "max_tokens", "valid integer"),
        ({"n": True}, "n", "valid integer"),
        ({"n": 17}, "n", "n is 17, but at most 16 choices are made of a prompt"),
        ({"best_of": 3}, "best_of", "best_of is 3, but must be n, which is 1"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"suffix": "x"}, "suffix", "at most 0 characters"),
        ({"presence_penalty": 1}, "presence_penalty", "less than or equal to 0"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [[]]}, "prompt", "at least 1 item"),
        ({"prompt": {"a": 1}}, "prompt", "valid string"),
        ({"prompt": ["a", 1]}, "prompt", "valid string"),
        ({"prompt": [99_999]}, "prompt", "token 99999 of the prompt is none of the model's 288"),
        ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
        ({"prompt": ["a"] * 129}, "prompt", "ask for 129 choices, but at most 128 can wait"),
        ({"prompt": "a" * 400}, "prompt", "are beyond the 128 of the model's context; shorten it"),
        ({"knn": {"lambda": 2}}, "knn.lambda", "less than or equal to 1"),
        ({"knn": {"lam": 0.5}}, "knn.lam", "knn.lam: There is no such field, only lambda, k, temperature"),
        ({"knn": {"k": 99_999}}, "knn.k", "knn.k is 99999, but can be at most"),
        ({"knn": {"temperature": 0}}, "knn.temperature", "greater than 0"),
        ({"knn": 7}, "knn", "must be an object"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "valid boolean"),
        ({"stream_options": {}}, "stream_options", "is only allowed when 'stream' is enabled"),
        ({"stop": ["a", 1]}, "stop", "stop: must be a valid string"),
        ({"extra_body": {"tempreature": 1}}, "tempreature", "There is no such field, only model, temperature, "),
    ],
)
def test_what_cannot_be_names_the_field(options, param, message, client) -> None:
    extra = options.pop("extra_body", {})
    with pytest.raises(openai.BadRequestError) as found:
        client.completions.create(model=NAME, prompt=PROMPT, max_tokens=4, extra_body={**extra, **options})
    error = found.value.response.json()["error"]
    assert error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error"


MANY = 50_000
FORMS = "prompt: must be a valid string; or must be a valid integer"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": [0] * MANY + ["a"]}, f"{FORMS}; or must be a valid list"),
        ({"prompt": [[]] * MANY}, f"{FORMS}; or must have at least 1 item"),
        ({"prompt": [["a"] * MANY] * 2}, FORMS),
        ({f"field{number}": 0 for number in range(MANY)}, "field0: There is no such field, only model, "),
        (
            {"knn": {f"field{number}": 0 for number in range(MANY)}},
            "knn.field0: There is no such field, only lambda, k, temperature",
        ),
        ({"logit_bias": {str(number): "a" for number in range(MANY)}}, "logit_bias: must have at most 0"),
    ],
)
def test_of_many_mistakes_few_are_collected(options, message, server) -> None:
    body = {"model": NAME, "prompt": PROMPT, **options}
    with pytest.raises(ValidationError) as found:
        wire.CompletionRequest.model_validate(body)
    assert found.value.error_count() <= 4
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize("prompt", [None, ""])
def test_without_a_prompt_the_text_begins_anew(prompt, client, server) -> None:
    start = server.service.lm.tokenizer.bos_token_id
    start = server.service.lm.tokenizer.eos_token_id if start is None else start
    options = {"max_tokens": 8, "temperature": 0}
    due = texts(ask(client, [start], **options))
    body = {"model": NAME, **options} | ({} if prompt is None else {"prompt": prompt})
    for given in (body, body | {"prompt": prompt}):
        answer = httpx.post(f"{server.url}/v1/completions", json=given).json()
        assert [choice["text"] for choice in answer["choices"]] == due


def test_rows_without_a_token_have_names_of_their_own(server) -> None:
    words = server.service._words
    rows = range(len(server.service.lm.tokenizer), server.service.lm.vocabulary + 4)
    names = [words.name(row) for row in rows]
    assert names == [f"token_id:{row}" for row in rows] and len(names) >= 4
    everything = [words.name(token) for token in range(server.service.lm.vocabulary)]
    assert "" not in everything and "None" not in everything


def test_another_model_is_not_found(client) -> None:
    with pytest.raises(openai.NotFoundError) as found:
        client.completions.create(model="gpt-4", prompt=PROMPT)
    assert found.value.code == "model_not_found" and "the one that is served is 'tiny'" in found.value.message


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (
            {
                "best_of": 1,
                "user": "ann",
                "frequency_penalty": 0,
                "presence_penalty": 0.0,
                "logit_bias": {},
                "suffix": "",
            },
            200,
        ),
        ({"seed": 1 << 80, "n": 1.0, "max_tokens": 2.0, "logprobs": 0.0, "knn": {"k": 4.0}}, 200),
        ({"seed": None, "n": None, "max_tokens": None, "knn": None, "stop": None, "logprobs": None, "echo": None}, 200),
    ],
)
def test_what_changes_nothing_is_accepted(options, status, server) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": NAME, "prompt": "a", **options})
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", {}),
        (b"{", {}),
        (b"[]", {}),
        (b"null", {}),
        (b"[" * 100_000, {}),
        (b'{"model": "tiny", "prompt": "\\ud800"}', {}),
        (b'{"model": "tiny", "prompt": "a", "\\ud800": 1}', {}),
        (b'{"model": "\\udfff", "prompt": "a"}', {}),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', {}),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', {}),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", {}),
        (b"\xff\xfe", {}),
        (b'{"model": "tiny", "prompt": "a"}', {"content-type": "text/plain"}),
        (b'{"model": "tiny", "prompt": "a"}', {"content-type": "application/x-www-form-urlencoded"}),
    ],
)
def test_a_body_that_is_no_request_is_refused(body, headers, server) -> None:
    headers = {"content-type": "application/json", **headers}
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert answer.status_code in (400, 404), answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/completions", 405), ("GET", "/nowhere", 404)])
def test_other_routes_are_refused_in_the_same_shape(method, path, status, server) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    assert status != 405 or answer.headers["allow"] == "POST"
    assert path in answer.json()["error"]["message"]


# The key


def test_key_is_needed_where_there_is_one(store_folder) -> None:
    service = make_service(store_folder)
    with running(service, api_key="s3cret") as server:
        with server.client("s3cret") as client:
            assert ask(client, max_tokens=2).usage.completion_tokens == 2
        with server.client("s3cre") as client, pytest.raises(openai.AuthenticationError) as found:
            ask(client)
        assert found.value.code == "invalid_api_key"
        for path in ("/v1/models", "/v1/nothing", "/explorer/anything"):
            assert httpx.get(server.url + path).status_code == 401
            given = {"authorization": b"Bearer s3cret"}
            assert httpx.get(server.url + path, headers=given).status_code in (200, 404)
            assert httpx.get(server.url + path, headers={"authorization": b"Bearer \xff\xfe"}).status_code == 401
        for path in ("/healthz", "/metrics", "/openapi.json"):
            assert httpx.get(server.url + path).status_code == 200


@pytest.mark.parametrize("page", ["README.md", "docs/serve.md"])
def test_lines_in_the_documentation_run(page, store_folder, capsys) -> None:
    (block,) = re.findall(r"```python\n(from openai import OpenAI\n.*?)```", (ROOT / page).read_text(), re.DOTALL)
    address = "http://127.0.0.1:8000"
    assert block.count(address) == 1
    with running(make_service(store_folder, "book.knn")) as server:
        names = {}
        exec(block.replace(address, server.url), names)
        names["client"].close()
    assert len(capsys.readouterr().out) > 10


def test_health_and_metrics(server) -> None:
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    for line in answer.text.splitlines():
        assert line.startswith("# ") or math.isfinite(float(line.rsplit(" ", 1)[1]))
    assert '\nknnlm_requests_total{path="/healthz",status="200"} 1' in answer.text
    assert "\nknnlm_choices_running 0" in answer.text

"""Chat completions through the official client: the tokenizer's own template, and the answer's other form."""

from __future__ import annotations

import httpx
import numpy as np
import openai
import pytest
import torch

from knnlm import KNNLM
from tests.server_process import LAMBDA, LAYER, NAME, TEMPERATURE, K, make_service, running

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('the first message is refused') }}{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the nurse counts a pulse"},
]
WRITTEN = "[system] be brief\n[user] the nurse counts a pulse\n[assistant]"


@pytest.fixture(scope="module")
def server(store_folder):
    service = make_service(store_folder)
    service.lm.tokenizer.chat_template = TEMPLATE
    with running(service) as found:
        yield found


def chat(client: openai.OpenAI, messages=MESSAGES, *, knn: dict | None = None, **options):
    body = {} if knn is None else {"knn": knn}
    return client.chat.completions.create(model=NAME, messages=messages, extra_body=body, **options)


def prompt_tokens(server) -> list[int]:
    return server.service.lm.tokenizer(WRITTEN, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("knn", [None, {"lambda": 0}, {"k": 4, "temperature": 1.0}])
def test_a_chat_is_the_completion_of_its_template(knn, client, server) -> None:
    answer = chat(client, knn=knn, max_tokens=10, temperature=0)
    other = client.completions.create(
        model=NAME, prompt=prompt_tokens(server), max_tokens=10, temperature=0, extra_body={"knn": knn}
    )
    (choice,) = answer.choices
    assert choice.message.content == other.choices[0].text and choice.message.role == "assistant"
    assert (choice.finish_reason, answer.usage) == (other.choices[0].finish_reason, other.usage)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", NAME, "chatcmpl-")


def test_greedy_answer_is_that_of_generate(client, server, store_folder) -> None:
    lm = server.service.lm
    model = KNNLM.from_store(store_folder, LAYER, K, TEMPERATURE, LAMBDA, lm=lm)
    ids = torch.tensor([lm.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    answer = chat(client, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == lm.decode(found[0, ids.shape[1] :].tolist())


def test_forms_of_content_and_names_of_roles(client) -> None:
    options = {"max_tokens": 6, "temperature": 0}
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        MESSAGES[1] | {"name": "ann"},
    ]
    assert chat(client, parts, **options).choices == chat(client, **options).choices
    newer = chat(client, max_completion_tokens=6, temperature=0)
    assert newer.choices == chat(client, **options).choices


def test_streamed_pieces_are_the_whole(client) -> None:
    options = {"max_tokens": 20, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 3, "stop": ["e", "zz"]}
    whole = chat(client, **options)
    pieces = list(chat(client, **options, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [one.choices[0] for one in pieces[:-1] if one.choices[0].index == choice.index]
        assert [one.delta.role for one in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(one.delta.content for one in own) == choice.message.content
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        scores = [score for one in own for score in one.logprobs.content]
        assert [score.token for score in scores] == [score.token for score in choice.logprobs.content]
    assert pieces[-1].choices == [] and pieces[-1].usage == whole.usage
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"} and len({piece.id for piece in pieces}) == 1


def test_log_probabilities_are_teacher_forcing(client, server, store_folder) -> None:
    lm = server.service.lm
    model = KNNLM.from_store(store_folder, LAYER, K, TEMPERATURE, LAMBDA, lm=lm)
    scores = chat(client, max_tokens=8, seed=1, logprobs=True, top_logprobs=4).choices[0].logprobs.content
    words = server.service._words
    names = [words.name(token) for token in range(lm.vocabulary)]
    drawn = [names.index(score.token) for score in scores]
    prompt = prompt_tokens(server)
    due = model(torch.tensor([[*prompt, *drawn]])).logits[0].double()[len(prompt) - 1 : -1]
    np.testing.assert_allclose(
        [score.logprob for score in scores], due.gather(1, torch.tensor(drawn)[:, None])[:, 0], atol=1e-5, rtol=0
    )
    for score, log_probs in zip(scores, due, strict=True):
        assert [one.logprob for one in score.top_logprobs] == pytest.approx(log_probs.topk(4).values.tolist(), abs=1e-5)
        assert [one.token for one in score.top_logprobs] == [names[token] for token in log_probs.topk(4).indices]
        assert all(one.bytes is None or bytes(one.bytes).decode() == one.token for one in score.top_logprobs)
    assert chat(client, max_tokens=4, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_a_chat_goes_on_with_the_message_of_the_answer(client) -> None:
    """As OpenAI's guides do it; the message has fields that say nothing, such as `refusal`."""
    first = chat(client, max_tokens=3, temperature=0).choices[0].message
    plain = {"role": first.role, "content": first.content}
    more = [{"role": "user", "content": "go on"}]
    told = [
        chat(client, [*MESSAGES, message, *more], max_tokens=3, temperature=0).choices
        for message in (plain, first, first.model_dump())
    ]
    assert told[0] == told[1] == told[2]


def test_a_template_that_writes_nothing_begins_a_new_text(client, server) -> None:
    body = {"model": NAME, "temperature": 0, "max_tokens": 4}
    tokenizer = server.service.lm.tokenizer
    begun = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", "{% for message in messages %}{{ message.content }}{% endfor %}")
        answer = chat(client, [{"role": "user", "content": ""}], temperature=0, max_tokens=4)
        assert answer.choices[0].message.content == begun
        patch.setattr(tokenizer, "chat_template", "{{ 1 // 0 }}")
        with pytest.raises(openai.BadRequestError, match="the chat template refuses the messages: integer division"):
            chat(client)


def test_without_a_number_the_answer_has_the_room_that_there_is(client, server) -> None:
    answer = chat(client, temperature=2, seed=3)
    room = server.service.lm.context_limit - len(prompt_tokens(server))
    assert answer.usage.completion_tokens == room or answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "this field is required"),
        ({"messages": ["hello"]}, "messages.0", "must be an object"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role", "must be 'system', 'developer'"),
        ({"messages": [{"role": "user", "content": "refuse"}]}, "messages", "the first message is refused"),
        (
            {"messages": [{"role": "user", "content": "a" * 400}]},
            "messages",
            "are beyond the 128 of the model's context",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "must be a valid string",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "is only allowed when logprobs is true"),
        ({"logprobs": 3}, "logprobs", "must be a valid boolean"),
        ({"tool": []}, "tool", "There is no such field, only model, "),
        ({"tools": [{"type": "function"}]}, "tools", "must have at most 0 items"),
        ({"tool_choice": "required"}, "tool_choice", "must be 'none' or 'auto'"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "must be null"),
        ({"messages": [MESSAGES[1] | {"tool_calls": [{}]}]}, "messages.0.tool_calls", "must have at most 0 items"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "must be 'text'"),
        ({"max_tokens": 99_999}, "max_tokens", "can be at most 2048"),
        ({"max_completion_tokens": 99_999}, "max_completion_tokens", "can be at most 2048"),
        ({"knn": {"lamda": 0.5}}, "knn.lamda", "There is no such field, only lambda, k, temperature"),
    ],
)
def test_what_cannot_be_names_the_field(options, param, message, server) -> None:
    body = {"model": NAME, "messages": MESSAGES, "max_tokens": 4, **options}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and message in error["message"]


def test_what_clients_send_by_themselves_is_ignored(client, server) -> None:
    plain = chat(client, max_tokens=4, temperature=0)
    ignored = {
        "user": "ann",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "tools": [],
        "functions": [],
        "tool_choice": "none",
        **dict.fromkeys(("function_call", "audio", "prediction", "reasoning_effort", "verbosity"), None),
        "web_search_options": None,
    }
    body = {"model": NAME, "messages": MESSAGES, "max_tokens": 4, "temperature": 0, **ignored}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == plain.choices[0].message.content
    body |= {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200


def test_a_model_without_a_template_says_so(store_folder) -> None:
    with running(make_service(store_folder)) as server, server.client() as client:
        with pytest.raises(openai.NotFoundError) as found:
            chat(client)
        assert found.value.code == "no_chat_template" and "use /v1/completions" in found.value.message
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here"):
            client.chat.completions.create(model="gpt-4", messages=MESSAGES)


def test_chats_are_counted_by_their_path(client, server) -> None:
    chat(client, max_tokens=1)
    text = httpx.get(f"{server.url}/metrics").text
    assert 'knnlm_requests_total{path="/v1/chat/completions",status="200"}' in text

"""Citations and the copying guard over HTTP: whole answers, the last event of a stream, chats, and among others."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import torch

from knnlm import KNNLM
from knnlm.errors import InputError
from knnlm.inference.writer import Decoding, Writer
from knnlm.server.service import Service
from knnlm.store.datastore import Datastore
from tests.evaluation.test_evaluate_oracle import texts
from tests.inference.test_copying import longest_copied
from tests.server.test_chat import MESSAGES, TEMPLATE, WRITTEN
from tests.server_process import LAYER, NAME, make_service, running

PROMPT = "the nurse counts a pulse"
GREEDY = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def server(store_folder):
    service = make_service(store_folder)
    service.lm.tokenizer.chat_template = TEMPLATE
    with running(service) as found:
        yield found


def ask(client: openai.OpenAI, prompt=PROMPT, *, knn: dict, **options):
    return client.completions.create(model=NAME, prompt=prompt, extra_body={"knn": knn}, **options)


def chat(client: openai.OpenAI, *, knn: dict, **options):
    return client.chat.completions.create(model=NAME, messages=MESSAGES, extra_body={"knn": knn}, **options)


def test_citations_of_an_answer_are_those_of_its_tokens(client, server, knn) -> None:
    answer = ask(client, knn={"citations": True}, logprobs=0, **GREEDY).choices[0]
    prompt = server.service.lm.encode(PROMPT).tolist()
    told, new = answer.citations, server.service.lm.encode(PROMPT + answer.text).tolist()[len(prompt) :]
    assert told["log_prob"] == pytest.approx(sum(answer.logprobs.token_logprobs), abs=1e-4)
    assert told["lm_share"] + sum(one["share"] for one in told["documents"]) == pytest.approx(1, abs=1e-5)
    due = knn.citer.tokens([*prompt, *new], len(prompt), knn.retrieval).whole
    for one, expected in zip(told["documents"][:5], due.documents, strict=False):
        assert (one["document"], one["number"], one["overlap"]) == (
            expected.document,
            expected.number,
            expected.overlap,
        )
        assert one["gain"] == pytest.approx(expected.gain, abs=1e-5)
        assert one["log_prob_without"] == pytest.approx(expected.log_prob_without, abs=1e-4)


def test_only_who_asks_is_told_and_a_stream_tells_at_its_end(client) -> None:
    whole = ask(client, knn={"citations": True}, seed=3, n=2, max_tokens=9)
    pieces = list(ask(client, knn={"citations": True}, seed=3, n=2, max_tokens=9, stream=True))
    for choice in whole.choices:
        own = [one.choices[0] for one in pieces if one.choices and one.choices[0].index == choice.index]
        assert [one.citations is None for one in own] == [True] * (len(own) - 1) + [False]
        assert own[-1].citations["documents"][0]["gain"] == pytest.approx(
            choice.citations["documents"][0]["gain"], abs=1e-5
        )
    assert ask(client, knn={}, **GREEDY).choices[0].citations is None
    assert ask(client, knn={"citations": True}, max_tokens=0).choices[0].citations is None


def test_a_chat_is_cited_as_the_completion_of_its_template(client, server, knn) -> None:
    prompt = server.service.lm.tokenizer(WRITTEN, add_special_tokens=False)["input_ids"]
    answer = chat(client, knn={"citations": True}, logprobs=True, **GREEDY).choices[0]
    due = ask(client, [prompt], knn={"citations": True}, **GREEDY).choices[0]
    assert answer.message.content == due.text and answer.citations == due.citations
    told, count = answer.citations, len(answer.logprobs.content)
    assert told["log_prob"] == pytest.approx(sum(one.logprob for one in answer.logprobs.content), abs=1e-4)
    ids = knn.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0)[0].tolist()
    expected = knn.citer.tokens(ids, len(prompt), knn.retrieval).whole
    assert len(told["documents"]) == len(expected.documents) > 1
    for one, other in zip(told["documents"], expected.documents, strict=True):
        assert one["gain"] == pytest.approx(other.gain, abs=1e-5)
        assert one["share"] == pytest.approx(other.share, abs=1e-5)
    assert chat(client, knn={}, **GREEDY).choices[0].citations is None


def test_a_streamed_chat_cites_at_the_end_of_each_choice(client) -> None:
    options = {"knn": {"citations": True}, "seed": 3, "n": 2, "max_tokens": 9}
    whole = chat(client, **options)
    pieces = list(chat(client, **options, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].choices == []  # the count of tokens comes after all citations
    for choice in whole.choices:
        own = [one.choices[0] for one in pieces[:-1] if one.choices[0].index == choice.index]
        assert "".join(one.delta.content for one in own) == choice.message.content
        assert len(own) > 1 and [bool(one.citations) for one in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].finish_reason and own[-1].citations["lm_share"] == pytest.approx(choice.citations["lm_share"])
        gains = [[one["gain"] for one in found["documents"]] for found in (own[-1].citations, choice.citations)]
        assert gains[0] == pytest.approx(gains[1], abs=1e-5)
    plain = list(chat(client, knn={}, stream=True, **GREEDY))
    assert all(one.citations is None for piece in plain for one in piece.choices)


def test_a_request_has_its_own_guard_among_others(client, server, knn) -> None:
    alone = {n: Writer(knn, server.service.lm, Decoding(max_new_tokens=12, max_copy=n))(PROMPT).text for n in (1, 2, 4)}
    free = Writer(knn, server.service.lm, Decoding(max_new_tokens=12))(PROMPT).text
    assert len({*alone.values(), free}) > 2
    with ThreadPoolExecutor(4) as pool:
        asked = [{"max_copy": 1}, {"max_copy": 2}, {"max_copy": 4}, {}]
        found = [one.choices[0].text for one in pool.map(lambda knn: ask(client, knn=knn, **GREEDY), asked)]
    assert found == [*alone.values(), free]


def is_stored(tokens, store_folder) -> bool:
    values = Datastore.open(store_folder).values
    return len(np.flatnonzero((np.lib.stride_tricks.sliding_window_view(values, 40) == tokens[1:41]).all(axis=1))) > 0


def test_the_server_has_a_guard_that_no_request_widens(store_folder) -> None:
    made = make_service(store_folder)
    model = KNNLM.from_store(store_folder, LAYER, 2, 1.0, 0.999, lm=made.lm)
    names = {made.lm.decode([token]): token for token in range(made.lm.vocabulary)}
    shared = Counter(made.lm.decode([token]) for token in range(made.lm.vocabulary))
    # The others were kept back to fit on.
    documents = [one for one in (made.lm.encode(text) for text in texts(0, 24)) if is_stored(one, store_folder)]
    assert len(documents) > 20
    prompt = made.lm.encode(PROMPT).tolist()
    with running(Service(NAME, made.lm, model, max_copy=3)) as server, server.client() as client:
        for knn in ({}, {"max_copy": 50}, {"max_copy": 2}):
            answer = ask(client, [prompt], knn=knn, max_tokens=30, temperature=0, logprobs=0).choices[0]
            # A piece of a character has the name of others: it ends a run, as in no document there is a -1.
            tokens = [names[name] if shared[name] == 1 else -1 for name in answer.logprobs.tokens]
            assert longest_copied(tokens, [one.tolist() for one in documents]) <= knn.get("max_copy", 3) <= 50
        free = ask(client, [prompt], knn={"lambda": 0}, max_tokens=30, temperature=0)
        assert free.choices[0].finish_reason == "length"
    with pytest.raises(InputError, match="`max_copy` is 0"):
        Service(NAME, made.lm, model, max_copy=0)


@pytest.mark.parametrize("knn", [{"max_copy": 0}, {"max_copy": True}, {"citations": 1}, {"citation": True}])
def test_wrong_fields_are_refused(knn, client) -> None:
    with pytest.raises(openai.BadRequestError, match=f"knn.{next(iter(knn))}"):
        ask(client, knn=knn, **GREEDY)


def test_a_guard_that_leaves_no_token_ends_its_own_request_only(client, server, monkeypatch) -> None:
    generations = server.service._generations
    real = generations.guard

    class Harsh:
        def apply(self, generated, log_probs_V):
            if len(generated) == 3:
                raise InputError("each possible token would be one more than `max_copy=7`")
            return log_probs_V

    monkeypatch.setattr(generations, "guard", lambda kept, n: Harsh() if n == 7 else real(kept, n))
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(ask, client, knn={}, **GREEDY)
        with pytest.raises(openai.BadRequestError, match="one more than"):
            ask(client, knn={"max_copy": 7}, **GREEDY)
        assert good.result().choices[0].finish_reason == "length"

"""lm-eval's own `local-completions` against a server, beside teacher forcing and our model `knnlm` of the harness."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from knnlm.model.loading import load_model
from knnlm.server.service import Service
from tests.inference.test_generation import LAMBDA, TEMPERATURE, K, forced
from tests.server_process import running
from tests.tiny_models import CONTEXT

pytest.importorskip("lm_eval", reason="lm-eval is not installed: scripts/install eval")
pytest.importorskip("tenacity", reason="tenacity is not installed: scripts/install test")

from tests.inference.test_harness import (
    QUESTIONS,
    _quick_and_silent,  # noqa: F401 - a fixture
    evaluate,
    knn_of,
    likelihoods,
    ours,
    stores,  # noqa: F401 - a fixture
    tasks,  # noqa: F401 - a fixture
)

# What lm-eval's own libraries say when they are imported is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def url(stores):  # noqa: F811
    """Of a server of the tiny GPT-2's store."""
    model = knn_of(stores, "gpt2")
    lm = load_model(stores / "gpt2-model", device="cpu")
    with running(Service("gpt2", lm, model)) as server:
        yield f"{server.url}/v1/completions"


def local(url: str, stores, **options) -> str:  # noqa: F811
    given = {
        "model": "gpt2",
        "base_url": url,
        "tokenizer": stores / "gpt2-model",
        "tokenizer_backend": "huggingface",
        "max_length": CONTEXT,
        **options,
    }
    return ",".join(f"{name}={value}" for name, value in given.items())


def due(model) -> list[list[float]]:
    """Log-likelihoods of the choices; one token of the context is for the one that the harness lets be generated."""
    found = []
    for one in QUESTIONS:
        prompt = f"Question: {one['question']}\nAnswer:"
        before = len(model.tokenizer(prompt)["input_ids"])
        found.append([])
        for choice in one["choices"]:
            tokens = model.tokenizer(f"{prompt} {choice}")["input_ids"]
            targets = torch.tensor(tokens[before:])
            log_probs = forced(model, tokens[-(CONTEXT - 1) :][:-1])[-len(targets) :].double()
            found[-1].append(float(log_probs.gather(1, targets[:, None]).sum()))
    return found


@pytest.mark.parametrize("options", [{}, {"num_concurrent": 4}, {"tokenized_requests": False}])
def test_log_likelihoods_of_choices_are_teacher_forcing(options, url, stores, tasks) -> None:  # noqa: F811
    found = evaluate(tasks, "tiny_choice", "local-completions", local(url, stores, **options), batch_size=3)
    model = knn_of(stores, "gpt2")
    tested = slice(0, 3) if "tokenized_requests" in options else slice(None)  # the harness does not cut texts
    for got, expected in list(zip(likelihoods(found["answers"]), due(model), strict=True))[tested]:
        assert got == pytest.approx(expected, abs=1e-4)


def test_the_likeliest_choices_are_marked(url, stores, tasks) -> None:  # noqa: F811
    mine = evaluate(tasks, "tiny_choice", "knnlm", ours(stores, "gpt2"))["answers"]
    theirs = evaluate(tasks, "tiny_choice", "local-completions", local(url, stores), batch_size=1)["answers"]
    for one, other in list(zip(mine, theirs, strict=True))[:3]:  # the last is cut differently
        assert [str(greedy) for _, greedy in one] == [str(greedy) for _, greedy in other]


def test_rolling_log_likelihoods_are_those_of_our_own_model(url, stores, tasks) -> None:  # noqa: F811
    # The harness takes two tokens off what a server's model takes at once.
    mine = evaluate(tasks, "tiny_text", "knnlm", ours(stores, "gpt2", max_length=CONTEXT - 2))["answers"]
    theirs = evaluate(tasks, "tiny_text", "local-completions", local(url, stores), batch_size=2)["answers"]
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(np.array(other, float), np.array(one, float), atol=1e-3, rtol=1e-5)


def test_generated_text_is_that_of_generate(url, stores, tasks) -> None:  # noqa: F811
    found = evaluate(tasks, "tiny_words", "local-completions", local(url, stores), batch_size=4)["answers"]
    model = knn_of(stores, "gpt2")
    for got, one in zip(found[:3], QUESTIONS, strict=False):
        ids = model.tokenizer(f"Question: {one['question']}\nAnswer:", return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert got == [model.tokenizer.decode(new, skip_special_tokens=True).split("\n\n")[0]]


def test_chats_of_the_harness_are_answered_as_generate_does(url, stores, tasks) -> None:  # noqa: F811
    lm = load_model(stores / "gpt2-model", device="cpu")
    lm.tokenizer.chat_template = "{% for one in messages %}{{ one.content }}{% endfor %}"
    with running(Service("gpt2", lm, knn_of(stores, "gpt2"))) as server:
        options = local(f"{server.url}/v1/chat/completions", stores)
        found = evaluate(
            tasks, "tiny_words", "local-chat-completions", options, batch_size=1, apply_chat_template=True, limit=3
        )["answers"]
    model = knn_of(stores, "gpt2")
    for got, one in zip(found[:3], QUESTIONS, strict=False):
        ids = model.tokenizer(f"Question: {one['question']}\nAnswer:", return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert got == [model.tokenizer.decode(new, skip_special_tokens=True).split("\n\n")[0]]


def test_settings_are_the_stores(stores) -> None:  # noqa: F811
    setting = knn_of(stores, "gpt2").retrieval.setting
    assert (setting.k, setting.temperature, setting.lam) == (K, TEMPERATURE, LAMBDA)

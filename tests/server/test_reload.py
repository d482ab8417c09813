"""A server whose datastore grows: the newest generation is served when it is asked for, and what runs keeps its own."""

from __future__ import annotations

import gc
import re
import shutil
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import httpx
import pytest
import torch

import knnlm
from index.errors import FaissFailed
from knnlm import KNNLM, memory
from knnlm.config import BATCH_TOKENS
from knnlm.errors import InputError
from knnlm.inference.copying import GuardProcessor
from knnlm.knn.mixing import Gate
from knnlm.knn.retrieval import Retrieval, open_retrieval
from knnlm.server import run
from knnlm.server.explorer.routes import explorer_router
from knnlm.server.explorer.wire import generation
from knnlm.server.refusals import Refusal
from knnlm.server.service import Service
from knnlm.store.datastore import Datastore
from knnlm.store.joint import open_datastores
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.server.test_server_limits import command, post, start
from tests.server_process import LAMBDA, LAYER, NAME, TEMPERATURE, K, Paced, make_service, newest, running, until
from tests.source_files import ROOT

PROMPT = "the nurse counts"


@pytest.fixture
def store(store_folder, tmp_path) -> Path:
    return Path(shutil.copytree(store_folder, tmp_path / "store"))


def grow(store: Path, lm: knnlm.LanguageModel) -> Datastore:
    """Add documents that go on as the prompt does, each with another word than the datastore has."""
    more = [f"{PROMPT} zero zero zero zero zero zero zero zero" for _ in range(40)]
    return knnlm.add(lm, store, [str(write_jsonl(store.parent / "more.jsonl", [*more, *texts(7, 2)]))])


def greedy(store: Datastore, lm: knnlm.LanguageModel, tokens: int) -> str:
    """What the kNN-LM of a generation itself writes."""
    model = KNNLM.from_store(store, LAYER, K, TEMPERATURE, LAMBDA, lm=lm)
    ids = torch.tensor([lm.encode(PROMPT).tolist()])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return lm.decode(found[0].tolist()).removeprefix(PROMPT)


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def reload(server, **options) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/datastore/reload", timeout=60, **options)


def test_a_request_that_runs_keeps_its_generation_and_the_next_has_the_newest(store) -> None:
    service = make_service(store)
    before = Datastore.open(store)
    after = grow(store, service.lm)  # not served yet
    turns = Paced(service)
    with running(service) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, server, max_tokens=8)
        until(lambda: turns.is_due)
        turns.allow(3)
        until(lambda: turns.is_due and service.thread.running == 1)
        answer = reload(server)
        assert answer.json() == {
            "object": "datastore",
            "id": NAME,
            "generations": [after.manifest.generation],
            "keys": after.count,
        }
        second = pool.submit(post, server, max_tokens=8)
        until(lambda: service.thread.waiting == 1)
        turns.allow(2)  # a step, and the reading of the second
        until(lambda: turns.is_due and service.thread.running == 2)  # both are in one batch
        turns.allow(1000)
        found = text(first.result()), text(second.result())
    assert after.count > before.count
    assert found == (greedy(before, service.lm, 8), greedy(after, service.lm, 8)) and found[0] != found[1]


def test_k_citations_and_the_guard_are_those_of_the_newest(store) -> None:
    service = make_service(store, neighbors=10_000)
    with running(service) as server:
        before, knn = Datastore.open(store), {"citations": True, "lambda": 0.9}
        told = post(server, max_tokens=4, knn={"k": before.count + 1})
        assert told.status_code == 400 and f"at most {before.count}" in told.text
        after = grow(store, service.lm)
        assert reload(server).status_code == 200
        cited = post(server, max_tokens=4, knn={"k": before.count + 1, **knn}).json()["choices"][0]["citations"]
        assert "more.jsonl" in {one["document"] for one in cited["documents"]}
        copied, guarded = (text(post(server, max_tokens=6, knn={"k": 64, **more})) for more in ({}, {"max_copy": 2}))
    model = KNNLM.from_store(after, LAYER, 64, TEMPERATURE, LAMBDA, lm=service.lm)
    ids = torch.tensor([service.lm.encode(PROMPT).tolist()])
    guard = GuardProcessor(model.copy_guard(2), ids.shape[1])
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, logits_processor=[guard])
    assert guarded == service.lm.decode(found[0].tolist()).removeprefix(PROMPT)
    assert guarded != copied == greedy(after, service.lm, 6)


def damage(store: Path) -> None:
    manifest = store / "datastore.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])


def check_refusal(answer: httpx.Response, status: int, code: str, words: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert re.search(words, error["message"]) and "\n" not in error["message"]
    assert error["message"].endswith("goes on being served")


def test_a_damaged_datastore_leaves_the_old_one_serving(store) -> None:
    service = make_service(store)
    with running(service) as server:
        first = text(post(server, max_tokens=6))
        grow(store, service.lm)
        whole = (store / "datastore.json").read_bytes()
        damage(store)
        check_refusal(
            reload(server), 503, "datastore_unreadable", r"datastore.json .*; generation \d+ with [\d,]+ keys"
        )
        assert text(post(server, max_tokens=6)) == first
        shutil.move(store, store.with_name("away"))
        check_refusal(reload(server), 503, "datastore_unreadable", "is not a datastore")
        shutil.move(store.with_name("away"), store)
        (store / "datastore.json").write_bytes(whole)
        assert reload(server).status_code == 200
        assert text(post(server, max_tokens=6)) != first


@pytest.mark.parametrize("problem", ["layer", "model", "neither"])
def test_what_does_not_fit_is_refused(store, problem, gpt2_folder, tmp_path) -> None:
    service = make_service(store)
    if problem == "layer":
        service._generations._newest = lambda: newest(store, "1.ffn_input")
        words = "its layer is 1.ffn_input by now, but 2.ffn_input is served"
    elif problem == "neither":
        service._generations._newest = None
        words = "start it anew"
    else:
        fingerprint = {**service.lm.fingerprint, "weights": "0" * 64}
        service._generations._lm = SimpleNamespace(fingerprint=fingerprint)
        words = "was made with another model"
    with running(service) as server:
        check_refusal(reload(server), 409, "datastore_mismatch", words)
        assert post(server, max_tokens=1).status_code == 200


def test_reload_needs_the_key_and_is_described(store) -> None:
    with running(make_service(store), api_key="s3cret") as server:
        assert reload(server).status_code == 401
        assert reload(server, headers={"authorization": "Bearer s3cret"}).status_code == 200
        assert reload(server, headers={"authorization": "Bearer s3cret"}, content=b"anything").status_code == 200
        described = httpx.get(f"{server.url}/openapi.json").json()["paths"]["/v1/datastore/reload"]["post"]
        assert (
            "newest generation" in described["description"] and {"200", "4XX", "5XX"} <= described["responses"].keys()
        )
        counted = 'path="/v1/datastore/reload",status="200"} 2'
        assert counted in httpx.get(f"{server.url}/metrics").text


def test_several_datastores_with_lambda_by_text_keep_their_generations(store, tmp_path) -> None:
    """One of two grows: what runs with the older pair and what comes with the newer are in one batch."""
    other = Path(shutil.copytree(store, tmp_path / "other"))
    gate = Gate(offset=1.0, distance=-0.02, different=-0.1)

    def opened(*stores: Datastore | Path) -> Retrieval:
        found = open_retrieval(open_datastores(stores, [1, 0.5]), LAYER, K, TEMPERATURE, LAMBDA)
        return replace(found, setting=replace(found.setting, gate=gate, by_text=True))

    lm = make_service(store).lm
    knnlm.remove(other, [(Datastore.open(other).sources[0], 2)])
    before = opened(Datastore.open(store), Datastore.open(other))
    service = Service(NAME, lm, KNNLM.from_retrieval(lm, before), newest=lambda: opened(store, other))
    after = opened(store, grow(other, lm))
    turns, asked = Paced(service), {"prompt": f"{PROMPT} zero zero", "max_tokens": 8, "logprobs": 0}
    with running(service) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, server, **asked)
        turns.allow(3)
        until(lambda: turns.is_due and service.thread.running == 1)
        told = reload(server).json()
        assert told["generations"] == list(one.manifest.generation for one in after.searcher.store.stores)
        second = pool.submit(post, server, **asked)
        until(lambda: service.thread.waiting == 1)
        turns.allow(1000)
        answers = [one.result().json()["choices"][0] for one in (first, second)]
    for answer, retrieval in zip(answers, (before, after), strict=True):
        model = KNNLM.from_retrieval(lm, retrieval)
        prompt, new = (lm.encode(one).tolist() for one in (asked["prompt"], asked["prompt"] + answer["text"]))
        log_probs = model(torch.tensor([new[:-1]])).logits[0, len(prompt) - 1 :]
        due = log_probs.gather(1, torch.tensor(new[len(prompt) :])[:, None])[:, 0]
        assert torch.equal(log_probs.argmax(dim=1), torch.tensor(new[len(prompt) :]))
        assert answer["logprobs"]["token_logprobs"] == pytest.approx(due.tolist(), abs=1e-4)
    assert answers[0]["text"] != answers[1]["text"]


def test_a_bound_of_memory_counts_text_and_refuses_a_reload_for_which_it_leaves_no_room(store, monkeypatch) -> None:
    used = [10**9]
    monkeypatch.setattr(memory, "own_bytes", lambda: used[0])
    lm, opened = make_service(store).lm, Datastore.open(store)
    model = KNNLM.from_store(opened, LAYER, K, TEMPERATURE, LAMBDA, lm=lm)
    text_bytes = 16 * (opened.count + 2 * len(opened.documents) + 1)
    room = memory.LEAST_WORK + memory.pass_bytes(lm.dims["final_norm"], BATCH_TOKENS) + text_bytes
    with pytest.raises(InputError, match=r"`memory` is 1\.\d GB"):
        Service(NAME, lm, model, memory=used[0] + room - 1)
    service = Service(NAME, lm, model, newest=lambda: newest(store), memory=used[0] + room)
    assert service.explainer() is service.explainer()
    assert service.explainer().retrieval("1.ffn_input").searcher.index.work_bytes == memory.LEAST_WORK
    first = service.retrieval
    assert service.explainer().memory is model.citer.memory(first.searcher.store)  # not held twice
    used[0] += 1
    with pytest.raises(Refusal, match=r"give 1\.\dGB or more; generation \d+ .* goes on being served") as found:
        service.reload()
    assert found.value.status == 409 and service.retrieval is first
    used[0] -= 1
    old = weakref.ref(service.explainer())
    service.reload()
    gc.collect()
    assert service.retrieval is not first and old() is None


def test_the_generation_that_a_command_began_with_is_let_go_once_another_answers(store, call, monkeypatch) -> None:
    first = []

    def ask(app, service, *_) -> None:
        first.append(weakref.ref(service.retrieval.searcher.store))
        assert first[0]() is not None
        grow(store, service.lm)
        service.reload()
        service.thread._model.prefill([[1]], [service.retrieval])
        gc.collect()
        first.append(first[0]())

    monkeypatch.setattr(run, "serve", ask)
    setting = ("--layer", LAYER, "--k", K, "--temperature", TEMPERATURE, "--lambda", LAMBDA)
    assert call("serve", store, "--port", 0, *setting).status == 0
    assert first[1] is None


# The explorer


@contextmanager
def explored(store: Path):
    service = make_service(store)
    with running(service, routers=[explorer_router(service.explainer, service.thread.run)]) as server:
        yield service, server


def test_explorer_explains_the_newest_and_refuses_numbers_of_another(store) -> None:
    with explored(store) as (service, server):

        def ask(path: str, **body) -> httpx.Response:
            return httpx.post(f"{server.url}/explorer/{path}", json=body, timeout=60)

        def keys() -> int:
            return httpx.get(f"{server.url}/explorer/store", timeout=60).json()["keys"]

        before = Datastore.open(store).count
        told = ask("explain", text=PROMPT).json()
        rows, tokens = told["tokens"][1]["evidence"]["rows"][:2], [one["token"] for one in told["tokens"]]
        knows = {"generation": told["generation"]}
        assert keys() == before and ask("sources", rows=rows, **knows).status_code == 200
        after = grow(store, service.lm)
        assert keys() == before
        assert reload(server).status_code == 200
        assert keys() == after.count
        again = ask("explain", text=PROMPT).json()
        assert again["generation"] != told["generation"]
        assert max(again["tokens"][-1]["evidence"]["rows"]) >= before
        going = {"tokens": tokens, "k": 4, "temperature": 1.0, "lambda": 0.5, "max_new_tokens": 2}
        for path, body in (
            ("sources", {"rows": rows}),
            ("explain", {"tokens": tokens}),
            ("overlaps", {"tokens": tokens}),
            ("continue", going),
        ):
            answer = ask(path, **body, **knows)
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "other_generation")
            assert ask(path, **body, generation=again["generation"]).status_code == 200


def test_a_datastore_that_was_built_anew_with_the_same_frame_is_another_generation(store) -> None:
    ours = Datastore.open(store).manifest
    other = replace(ours, parts=tuple(replace(part, checksum="0" * 64) for part in ours.parts))
    stores = [SimpleNamespace(store=SimpleNamespace(stores=[SimpleNamespace(manifest=one)])) for one in (ours, other)]
    assert (other.frame, other.generation) == (ours.frame, ours.generation)
    assert generation(stores[0]) == generation(stores[0]) != generation(stores[1])


# The process


def test_sighup_takes_the_newest_and_says_so(store) -> None:
    process, url = start(store)

    def hang_up() -> str:
        process.send_signal(signal.SIGHUP)
        return process.stdout.readline()

    with process, httpx.Client(base_url=url, timeout=60) as client:
        body = {"model": store.name, "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
        lm = knnlm.load_model(Datastore.open(store).model)
        assert text(client.post("/v1/completions", json=body)) == greedy(Datastore.open(store), lm, 8)
        after = grow(store, lm)
        assert hang_up() == f"Serving generation {after.manifest.generation} with {after.count:,} keys\n"
        newer = greedy(after, lm, 8)
        assert text(client.post("/v1/completions", json=body)) == newer
        damage(store)
        line = hang_up()
        assert re.fullmatch(r"Not reloaded: .*datastore.json.*; generation \d+ with [\d,]+ keys goes .*\n", line), line
        assert text(client.post("/v1/completions", json=body)) == newer
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which signals wait")
def test_a_hang_up_while_the_model_is_loaded_waits_for_the_server(store) -> None:
    process = subprocess.Popen(command(store), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        until(lambda: signal.SIGHUP in blocked(process.pid))
        process.send_signal(signal.SIGHUP)
        assert [process.stdout.readline().split()[0:2] for _ in range(2)] == [
            ["Serving", "store"],
            ["Serving", "generation"],
        ]
        process.terminate()
        assert (process.wait(60), process.stderr.read()) == (0, "")


def blocked(process: int) -> set[int]:
    """The signals that wait before the main thread of a process."""
    (mask,) = re.findall(r"SigBlk:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    return {number for number in range(1, 65) if int(mask, 16) >> (number - 1) & 1}


def test_reloads_that_come_during_one_are_refused_and_keep_no_thread(store) -> None:
    service, opened, go = make_service(store), [], Event()
    own = service._generations._newest
    service._generations._newest = lambda: (opened.append(1), go.wait(60), own())[-1]
    with running(service) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(reload, server)
        try:
            until(lambda: opened == [1])
            for _ in range(50):  # more than there are threads
                answer = reload(server)
                assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
            assert answer.json()["error"]["code"] == "reload_under_way"
            assert post(server, max_tokens=1).status_code == 200
        finally:
            go.set()
        assert first.result().status_code == reload(server).status_code == 200
    assert opened == [1, 1]


def test_a_web_page_cannot_reload(store) -> None:
    """A browser sends such a POST from any page without asking; others need a content type that it asks for."""
    service = make_service(store)
    with running(service) as server:
        served = service.retrieval
        answer = reload(server, headers={"origin": "http://evil.example"})
        assert answer.status_code == 403 and "a web page" in answer.json()["error"]["message"]
        assert service.retrieval is served
        body = b'{"model": "tiny", "prompt": "a"}'
        sent = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "text/plain"})
        assert sent.status_code == 400


def test_an_index_that_faiss_refuses_and_files_that_the_system_refuses_leave_the_old_one(store, monkeypatch) -> None:
    service = make_service(store)
    with running(service) as server:
        for error, words in (
            (FaissFailed("FAISS has not enough memory for this index"), "not enough memory"),
            (OSError(24, "Too many open files", "keys"), "Too many open files"),
        ):
            monkeypatch.setattr("knnlm.knn.searcher.open_layer_index", fail_with(error))
            check_refusal(reload(server), 503, "datastore_unreadable", words)
            assert post(server, max_tokens=1).status_code == 200
        monkeypatch.undo()
        assert reload(server).status_code == 200


def fail_with(error: Exception):
    def fail(*_):
        raise error

    return fail


def test_python_is_told_the_reason_too(store) -> None:
    service = make_service(store)
    service._generations._newest = lambda: open_retrieval(Datastore.open(store / "nothing"), LAYER)
    with pytest.raises(Refusal, match="is not a datastore"):
        service.reload()

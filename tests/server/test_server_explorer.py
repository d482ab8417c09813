"""The explorer's calls in the server's queue: they wait, end and fail as completions do."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Semaphore
from types import SimpleNamespace

import httpx
import pytest

from knnlm.inference.continuing import Continuing
from knnlm.inference.explain import Explainer
from knnlm.knn.retrieval import open_retrieval
from knnlm.server import waiting
from knnlm.server.explorer.routes import explorer_router
from knnlm.store.datastore import Datastore
from tests.server.test_server_limits import open_socket, post
from tests.server_process import LAMBDA, LAYER, TEMPERATURE, K, Paced, Running, make_service, running, until

ON = {"tokens": [5, 6], "k": 40, "temperature": 9.0, "lambda": 0.35}


@contextmanager
def paced(store: Path, **limits):
    """A server with the explorer that computes only what of completions it is allowed to."""
    service = make_service(store, **limits)
    turns = Paced(service)
    explainer = Explainer(service.lm, open_retrieval(Datastore.open(store), LAYER, K, TEMPERATURE, LAMBDA))
    page = explorer_router(lambda: explainer, service.thread.run, service.limits.seconds)
    with running(service, routers=[page]) as server, ThreadPoolExecutor(8) as pool:
        try:
            yield server, turns, pool
        finally:
            turns.allow(10_000)


def go_on(server: Running, tokens: int) -> list[dict]:
    """The events of a continuation, even if the connection is torn off behind them."""
    found = []
    body = {**ON, "max_new_tokens": tokens}
    with httpx.stream("POST", f"{server.url}/explorer/continue", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        with suppress(httpx.RemoteProtocolError):
            for line in answer.iter_lines():
                found += [json.loads(line.removeprefix("data: "))] if line else []
    return found


def change_steps(monkeypatch, before) -> None:
    """Let something happen before each step of a continuation."""
    step = Continuing.step
    monkeypatch.setattr(Continuing, "step", lambda self: (before(), step(self))[1])


def test_calls_of_clients_that_go_away_leave_the_queue(store_folder) -> None:
    with paced(store_folder, queue=4) as (server, turns, pool):
        runs = pool.submit(post, server, max_tokens=1)
        until(lambda: turns.is_due)
        calls = [
            open_socket(server, "/explorer/store"),
            open_socket(server, "/explorer/explain", {"text": "the nurse"}),
            open_socket(server, "/explorer/sources", {"rows": [1]}),
            open_socket(server, "/explorer/continue", ON),
        ]
        until(lambda: server.service.thread.waiting == 4)
        answer = httpx.get(f"{server.url}/explorer/store")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        for call in calls:
            call.close()
        until(lambda: server.service.thread.waiting == 0)  # although nothing is computed
        until(lambda: server.service.active == 1)
        turns.allow(1)
        assert runs.result().status_code == 200


def test_time_of_a_call_is_limited(store_folder) -> None:
    with paced(store_folder, seconds=0.5) as (server, turns, pool):
        runs = pool.submit(post, server, max_tokens=1)
        until(lambda: turns.is_due)
        answer = httpx.post(f"{server.url}/explorer/explain", json={"text": "the nurse"}, timeout=60)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (408, "false")
        assert answer.json()["error"]["code"] == "timeout" and "0.5 seconds" in answer.json()["error"]["message"]
        assert server.service.thread.waiting == 0
        assert runs.result().status_code == 408


def test_time_of_a_continuation_is_limited(store_folder, monkeypatch) -> None:
    """By a clock that jumps in the second step, and not before, however slow the machine is."""
    now, begun, go = [1000.0], [], Event()

    def before() -> None:
        begun.append(1)
        if len(begun) == 2:
            now[0] += 99.9
        if len(begun) > 2:
            go.wait(60)

    change_steps(monkeypatch, before)
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with paced(store_folder, seconds=100) as (server, _, _):
        try:
            *told, last = go_on(server, 100)
        finally:
            go.set()  # for the one that runs
        assert last["error"]["code"] == "timeout" and len(told) == 2


def test_a_continuation_that_was_let_in_goes_on_although_the_queue_is_full(store_folder, monkeypatch) -> None:
    steps, begun = Semaphore(1), []
    change_steps(monkeypatch, lambda: (begun.append(1), steps.acquire(timeout=60)))
    with paced(store_folder, batch=1, queue=1) as (server, turns, pool):
        thread = server.service.thread
        runs = pool.submit(post, server, max_tokens=20)
        turns.allow(1)
        until(lambda: thread.running == 1)
        continues = pool.submit(go_on, server, 5)
        for count in (1, 2):
            until(lambda: thread.waiting == 1)
            turns.allow(1)
            until(lambda count=count: len(begun) == count)
        waits = pool.submit(post, server, max_tokens=1)
        until(lambda: thread.waiting == 1)
        steps.release(9)
        until(lambda: thread.waiting == 2)  # the next step too
        turns.allow(100)
        assert [event.get("finish_reason", event) for event in continues.result()] == [None] * 4 + ["length"]
        assert (runs.result().status_code, waits.result().status_code) == (200, 200)


def test_a_step_that_fails_is_told_in_the_last_event(store_folder, monkeypatch) -> None:
    due = [None, None]
    change_steps(monkeypatch, due.pop)
    with paced(store_folder) as (server, _, _):
        *told, last = go_on(server, 9)
        assert len(told) == 2 and last["error"]["code"] == "internal_error" and "pop" not in last["error"]["message"]
        assert httpx.get(f"{server.url}/explorer/store").status_code == 200


@pytest.mark.parametrize("path", ["explain", "continue"])
def test_a_call_that_fails_is_counted_as_it_is_answered(path, store_folder, monkeypatch) -> None:
    monkeypatch.setattr("knnlm.server.explorer.routes._layer", lambda *_: 1 // 0)
    with paced(store_folder) as (server, _, _):
        body = ON if path == "continue" else {"text": "the nurse"}
        answer = httpx.post(f"{server.url}/explorer/{path}", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert '{path="other",status="500"} 1\n' in httpx.get(f"{server.url}/metrics").text


def test_a_layer_whose_index_is_damaged_names_the_file(store_folder, tmp_path) -> None:
    copy = shutil.copytree(store_folder, tmp_path / "store")
    (indexed,) = (path.name for path in (copy / "index").iterdir())
    other = next(layer for layer in Datastore.open(copy).layers if layer != indexed)
    (copy / "index" / indexed / "index.json").write_text("{}")
    service = make_service(store_folder)
    explainer = Explainer(service.lm, open_retrieval(Datastore.open(copy), other, K, TEMPERATURE, LAMBDA))
    with running(service, routers=[explorer_router(lambda: explainer, service.thread.run)]) as server:
        body = {"text": "the nurse", "layer": other}
        assert httpx.post(f"{server.url}/explorer/explain", json=body).status_code == 200
        told = httpx.post(f"{server.url}/explorer/explain", json=body | {"layer": indexed})
        assert told.status_code == 500 and "index.json" in told.json()["error"]["message"]

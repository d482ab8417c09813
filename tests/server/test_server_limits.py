"""What a server does when it is asked too much, when clients go away, when something fails, and when it has to end."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn

from knnlm.errors import InputError
from knnlm.inference import batch
from knnlm.inference.batch import RunningBatch
from knnlm.server import run
from knnlm.server.app import create_app
from knnlm.server.gate import is_loopback
from knnlm.server.limits import Limits
from tests.damage import flip_bit
from tests.server_process import LAMBDA, LAYER, NAME, TEMPERATURE, K, Paced, Running, make_service, running, until
from tests.source_files import ROOT

PROMPT = "the nurse counts"


@contextmanager
def paced(store: Path, **limits):
    """A server that computes only what it is allowed to, and threads to ask it from."""
    service = make_service(store, **limits)
    turns = Paced(service)
    with running(service) as server, ThreadPoolExecutor(8) as pool:
        try:
            yield server, turns, pool
        finally:
            turns.allow(10_000)


def post(server: Running, **options) -> httpx.Response:
    body = {"model": NAME, "prompt": PROMPT, "temperature": 0, **options}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def open_socket(server: Running, path: str, body: dict | None = None) -> socket.socket:
    """A client that has sent a whole request, GET without a body, and reads nothing."""
    request = httpx.Request("POST" if body else "GET", server.url + path, json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    connection = socket.create_connection((request.url.host, request.url.port))
    connection.sendall(f"{request.method} {path} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
    return connection


def complete(server: Running, **options) -> socket.socket:
    """As `open_socket`, for a completion."""
    return open_socket(server, "/v1/completions", {"model": NAME, "prompt": PROMPT, **options})


def test_a_full_queue_is_told_at_once(store_folder, monkeypatch) -> None:
    with paced(store_folder, batch=1, queue=2) as (server, turns, pool):
        thread = server.service.thread
        first = pool.submit(post, server, max_tokens=2)
        until(lambda: turns.is_due)
        waiting = [pool.submit(post, server, max_tokens=2) for _ in range(2)]
        until(lambda: thread.waiting == 2)
        monkeypatch.setattr(server.service, "_encode", fail)  # before any text becomes tokens
        answer = post(server)
        monkeypatch.undo()
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "queue_full"
        assert "\nknnlm_choices_waiting 2" in httpx.get(f"{server.url}/metrics").text
        turns.allow(6)
        assert [one.result().status_code for one in (first, *waiting)] == [200] * 3
        turns.allow(100)
        with server.client(max_retries=2) as client:  # whose own retries heed Retry-After
            assert client.completions.create(model=NAME, prompt=PROMPT, max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(stream, store_folder) -> None:
    with paced(store_folder, batch=1, queue=1) as (server, turns, pool):
        thread = server.service.thread
        runs = complete(server, max_tokens=100, stream=stream)
        turns.allow(3)
        until(lambda: thread.running == 1)
        waits = complete(server, max_tokens=100, stream=stream)
        until(lambda: thread.waiting == 1)
        waits.close()
        until(lambda: thread.waiting == 0)  # although nothing is computed
        runs.close()
        until(lambda: server.service.active == 0)
        later = pool.submit(post, server, max_tokens=2)
        turns.allow(3)  # of the one that is gone, at most one step
        assert later.result().status_code == 200
        until(lambda: thread.running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_time_is_limited(stream, store_folder) -> None:
    with paced(store_folder, seconds=0.5) as (server, turns, _):
        turns.allow(2)
        with server.client(max_retries=5) as client, pytest.raises(openai.APIError) as found:
            list(client.completions.create(model=NAME, prompt=PROMPT, max_tokens=99, stream=stream))
        assert found.value.code == "timeout" and "longer than the 0.5 seconds" in found.value.message
        turns.allow(1)
        until(lambda: server.service.thread.running == 0)
        counted = server.service.metrics._values[REQUESTS, '{path="/v1/completions",status="408"}']
        assert counted == (0 if stream else 1)  # once: the client does not ask again


REQUESTS = "knnlm_requests_total"


def test_time_for_tokens_of_a_prompt_is_limited(store_folder, monkeypatch) -> None:
    with running(make_service(store_folder, seconds=0.2)) as server:
        monkeypatch.setattr(server.service, "_encode", lambda *_: time.sleep(1))
        assert post(server).status_code == 408


@pytest.mark.parametrize("options", [{"prompt": [[5] * 40] * 3}, {"prompt": [5] * 51, "n": 2}])
def test_scored_tokens_of_all_prompts_are_limited(options, store_folder) -> None:
    with running(make_service(store_folder, scored_tokens=100)) as server:
        for told in ({"echo": True}, {"logprobs": 1}):
            assert post(server, max_tokens=1, **options, **told).status_code == 200
        answer = post(server, max_tokens=1, echo=True, logprobs=0, **options)
        assert answer.status_code == 400 and "but at most 100 are told; send fewer" in answer.json()["error"]["message"]
        assert post(server, max_tokens=1, prompt=[5] * 50, n=2, echo=True, logprobs=0).status_code == 200


def test_a_body_is_limited_and_must_come_in_time(store_folder) -> None:
    with running(make_service(store_folder, body_bytes=1000, seconds=2)) as server:
        assert post(server, prompt="a" * 900).status_code == 400  # read, but too long for the model
        for headers in ({}, {"transfer-encoding": "chunked"}):
            answer = post_parts(server, [b"[" + b" " * 600] * 4, headers)
            assert "413" in answer.splitlines()[0] and '"the body is longer than 1000 bytes"' in answer
        slow = post_parts(server, [b"["], {"content-length": "10"})
        assert "408" in slow.splitlines()[0] and '"code": "timeout"' in slow


def test_headers_must_come_in_time(store_folder) -> None:
    with running(make_service(store_folder, seconds=1)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        whole = f"GET /healthz HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()
        for first in (b"", whole):  # on a new connection, and on one that was answered before
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(first)
                if first:
                    assert connection.recv(65536).startswith(b"HTTP/1.1 200")
                begun = time.monotonic()
                connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: ")
                while connection.recv(65536):
                    pass
                assert 0.5 < time.monotonic() - begun < 10
        assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_an_answer_may_take_longer_than_headers(store_folder) -> None:
    with paced(store_folder, seconds=1) as (server, turns, pool):
        server.service.limits = Limits()  # of answers; connections keep theirs
        request = pool.submit(post, server, max_tokens=1)
        until(lambda: turns.is_due)
        time.sleep(1.5)
        turns.allow(1)
        assert request.result().status_code == 200


def test_an_end_does_not_wait_for_a_body_that_never_comes(store_folder) -> None:
    process, url = start(store_folder)
    host, port = url.removeprefix("http://").split(":")
    with process, socket.create_connection((host, int(port)), timeout=60) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 10\r\nexpect: 100-continue\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 100")  # the body is waited for
        connection.sendall(b"{")
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # head and body may come one after the other
        assert answer.startswith(b"HTTP/1.1 503") and b'"code": "shutting_down"' in answer
        assert process.wait(60) == 0
        assert time.monotonic() - begun < 20  # 120 seconds are the limit of a body
        assert process.stderr.read() == ""


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_case_of_the_scheme_does_not_matter(scheme, store_folder) -> None:
    with running(make_service(store_folder), api_key="s3cret") as server:

        def status(given: str) -> int:
            return httpx.get(f"{server.url}/v1/models", headers={"authorization": given}).status_code

        assert status(f"{scheme} s3cret") == 200
        assert {status(f"{scheme} s3cre"), status("Basic s3cret"), status("s3cret"), status(scheme)} == {401}


def post_parts(server: Running, parts: list[bytes], headers: dict[str, str]) -> str:
    """Send a body in parts that need not be what the head says, and read what comes."""
    host, port = server.url.removeprefix("http://").split(":")
    given = {"host": host, "content-length": str(sum(map(len, parts))), "connection": "close"} | headers
    if "transfer-encoding" in headers:
        del given["content-length"]
        parts = [f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts]
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + b"".join(parts))
        received = b""
        while part := connection.recv(65536):
            received += part
    return received.decode()


# The thread of the model


def test_a_call_runs_on_the_models_thread_between_two_steps(store_folder) -> None:
    with paced(store_folder, queue=1) as (server, turns, pool):
        thread = server.service.thread
        request = pool.submit(post, server, max_tokens=3)
        turns.allow(1)
        until(lambda: thread.running == 1)
        call = pool.submit(asyncio.run, thread.run(lambda: (threading.current_thread().name, thread.running)))
        until(lambda: thread.waiting == 1)
        assert post(server).status_code == 429  # it counts
        turns.allow(1)
        assert call.result() == ("knnlm-model", 1)
        turns.allow(1)
        assert request.result().status_code == 200
        failing = pool.submit(asyncio.run, thread.run(lambda: 1 // 0))
        with pytest.raises(ZeroDivisionError):
            failing.result()
        assert asyncio.run(thread.run(lambda: 7)) == 7


def test_a_call_that_nobody_waits_for_is_not_made(store_folder) -> None:
    with paced(store_folder) as (server, turns, pool):
        thread, made = server.service.thread, []
        request = pool.submit(post, server, max_tokens=1)
        until(lambda: turns.is_due)

        async def give_up() -> None:
            await asyncio.wait_for(thread.run(lambda: made.append(1)), 0.05)

        with pytest.raises(TimeoutError):
            asyncio.run(give_up())
        turns.allow(1)
        assert request.result().status_code == 200
        asyncio.run(thread.run(lambda: None))
        assert made == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_told_and_the_server_lives(stream, store_folder) -> None:
    service = make_service(store_folder)
    run, service.thread._model.run = service.thread._model.run, fail
    with running(service) as server, server.client() as client:
        with pytest.raises(openai.APIError) as found:
            list(client.completions.create(model=NAME, prompt=PROMPT, max_tokens=99, stream=stream))
        assert found.value.code == "internal_error" and "out of memory" not in found.value.message
        until(lambda: service.active == 0)
        assert service.metrics._values[REQUESTS, '{path="/v1/completions",status="499"}'] == 0
        assert service.metrics._values[REQUESTS, '{path="/v1/completions",status="500"}'] == (0 if stream else 1)
        service.thread._model.run = run
        assert client.completions.create(model=NAME, prompt=PROMPT, max_tokens=3).usage.completion_tokens == 3


def fail(*_):
    raise RuntimeError("out of memory")


def test_prompts_that_cannot_be_read_do_not_end_what_runs(store_folder) -> None:
    with paced(store_folder) as (server, turns, pool):
        thread = server.service.thread
        model, run = thread._model, thread._model.run

        def run_short(start, text, *others):
            return fail() if text[0].shape[1] - start > 40 else run(start, text, *others)

        model.run = run_short
        runs = pool.submit(post, server, max_tokens=6)
        turns.allow(2)
        until(lambda: thread.running == 1)
        fails = pool.submit(post, server, prompt=[5] * 50, max_tokens=3)
        until(lambda: thread.waiting == 1)
        turns.allow(10)
        assert (fails.result().status_code, runs.result().status_code) == (500, 200)
        assert runs.result().json()["usage"]["completion_tokens"] == 6
        assert post(server, max_tokens=2).status_code == 200


def test_a_failure_while_choices_join_is_told_to_all(store_folder, monkeypatch) -> None:
    with paced(store_folder) as (server, turns, pool):
        thread = server.service.thread
        first = pool.submit(post, server, max_tokens=6)
        turns.allow(2)
        until(lambda: thread.running == 1)
        monkeypatch.setattr(RunningBatch, "join", fail)
        second = pool.submit(post, server, max_tokens=6)
        until(lambda: thread.waiting == 1)
        turns.allow(10)
        assert (first.result().status_code, second.result().status_code) == (500, 500)
        assert post(server, max_tokens=2).status_code == 200


def test_a_prompt_that_nobody_waits_for_is_not_scored_to_its_end(store_folder, monkeypatch) -> None:
    monkeypatch.setattr(batch, "_PROMPT_SCORES", 1)  # one position at a time
    with paced(store_folder) as (server, turns, pool):
        runs = complete(server, prompt=[5] * 100, max_tokens=0, echo=True, logprobs=0)
        turns.allow(3)
        until(lambda: turns.is_due)
        runs.close()
        until(lambda: server.service.active == 0)
        later = pool.submit(post, server, max_tokens=1)
        turns.allow(2)  # not 96 more
        assert later.result().status_code == 200


# The end


def test_what_runs_is_finished_and_new_requests_are_told(store_folder) -> None:
    with paced(store_folder) as (server, turns, pool):
        request = pool.submit(post, server, max_tokens=4)
        until(lambda: turns.is_due)
        server.service.closing = True
        for path in ("/healthz", "/v1/models"):
            answer = httpx.get(server.url + path)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.json()["error"] == {
                "message": "the server is shutting down",
                "type": "server_error",
                "param": None,
                "code": "shutting_down",
            }
        turns.allow(4)
        assert request.result().json()["usage"]["completion_tokens"] == 4


def command(store: Path, *options: object) -> list[str]:
    setting = ("--layer", LAYER, "--k", K, "--temperature", TEMPERATURE, "--lambda", LAMBDA)
    return [sys.executable, "-m", "knnlm", "serve", str(store), "--port", "0", *map(str, (*setting, *options))]


def start(store: Path, *options: object) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        command(store, *options), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    address = re.fullmatch(r"Serving (\S+) at (http://\S+) \(Ctrl-C ends it\)\n", line)
    assert address, line + process.stderr.read()
    assert address[1] == store.name
    return process, address[2]


def test_page_and_completions_are_on_one_server_and_sigterm_finishes_what_runs(store_folder, monkeypatch) -> None:
    monkeypatch.setenv("KNNLM_API_KEY", "s3cret")  # without it, the address is refused
    process, url = start(store_folder, "--host", "0.0.0.0")
    url = url.replace("0.0.0.0", "127.0.0.1")
    with process, openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=0) as client:
        assert httpx.get(f"{url}/v1/models").status_code == 401
        check_page(url, store_folder.name)
        stream = client.completions.create(
            model=store_folder.name, prompt="a", max_tokens=120, n=16, stream=True, temperature=0
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        pieces = list(stream)
        assert sum(piece.choices[0].finish_reason is not None for piece in pieces) == 16
        assert process.wait(120) == 0
        assert process.stdout.read() == process.stderr.read() == ""


def check_page(url: str, store: str) -> None:
    """The explorer is on the same server, with the same key, and tells of the same tokens."""
    key = {"authorization": "Bearer s3cret"}
    with httpx.Client(base_url=url, timeout=120) as client:
        page = client.get("/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert client.get("/explorer/store").status_code == 401
        assert client.get("/explorer/store", headers=key).json()["store"] == store
        body = {"text": "the nurse", "layer": LAYER}
        told = client.post("/explorer/explain", json=body, headers=key).json()
        asked = {"model": store, "prompt": "the nurse", "max_tokens": 0, "echo": True, "logprobs": 0}
        answer = client.post("/v1/completions", json=asked, headers=key).json()
        assert len(told["tokens"]) == len(answer["choices"][0]["logprobs"]["tokens"]) > 1


def test_a_second_signal_ends_at_once(store_folder) -> None:
    process, url = start(store_folder)
    body = {"model": store_folder.name, "prompt": "a", "max_tokens": 120, "n": 16, "stream": True}
    with process, httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
        next(answer.iter_lines())
        process.send_signal(signal.SIGSTOP)  # so that both come before anything is finished
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        assert process.wait(120) == 130
        (line,) = process.stderr.read().splitlines()
        assert line.startswith("knnlm: stopped by Ctrl-C")


def test_a_client_that_does_not_read_is_not_waited_for(store_folder, monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    service = make_service(store_folder, seconds=20)
    server = run._Server(uvicorn.Config(create_app(service)), service, lambda: None, lambda line: None)
    service.active = 1
    assert not asyncio.run(server.on_tick(1))
    server.handle_exit(signal.SIGTERM, None)
    now[0] += 19
    assert not asyncio.run(server.on_tick(1))
    now[0] += 2
    assert asyncio.run(server.on_tick(1)) and not server.force_exit


def test_without_a_key_only_names_of_this_machine_are_answered(store_folder) -> None:
    with running(make_service(store_folder), only_local=True) as server:
        allowed = ("localhost", "LocalHost.:80", "127.0.0.1:80", "[::1]:80")
        for host, status in (*((one, 200) for one in allowed), ("localhost.evil:80", 403), ("evil.example:80", 403)):
            answer = httpx.get(f"{server.url}/v1/models", headers={"host": host})
            assert answer.status_code == status, host
        assert "not to 'evil.example:80'" in answer.json()["error"]["message"]


# The command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "anybody could use the model and read from its text at 0.0.0.0; give --api-key"),
        (("--host", "::"), "anybody could use the model"),
        (("--host", "example.org"), "anybody could use the model"),
        (("--api-key", ""), "the key is empty"),
        (("--api-key", "sécret"), "visible ASCII"),
        (("--port", 99_999_999), "--port is 99999999, but must be from 0 to 65535"),
        (("--host", "192.0.2.1", "--insecure"), "--host 192.0.2.1 with --port 0 cannot be taken"),
        (("--max-batch", 0), "--max-batch is 0, but must be above 0"),
        (("--max-seconds", "nan"), "--max-seconds is nan, but must be above 0"),
        (("--max-seconds", "1e999"), "--max-seconds is inf, but must be above 0 and finite"),
        (("--layer", "0.ffn_input"), "has no keys of layer 0.ffn_input"),
        (("--model", "./nowhere"), "there is no folder ./nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(options, message, call, store_folder) -> None:
    setting = ("--layer", LAYER, "--k", K, "--temperature", TEMPERATURE, "--lambda", LAMBDA)
    refused = call("serve", store_folder, "--port", 0, *setting, *options)
    assert (refused.status, refused.out, len(refused.errors)) == (2, "", 1), refused
    assert message in refused.errors[0]


SETTING = ("--layer", LAYER, "--k", K, "--temperature", TEMPERATURE, "--lambda", LAMBDA)


@pytest.mark.parametrize("name", ["documents.npy", "values.npy", "frame/2.ffn_input.npy"])
def test_damage_is_told_at_the_start(name, call, store_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "serve", fail)
    damaged = Path(shutil.copytree(store_folder, tmp_path / "store"))
    (path,) = damaged.glob(name if "/" in name else f"parts/*/{name}")
    flip_bit(path, random.Random(0))
    refused = call("serve", damaged, "--port", 0, *SETTING, "--lambda", 0)
    assert refused.status == 2 and len(refused.errors) == 1 and name in refused.errors[0]


def test_a_datastore_may_have_any_name(call, store_folder, tmp_path, monkeypatch) -> None:
    served = []
    monkeypatch.setattr(run, "serve", lambda app, service, listener, started, say: served.append(service))
    odd = shutil.copytree(store_folder, os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.knn"))
    assert call("serve", odd, "--port", 0, *SETTING).status == 0
    with running(served[0]) as server, server.client() as client:
        name = client.models.list().data[0].id
        assert name == "caf\\udce9.knn"
        assert client.completions.create(model=name, prompt="a", max_tokens=1).model == name


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(call, tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = call("serve", tmp_path, "--port", port)
    assert refused.status == 2 and f"--port {port} cannot be taken: Address already in use" in refused.errors[0]


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("Localhost.", True), ("0.0.0.0", False), ("::", False)],
)
def test_what_is_loopback(host, inside) -> None:
    assert is_loopback(host) == inside


def test_limits_are_those_of_the_command_line() -> None:
    from knnlm.cli.serve import LimitOptions

    assert LimitOptions().limits() == Limits()
    with pytest.raises(InputError, match="`queue` is 0"):
        Limits(queue=0)


def test_one_line_says_how_to_install_the_server() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; sys.argv = ['knnlm', 'serve', '.']; import knnlm.cli as cli"
    words = [sys.executable, "-c", f"{code}; cli.main()"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "knnlm: serve needs uvicorn, which is not installed; pip install '.[serve]'\n"

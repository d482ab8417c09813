"""Connections of clients that do not keep to HTTP, or do not read what they asked for."""

from __future__ import annotations

import json
import socket
import time

import pytest

from tests import server_process
from tests.server_process import NAME, Running, make_service, running, until


@pytest.fixture(scope="module")
def server(store_folder):
    with running(make_service(store_folder)) as found:
        yield found


def connect(server: Running) -> socket.socket:
    """A connection that holds little of what is sent to it."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect((host, int(port)))
    return connection


def ask(connection: socket.socket, **options) -> None:
    body = json.dumps({"model": NAME, **options}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)


def received(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


LONG = {"prompt": [[5, 6, 7] * 30] * 12, "max_tokens": 0, "echo": True, "logprobs": 20}
"""Over half a megabyte."""
COUNTED = '{path="/v1/completions",status="200"}'


@pytest.fixture
def small_buffers(monkeypatch):
    """The system holds little of what the server sends."""
    listen = server_process.listen

    def listen_with_small_buffers(*address):
        listener = listen(*address)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(server_process, "listen", listen_with_small_buffers)


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_is_not_read_is_dropped(stream, store_folder) -> None:
    with running(make_service(store_folder, seconds=3)) as server, connect(server) as connection:
        counted, key = server.service.metrics._values, ("knnlm_requests_total", COUNTED)
        ask(connection, **LONG, stream=stream)
        until(lambda: counted[key] == 1)
        time.sleep(0 if stream else 6.5)  # a whole answer waits in the connection, at first for the system
        assert server.service.active == 0 and len(received(connection)) < 200_000


@pytest.mark.usefixtures("small_buffers")
def test_an_answer_that_is_read_slowly_comes_whole(store_folder) -> None:
    with running(make_service(store_folder, seconds=3)) as server, connect(server) as connection:
        ask(connection, **LONG)
        size, begun = 0, time.monotonic()
        while part := connection.recv(16384):
            size += len(part)
            time.sleep(0.1 if time.monotonic() - begun < 7 else 0)
        assert size > 500_000 and time.monotonic() - begun > 7


@pytest.mark.parametrize("data", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\r\n\r\n"])
def test_what_is_no_http_is_refused_in_the_same_shape(data, server) -> None:
    with connect(server) as connection:
        connection.sendall(data)
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request") and b"application/json" in head
    assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}

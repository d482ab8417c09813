"""Requests generated from the server's OpenAPI schema, and malformed bytes: none may be answered with 5xx."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from kills import make_store
from tally import Tally
from workshop import Workshop

# Fewer requests than these are raw ones alone: schemathesis takes a minute to begin.
DESCRIBED = 300
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
from serving import started  # noqa: E402 - a script beside these


def campaign(shop: Workshop, count: int, seed: int, tally: Tally) -> None:
    """Send `count` requests, a tenth of them malformed bytes and the rest by schemathesis."""
    make_store(shop)
    if count >= DESCRIBED:
        _described(shop, count, tally)
    rng = random.Random(seed)
    with started(shop.store, []) as server:
        for _ in range(max(10, count // 10)):
            _raw(server.url, rng, tally)
        if httpx.get(f"{server.url}/healthz").status_code != 200:
            tally.fault("raw bytes", "crashes", "the server does not answer any more")


def _described(shop: Workshop, count: int, tally: Tally) -> None:
    words = [sys.executable, str(BENCHMARKS / "fuzz.py"), str(shop.store), "--requests", str(count)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    rounds = [line for line in done.stdout.splitlines() if line.startswith("round ")]
    for status, number in re.findall(r"'(\d{3})': (\d+)", rounds[-1] if rounds else ""):
        tally.count("requests", f"{status[0]}xx", int(number))
        if status[0] == "5":
            tally.fault("requests", "5xx", done.stdout[-3000:])
    if done.returncode:
        tally.fault("requests", "checks that failed", (done.stdout + done.stderr)[-3000:])


def _raw(url: str, rng: random.Random, tally: Tally) -> None:
    """Send bytes that are a request no more, and read what comes until the server or its patience ends."""
    parts = urlsplit(url)
    body = b'{"model": "book.knn", "prompt": "the nurse", "max_tokens": 1}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {parts.hostname}\r\ncontent-type: application/json\r\n"
    whole = head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection((parts.hostname, parts.port), timeout=5) as connection:
        connection.sendall(bytes(_damaged(whole, rng)))
        connection.shutdown(socket.SHUT_WR)
        try:
            answer = connection.recv(65536)
        except (TimeoutError, ConnectionError):
            answer = b""
    status = re.match(rb"HTTP/1\.1 (\d)", answer)
    tally.count("raw bytes", f"{status[1].decode()}xx" if status else "closed")
    if status and status[1] == b"5":
        tally.fault("raw bytes", "5xx", repr(answer[:500]))


def _damaged(data: bytes, rng: random.Random) -> Iterator[int]:
    for byte in data[: rng.choice((len(data), rng.randrange(1, len(data))))]:
        if rng.random() < 0.02:
            yield rng.randrange(256)
        else:
            yield byte

"""Requests per second, latency and memory growth of `knnlm serve` under load from this process.

    python scripts/benchmarks/serving.py STORE --clients 1 4 16 --requests 10000

Further options, such as --device, go to `knnlm serve`. Clients ask one after the other, each as soon as it has its
answer, for a greedy continuation of the same few prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

PROMPTS = ("The borrow checker", "A trait object", "When the compiler reads a crate, it", "Ownership")
ROUND = 1000
"""Requests between two readings of the memory."""


@dataclass(frozen=True)
class Server:
    """A process of `knnlm serve`."""

    url: str
    name: str
    process: int
    seconds: float
    """Seconds from the start of the process to its line that it serves."""

    @property
    def megabytes(self) -> float:
        """Resident memory, of which a part belongs to files that are only mapped."""
        status = Path(f"/proc/{self.process}/status").read_text(encoding="utf-8")
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


@contextmanager
def started(store: str | Path, options: Sequence[str]) -> Iterator[Server]:
    """A server on a free port, which is ended with SIGTERM and must then exit with 0."""
    words = [sys.executable, "-m", "knnlm", "serve", str(store), "--port", "0", *options]
    start = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline() if process.stdout else ""
        found = re.match(r"Serving (\S+) at (\S+) ", line)
        if found is None:
            sys.exit(f"the server did not start: {line}")
        yield Server(found[2], found[1], process.pid, time.perf_counter() - start)
        process.send_signal(signal.SIGTERM)
        if process.wait(150) != 0:
            sys.exit(f"the server ended with {process.returncode}")


async def ask(server: Server, requests: int, clients: int, tokens: int) -> np.ndarray:
    """Seconds of each request, float64 [requests]."""
    seconds: list[float] = []
    numbers = iter(range(requests))

    async def client() -> None:
        async with httpx.AsyncClient(timeout=300) as http:
            for number in numbers:
                body = {"model": server.name, "prompt": PROMPTS[number % len(PROMPTS)]}
                start = time.perf_counter()
                options = {"max_tokens": tokens, "temperature": 0}
                answer = await http.post(f"{server.url}/v1/completions", json=body | options)
                answer.raise_for_status()
                seconds.append(time.perf_counter() - start)

    await asyncio.gather(*(client() for _ in range(clients)))
    return np.array(seconds)


def show_load(server: Server, args: argparse.Namespace) -> None:
    for clients in args.clients:
        asyncio.run(ask(server, 2 * clients, clients, args.tokens))  # warm-up
        start = time.perf_counter()
        seconds = asyncio.run(ask(server, args.each * clients, clients, args.tokens))
        rate = len(seconds) / (time.perf_counter() - start)
        p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
        print(
            f"{clients} clients: {rate:.1f} requests/s, {rate * args.tokens:.0f} tokens/s, "
            f"p50 {p50:.0f} ms, p99 {p99:.0f} ms ({len(seconds)} requests of {args.tokens} tokens)",
            flush=True,
        )


def show_memory(server: Server, args: argparse.Namespace) -> None:
    for done in range(0, args.requests, ROUND):
        print(f"after {done} requests: {server.megabytes:.1f} MB", flush=True)
        asyncio.run(ask(server, min(ROUND, args.requests - done), 16, 2))
    print(f"after {args.requests} requests: {server.megabytes:.1f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 32])
    parser.add_argument("--each", type=int, default=8, help="requests of each client")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer, under load")
    parser.add_argument("--requests", type=int, default=0, help="how many to look at the memory for")
    args, others = parser.parse_known_args()
    with started(args.store, others) as server:
        print(f"serves after {server.seconds:.1f} s, with {server.megabytes:.0f} MB", flush=True)
        show_load(server, args)
        show_memory(server, args)


if __name__ == "__main__":
    main()

"""Fuzzing of the server with valid and invalid requests generated from its OpenAPI schema.

schemathesis sends requests that the schema allows and ones that it does not, and checks statuses, shapes and types of
the responses. In every other round the model's name is filled in and no generation is named, so that more requests
are valid. The server's counts and its memory are shown; any status of 500 or more is a failure.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from serving import Server, started

SETTINGS = """[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 404, 409, 429]
"""
"""Requests that the schema allows may exceed a limit of the server or of its model, or name another generation."""


def described(server: Server, *, named: bool) -> dict[str, Any]:
    """The server's OpenAPI schema, unchanged or with the only valid value of `model` and without `generation`."""
    description: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()
    schemas = description["components"]["schemas"]
    if named:
        for request in ("CompletionRequest", "ChatRequest"):
            schemas[request]["properties"]["model"] = {"const": server.name}
        for schema in schemas.values():
            schema.get("properties", {}).pop("generation", None)
    return description


def fuzz(server: Server, description: dict[str, Any], examples: int, seed: int) -> int:
    """Let schemathesis make about `examples` requests of each operation; return 0 if it finds no failure."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "openapi.json").write_text(json.dumps(description), encoding="utf-8")
        Path(folder, "schemathesis.toml").write_text(SETTINGS, encoding="utf-8")
        words = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", server.url]
        words += ["--max-examples", str(examples), "--seed", str(seed), "--phases", "examples,coverage,fuzzing"]
        words += ["--checks", "all", "--continue-on-failure", "--no-color"]
        return subprocess.run(words, cwd=folder, check=False).returncode


def counted(server: Server) -> Counter[str]:
    """Number of responses by status."""
    text = httpx.get(f"{server.url}/metrics").text
    found: Counter[str] = Counter()
    for status, count in re.findall(r'^knnlm_requests_total{.*status="(\d+)"} (\d+)', text, re.MULTILINE):
        found[status] += int(count)
    return found


def run(server: Server, requests: int) -> int:
    """Fuzz for `requests` requests, with and without the model's name; return the number of failures."""
    failures, seed, examples = 0, 0, max(1, min(1000, requests // 8))
    while seed < 2 or sum(counted(server).values()) < requests:
        failures += fuzz(server, described(server, named=seed % 2 == 1), examples, seed) != 0
        print(f"round {seed}: {dict(sorted(counted(server).items()))}, {server.megabytes:.0f} MB", flush=True)
        seed += 1
    return failures + sum(count for status, count in counted(server).items() if status >= "500")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--requests", type=int, default=10_000)
    args, others = parser.parse_known_args(arguments)
    with started(args.store, others) as server:
        failures = run(server, args.requests)
    sys.exit(f"{failures} failures" if failures else 0)


if __name__ == "__main__":
    main()

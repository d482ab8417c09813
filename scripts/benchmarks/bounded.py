"""What `--memory` bounds: peaks of the process's own memory (RssAnon) while an index is built, and in eval and serve.

    .venv/bin/python scripts/benchmarks/bounded.py FOLDER --keys 5000000 --memory 1.5GB

The datastore is the demo model's: keys of the text, and beyond their number these again with noise (`repeats`), in
parts of a million. Each step but the first runs twice, without the bound (`index` in a copy of linked files) and with
it; the peak is that of a fresh process, looked at 50 times a second from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from extraction import documents
from repeats import repeated

from knnlm.config import KNNConfig, Settings, TextConfig
from knnlm.extraction.collect import collect
from knnlm.knn.indexing import index_layer
from knnlm.layer_names import select_layers
from knnlm.memory import parse_size
from knnlm.model.loading import load_model
from knnlm.store.datastore import Datastore
from knnlm.store.writer import DatastoreWriter
from knnlm.text.windows import window_config

DEMO = Path(__file__).parent.parent / "demo_data"
LAYER, PART, SPEC = "-1.ffn_input", 1 << 20, "IVF4096,PQ96x4fs"
FITTED = {"k": 1024, "lambda": 0.25, "temperature": 1.0, "gate": None}


def make_store(folder: Path, count: int) -> None:
    """Keys of the demo's text, repeated with noise; not indexed."""
    lm = load_model(str(DEMO / "model"), dtype="float32")
    (layer,) = select_layers(LAYER, lm.layer_names)
    config = window_config(TextConfig(), lm.name, lm.context_limit)
    about: dict[str, Any] = {"fingerprint": lm.fingerprint, "context": config.context, "stride": config.stride}
    own = folder.with_name(f"{folder.name}-own")
    for place in (own, folder):
        place.mkdir()
    with DatastoreWriter(own, {layer: lm.dims[layer]}, **about) as writer:
        collect(lm, documents(lm, [DEMO / "rust-book.jsonl"], 60_000), config, [layer], writer=writer)
        writer.finish()
    source = Datastore.open(own)
    keys, values = source.keys(layer), source.values
    own_ND = keys.read(0, source.count) + keys.centre
    with DatastoreWriter(folder, {layer: lm.dims[layer]}, part_rows=PART, **about) as writer:
        for number, (start, rows_ND) in enumerate(repeated(own_ND, count)):
            writer.begin_document(0, "repeated", number)
            writer.append_keys(layer, rows_ND)
            writer.append_values(values[np.arange(start, start + len(rows_ND)) % len(values)])
        writer.finish(fitted={layer: FITTED | {"k": min(1024, count)}})


def build_index(folder: Path, memory: str | None) -> None:
    """Train and fill the layer's index, tune it and measure its recall."""
    store = Datastore.open(folder)
    bound = None if memory is None else parse_size(memory)
    index_layer(store, store.layers[0], Settings(knn=KNNConfig(index=SPEC), memory=bound))


def peak_of(command: Sequence[str], work: Callable[[], object] | None = None) -> dict[str, float]:
    """Peak of a child's own memory in MB, and its seconds; with work, the child is a server, and stopped afterwards."""
    start, peak = time.perf_counter(), 0
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    worker = threading.Thread(target=lambda: (work and work(), work and child.terminate()))
    worker.start()
    while child.poll() is None:
        peak = max(peak, _own_kilobytes(child.pid))
        time.sleep(0.02)
    worker.join()
    if child.returncode not in (0, 143):
        sys.exit(f"{' '.join(command)}: {child.stderr.read() if child.stderr else ''}")
    return {"MB": peak / 1024, "seconds": time.perf_counter() - start}


def _own_kilobytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def ask(port: int) -> None:
    """Wait for the server, and ask it for a few completions."""
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5).read()
            break
        except OSError:
            time.sleep(0.5)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as answer:
        (model,) = json.load(answer)["data"][:1]
    body = {"prompt": "Ownership is", "max_tokens": 64, "model": model["id"]}
    for _ in range(4):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=300).read()


def commands(step: str, folder: Path, memory: str | None) -> Iterator[str]:
    """The command line of a step."""
    yield sys.executable
    if step == "index":
        yield from (__file__, str(folder), "--one", *(["--memory", memory] if memory else []))
        return
    yield from ("-m", "knnlm", step, str(folder), "--model", str(DEMO / "model"))
    yield from ["--memory", memory] if memory else []
    if step == "eval":
        yield from ("--eval-text", str(DEMO / "rust-book.jsonl"), "--eval-tokens", "4000", "--k", "1024", "--dry-run")
    else:
        yield from ("--port", "8765")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    steps = ["store", "index", "eval", "serve"]
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps)
    parser.add_argument("--keys", type=int, default=5_000_000)
    parser.add_argument("--memory")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        build_index(args.folder, args.memory)
        return
    for step in args.steps:
        if step == "store":
            make_store(args.folder, args.keys)
            continue
        for memory in (None, args.memory):
            folder = args.folder
            if step == "index" and memory is None:
                folder = Path(shutil.copytree(folder, folder.with_name("free"), copy_function=os.link))
            found = peak_of([*commands(step, folder, memory)], (lambda: ask(8765)) if step == "serve" else None)
            print(f"{step}, memory {memory or 'free'}:", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

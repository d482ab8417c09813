"""What extracting and scoring every layer costs beside the bare forward pass, and whether memory grows with the text.

    .venv/bin/python scripts/bench_extraction.py --model MODEL --text nursing.jsonl

Ratios of times measured in turn in one process, medians of several rounds; peak memory of fresh processes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch

from knnlm.collect import collect
from knnlm.config import Settings
from knnlm.corpus import read_documents, tokenize
from knnlm.datastore import DatastoreWriter
from knnlm.lm import LanguageModel, load_model
from knnlm.plan import window_config
from knnlm.scoring import LayerScorer
from knnlm.windows import TokenDocument, batches, windows

DEFAULTS = Settings()


def bare_forward(lm: LanguageModel, documents: Sequence[TokenDocument]) -> None:
    """The model's blocks on the same batches, with nothing attached and no LM head."""
    config = window_config(lm, DEFAULTS.text)
    with torch.inference_mode():
        for batch in batches(windows(documents, config), DEFAULTS.text.batch_tokens(config.context)):
            lm.model.base_model(torch.from_numpy(batch.tokens_BT), use_cache=False)


def scored(lm: LanguageModel, documents: Sequence[TokenDocument], folder: Path | None = None) -> None:
    """Every layer extracted and scored; with a folder, also stored."""
    dims = {name: lm.dims[name] for name in lm.layer_names}
    config, scorer = window_config(lm, DEFAULTS.text), LayerScorer(dims)
    if folder is None:
        collect(lm, documents, config, lm.layer_names, scorer=scorer)
        return
    with DatastoreWriter(folder, dims) as writer:
        collect(lm, documents, config, lm.layer_names, scorer=scorer, writer=writer)
        writer.finish(fingerprint=lm.fingerprint, context=config.context, stride=config.stride)


def seconds(work: Callable[..., None], *args: object) -> float:
    """Of one call."""
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def overhead(lm: LanguageModel, documents: Sequence[TokenDocument], rounds: int) -> dict[str, list[float]]:
    """Time of each way over the bare forward pass's of the same round."""
    ratios: dict[str, list[float]] = {"extract and score": [], "extract, score and store": []}
    bare_forward(lm, documents)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            bare = seconds(bare_forward, lm, documents)
            ratios["extract and score"].append(seconds(scored, lm, documents) / bare)
            ratios["extract, score and store"].append(seconds(scored, lm, documents, Path(folder)) / bare)
    return ratios


def peak_megabytes(model: str, text: Path) -> float:
    """Peak memory of a fresh process that scores the text."""
    command = [sys.executable, __file__, "--model", model, "--text", str(text), "--only-score"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(found.stdout.strip().splitlines()[-1])


def cut(text: Sequence[Path], size: int, folder: Path) -> Path:
    """The first `size` bytes of text, repeated where there are fewer, as whole documents."""
    path, written = folder / f"{size}.jsonl", 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            for document in read_documents(text):
                piece = document.text[: size - written]
                file.write(json.dumps({"text": piece}) + "\n")
                written += len(piece)
                if written >= size:
                    break
    return path


def main() -> None:
    """Print the ratios and the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", nargs="*", type=int, default=[1, 8], help="texts whose peak memory is compared")
    parser.add_argument("--only-score", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    lm = load_model(args.model)
    if args.only_score:
        scored(lm, tokenize(read_documents(args.text), lm.encode))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    documents = list(islice(tokenize(read_documents(args.text), lm.encode), args.documents))
    tokens = sum(len(document.tokens) for document in documents)
    print(f"{tokens:,} tokens, {len(lm.layer_names)} layers, {torch.get_num_threads()} threads")
    for name, values in overhead(lm, documents, args.rounds).items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name}: {statistics.median(values):.2f} x the bare forward pass ({spread})")
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in args.megabytes:
            text = cut(args.text, megabytes * 1_000_000, Path(folder))
            print(f"peak memory on {megabytes} MB of text: {peak_megabytes(args.model, text):.0f} MB")


if __name__ == "__main__":
    main()

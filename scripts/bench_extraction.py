"""What extracting and scoring every layer costs beside the bare forward pass, and whether memory grows with the text.

    .venv/bin/python scripts/bench_extraction.py --model MODEL --text nursing.jsonl

Ratios of times measured in turn in one process, medians of several rounds; peak memory of fresh processes, which with
--store also write the keys of every layer, as `knnlm run` does.
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
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch

from knnlm.collect import collect
from knnlm.config import Settings
from knnlm.corpus import read_documents, tokenize
from knnlm.datastore import DatastoreWriter
from knnlm.layers import select_layers
from knnlm.lm import LanguageModel, load_model
from knnlm.plan import window_config
from knnlm.scoring import LayerScorer
from knnlm.windows import TokenDocument, batches, count_targets, windows

DEFAULTS = Settings()


def bare_forward(lm: LanguageModel, documents: Sequence[TokenDocument]) -> None:
    """The model's blocks on the same batches, with nothing attached and no LM head."""
    config = window_config(lm, DEFAULTS.text)
    with torch.inference_mode():
        for batch in batches(windows(documents, config), DEFAULTS.text.batch_tokens(config.context)):
            lm.model.base_model(torch.from_numpy(batch.tokens_BT), use_cache=False)


def scored(
    lm: LanguageModel, documents: Iterable[TokenDocument], layers: Sequence[str], folder: Path | None = None
) -> None:
    """The layers extracted and scored; with a folder, also stored."""
    dims = {name: lm.dims[name] for name in layers}
    config, scorer = window_config(lm, DEFAULTS.text), LayerScorer(dims)
    if folder is None:
        collect(lm, documents, config, layers, scorer=scorer)
        return
    with DatastoreWriter(folder, dims) as writer:
        collect(lm, documents, config, layers, scorer=scorer, writer=writer)
        writer.finish(fingerprint=lm.fingerprint, context=config.context, stride=config.stride)


def seconds(work: Callable[..., None], *args: object) -> float:
    """Of one call."""
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def overhead(
    lm: LanguageModel, documents: Sequence[TokenDocument], layers: Sequence[str], rounds: int
) -> dict[str, list[float]]:
    """Time of each way over the bare forward pass's of the same round."""
    ratios: dict[str, list[float]] = {"extract and score": [], "extract, score and store": []}
    bare_forward(lm, documents)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            bare = seconds(bare_forward, lm, documents)
            ratios["extract and score"].append(seconds(scored, lm, documents, layers) / bare)
            ratios["extract, score and store"].append(seconds(scored, lm, documents, layers, Path(folder)) / bare)
    return ratios


def peak_megabytes(args: argparse.Namespace, text: Path) -> float:
    """Peak memory of a fresh process that makes one pass over the text."""
    command = [sys.executable, __file__, "--model", args.model, f"--layers={args.layers}", "--text", str(text)]
    command += ["--one-pass", *["--store"] * args.store]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(found.stdout.strip().splitlines()[-1])


def one_pass(lm: LanguageModel, args: argparse.Namespace) -> None:
    """Print the peak memory of this process after one pass over the text as a stream."""
    documents = tokenize(read_documents(args.text), lm.encode)
    with tempfile.TemporaryDirectory() as folder:
        scored(lm, documents, select_layers(args.layers, lm.layer_names), Path(folder) if args.store else None)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def cut(text: Sequence[Path], size: int, folder: Path) -> Path:
    """The first `size` characters of text, repeated where there are fewer, as whole documents."""
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--layers", default="all", help="as of knnlm run: --layers=-1.*")
    parser.add_argument("--documents", type=int, default=6, help="of the text, for the times; 0: no times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--megabytes", nargs="*", type=float, default=[1, 8], help="texts whose peak memory is compared"
    )
    parser.add_argument("--store", action="store_true", help="peak memory of a pass that stores keys too")
    parser.add_argument("--one-pass", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def print_times(lm: LanguageModel, args: argparse.Namespace) -> None:
    documents = list(islice(tokenize(read_documents(args.text), lm.encode), args.documents))
    layers = select_layers(args.layers, lm.layer_names)
    print(f"{count_targets(documents):,} tokens, {len(layers)} layers, {torch.get_num_threads()} threads")
    for name, values in overhead(lm, documents, layers, args.rounds).items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name}: {statistics.median(values):.2f} x the bare forward pass ({spread})")


def main() -> None:
    """Print the ratios and the peaks."""
    args = parse_arguments()
    lm = load_model(args.model)
    if args.one_pass:
        one_pass(lm, args)
        return
    if args.documents:
        print_times(lm, args)
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in args.megabytes:
            text = cut(args.text, round(megabytes * 1_000_000), Path(folder))
            print(f"peak memory on {megabytes:g} MB of text: {peak_megabytes(args, text):.0f} MB", flush=True)


if __name__ == "__main__":
    main()

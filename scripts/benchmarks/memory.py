"""Whether memory grows with the text: peaks of fresh processes that extract and score every layer.

    .venv/bin/python scripts/benchmarks/memory.py --model MODEL --text nursing.jsonl

With --store they also write the keys, as `knnlm run` does.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from extraction import extract, stored

from knnlm.cli.memory import keep_freed_memory
from knnlm.layer_names import select_layers
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.text.corpus import read_documents, tokenize


def peak_megabytes(args: argparse.Namespace, text: Path) -> float:
    """Peak memory of a fresh process that makes one pass over the text."""
    command = [sys.executable, __file__, "--model", args.model, f"--layers={args.layers}", "--text", str(text)]
    command += ["--one-pass", *["--store"] * args.store]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(found.stdout.strip().splitlines()[-1])


def one_pass(lm: LanguageModel, args: argparse.Namespace) -> None:
    """Print the peak memory of this process after one pass over the text as a stream."""
    documents = tokenize(read_documents(args.text), lm.encode)
    (stored if args.store else extract)(lm, documents, select_layers(args.layers, lm.layer_names))
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
    parser.add_argument(
        "--megabytes", nargs="*", type=float, default=[1, 8], help="texts whose peak memory is compared"
    )
    parser.add_argument("--store", action="store_true", help="peak memory of a pass that stores keys too")
    parser.add_argument("--one-pass", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Print the peaks."""
    keep_freed_memory()  # as the command line does
    args = parse_arguments()
    if args.one_pass:
        one_pass(load_model(args.model), args)
        return
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in args.megabytes:
            text = cut(args.text, round(megabytes * 1_000_000), Path(folder))
            print(f"peak memory on {megabytes:g} MB of text: {peak_megabytes(args, text):.0f} MB", flush=True)


if __name__ == "__main__":
    main()

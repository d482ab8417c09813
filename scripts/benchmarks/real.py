"""The verbs on a real pretrained model, beside the bare forward pass of the same tokens: time and peak memory.

    scripts/bench --only real --model SMOLLM2 --text rust-book.jsonl --held-out sherlock-holmes.jsonl
    .venv/bin/python scripts/benchmarks/real.py …the same… --tokens 20000 --queries 2000     other sizes

Each is measured in a fresh process, from the loaded model to the finished folder, report included. A ratio is of
processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from extraction import bare_forward
from ratios import Row

from knnlm.cli.memory import keep_freed_memory
from knnlm.config import EvalConfig, LayerConfig, Settings, TextConfig
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.pipeline import build, run
from knnlm.pipeline.job import Job
from knnlm.progress import Silent
from knnlm.report import write_reports

# What each verb may cost, in forward passes, and the peak in MB.
WANTED = {"run": 1.5, "run --layers all": 3.0, "build": 1.1}
PEAK_MB = 3000


def rows(
    model: str,
    text: Sequence[Path],
    held_out: Path,
    *,
    sizes: tuple[int, int],
    rounds: int,
    verbs: Sequence[str] = (),
    dtype: str = "auto",
) -> Iterator[Row]:
    """A line for each verb; every round measures the bare pass and then the verb.

    :param sizes: tokens to store, and to evaluate.
    """
    tokens, queries = sizes
    for verb in verbs or WANTED:
        pairs = [
            [_measured(model, text, held_out, tokens, queries, dtype, one) for one in ("forward", verb)]
            for _ in range(rounds)
        ]
        ratios = tuple(bare["processor"] / ours["processor"] for bare, ours in pairs)
        bare, ours = pairs[-1]
        figures: dict[str, float | str] = {
            "times the pass": 1 / sorted(ratios)[len(ratios) // 2],
            "peak, MB": max(one["peak"] for _, one in pairs),
            "wall, s": ours["wall"],
            "wall of the pass, s": bare["wall"],
        }
        yield Row(
            f"{verb}, {tokens:,} + {queries:,} tokens", "the bare forward pass", ratios, 1 / WANTED[verb], figures
        )


def _measured(
    model: str, text: Sequence[Path], held_out: Path, tokens: int, queries: int, dtype: str, verb: str
) -> Mapping[str, float]:
    command = [sys.executable, __file__, "--model", model, "--text", *map(str, text), "--held-out", str(held_out)]
    command += ["--tokens", str(tokens), "--queries", str(queries), "--dtype", dtype, "--one", verb]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: Mapping[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(args: argparse.Namespace) -> Mapping[str, float]:
    """Seconds, processor seconds and peak of one verb in this process."""
    settings = Settings(
        text=TextConfig(max_tokens=args.tokens),
        layers=LayerConfig(layers="all" if "all" in args.one else None),
        evaluation=EvalConfig(eval_tokens=args.queries),
    )
    lm = load_model(args.model, dtype=args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        work = _work(lm, args, settings, Path(folder, "out"))
        before, start = _processor(), time.perf_counter()
        work()
        wall, processor = time.perf_counter() - start, _processor() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall": wall, "processor": processor, "peak": peak}


def _work(lm: LanguageModel, args: argparse.Namespace, settings: Settings, out: Path) -> Callable[[], object]:
    if args.one == "build":
        return lambda: build(lm, args.text, out, settings=settings)
    if args.one != "forward":
        return lambda: run(lm, args.text, out, eval_text=[args.held_out], settings=settings, report=write_reports)
    job = Job(lm, settings, Silent())
    stored, held_out = list(job.documents(args.text)), job.evaluation_documents([args.held_out])
    return lambda: (bare_forward(lm, stored), bare_forward(lm, held_out))


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--queries", type=int, default=3_000)
    parser.add_argument("--dtype", default="auto", help="what the model computes in")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--verbs", nargs="+", choices=list(WANTED), default=())
    parser.add_argument("--one", choices=("forward", *WANTED), help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()  # as the command line does
    if args.one:
        print(json.dumps(one(args)))
        return
    found = rows(
        args.model,
        args.text,
        args.held_out,
        sizes=(args.tokens, args.queries),
        rounds=args.rounds,
        verbs=args.verbs,
        dtype=args.dtype,
    )
    for row in found:
        print(row.stage, json.dumps(row.figures), flush=True)


if __name__ == "__main__":
    main()

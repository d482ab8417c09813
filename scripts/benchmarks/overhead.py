"""What a build on Ray costs beside one process on the same machine, where nothing fails.

    scripts/bench --only overhead --model SMOLLM2 --text rust-book.jsonl
    .venv/bin/python scripts/benchmarks/overhead.py FOLDER --model MODEL --text TEXT --tokens 20000 --parts 5 --rounds 3

Both make the same parts of one layer's keys, with the same threads; the stage "extracting keys" is timed, in
turns. Ray's session is up before; the start of its worker and the loading of the model there are within the first round
of the stage, which is told apart. Processor time is that of all processes, Ray's own among them. It needs the extras
`ray` and `train` (for psutil).
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from ratios import Row

from knnlm.cluster.core import Cluster, open_cluster
from knnlm.config import LayerConfig, Settings, TextConfig
from knnlm.layer_names import select_layers
from knnlm.locks import lock_folder
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.pipeline.job import Job
from knnlm.pipeline.steps import extract, score_sample
from knnlm.progress import Silent
from knnlm.results import ScoreResult
from knnlm.store import writer
from knnlm.store.datastore import Datastore


def processor_seconds() -> float:
    """Of this process and all that it has started."""
    own = psutil.Process()
    total = 0.0
    for one in (own, *own.children(recursive=True)):
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


@contextmanager
def timed(into: list[dict[str, float]]) -> Iterator[None]:
    start, used = time.perf_counter(), processor_seconds()
    yield
    into.append({"wall": time.perf_counter() - start, "processor": processor_seconds() - used})


def make(
    lm: LanguageModel, text: str, folder: Path, settings: Settings, scored: ScoreResult, cluster: Cluster | None
) -> None:
    folder.mkdir()
    os.close(lock_folder(folder))
    job = Job(lm, settings, Silent(), cluster)
    extract(job, job.documents([text]), [settings.layers.select], folder, total=None, sampled=scored)


def rows(model: str, text: str, *, tokens: int, parts: int, rounds: int) -> Iterator[Row]:
    """The line of rounds without the start of a worker."""
    with tempfile.TemporaryDirectory() as place:
        found = measured(Path(place, "builds"), model, text, tokens=tokens, parts=parts, rounds=rounds + 1)
    ratios = tuple(one["processor"] / two["processor"] for one, two in _pairs(found)[1:])
    figures: dict[str, float | str] = {f"{name}, s": times[-1]["wall"] for name, times in found.items()}
    yield Row(f"build of {tokens:,} keys in {parts} parts by Ray", "one process", ratios, 1 / 1.15, figures)


Found = Mapping[str, list[dict[str, float]]]


def _pairs(found: Found) -> list[tuple[dict[str, float], dict[str, float]]]:
    return list(zip(found["one process"], found["ray"], strict=True))


def measured(folder: Path, model: str, text: str, *, tokens: int, parts: int, rounds: int) -> Found:
    """Seconds of each round, both ways; their files are compared."""
    folder.mkdir()
    writer.PART_ROWS = tokens // parts
    lm = load_model(model)
    (layer,) = select_layers("-1.ffn_input", lm.layer_names)
    settings = Settings(text=TextConfig(context=256, max_tokens=tokens), layers=LayerConfig(layers=layer, select=layer))
    job = Job(lm, settings, Silent())
    scored = score_sample(job, job.documents([text]), [layer])
    found: Found = {"one process": [], "ray": []}
    start = time.perf_counter()
    with open_cluster("local") as cluster:
        print(f"Ray is up after {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        for number in range(rounds):
            for name, times in found.items():
                place = folder / f"{name}-{number}".replace(" ", "-")
                with timed(times):
                    make(lm, text, place, settings, scored, cluster if name == "ray" else None)
                print(name, json.dumps(times[-1]), file=sys.stderr, flush=True)
            pair = [folder / f"{name}-{number}" for name in ("one-process", "ray")]
            made = Datastore.open(pair[0]).manifest.parts
            assert made == Datastore.open(pair[1]).manifest.parts
            assert filecmp.cmp(*(one / "parts" / made[-1].name / "part.json" for one in pair), shallow=False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--parts", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    sizes = {"tokens": given.tokens, "parts": given.parts, "rounds": given.rounds}
    found = measured(given.folder, given.model, given.text, **sizes)
    for kind in ("wall", "processor"):
        ratios = [two[kind] / one[kind] for one, two in _pairs(found)]
        later = statistics.median(ratios[1:] or ratios)
        spread = f"{min(ratios[1:] or ratios):.3f} to {max(ratios[1:] or ratios):.3f}"
        print(f"{kind}: {ratios[0]:.3f} with the start of the worker, then {later:.3f} ({spread})")


if __name__ == "__main__":
    main()

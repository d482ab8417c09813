"""Evaluation against the plain LM, 1,000 settings against one search, the layer table against a peer, start-up.

Legend: Q queries, K neighbours.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import peer
from extraction import documents
from ratios import Row, seconds, speed_ratios
from stores import LAYER, enlarged_store, wide_gpt2

from knnlm.config import EvalConfig, LayerConfig, Settings, TextConfig
from knnlm.evaluation.queries import Queries, open_queries
from knnlm.extraction.collect import collect
from knnlm.extraction.sinks import TargetScorer
from knnlm.knn.fitting import fit
from knnlm.knn.mixing import Search
from knnlm.knn.searcher import open_searcher
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.pipeline import build, evaluate, run
from knnlm.store.datastore import Datastore
from knnlm.text.corpus import read_documents
from knnlm.text.windows import window_config


def rows(
    model: str, text: Sequence[Path], held_out: Path, *, keys: Sequence[int], queries: int, rounds: int
) -> Iterator[Row]:
    """All lines about evaluation; `keys` are the sizes of the datastores, of a model of GPT-2 small's shape."""
    with tempfile.TemporaryDirectory() as folder:
        lm = wide_gpt2(Path(folder, "model"))
        for count in keys:
            store = enlarged_store(lm, text, Path(folder, f"{count}"), count, settings(count, queries))
            yield _beside_the_lm(lm, store, held_out, queries, rounds)
        yield _thousand_settings(lm, store, held_out, queries, rounds)
        small = load_model(model, dtype="float32")
        store = build(small, text, Path(folder, "small"), settings=settings(20_000, queries))
        yield _start_up(model, store.folder, held_out, rounds)


def settings(count: int, queries: int) -> Settings:
    return Settings(
        text=TextConfig(max_tokens=count),
        layers=LayerConfig(layers=LAYER, select=LAYER),
        evaluation=EvalConfig(eval_tokens=queries, examples=0),
    )


def _beside_the_lm(lm: LanguageModel, store: Datastore, held_out: Path, queries: int, rounds: int) -> Row:
    """`evaluate` against the LM alone: both read tokens from all of the text and run the model."""
    config, every = window_config(TextConfig(), lm.name, lm.context_limit), settings(store.count, queries)
    plain = lambda: collect(lm, documents(lm, [held_out], queries), config, (), targets=TargetScorer(lm))  # noqa: E731
    whole = lambda: evaluate(lm, store, [held_out], settings=every)  # noqa: E731
    ratios = speed_ratios(whole, plain, rounds)
    spec = next((str(one["spec"]) for one in store.manifest.indexes.values()), "exact")
    must = 0.8 if store.count <= 200_000 else 0.5
    lm_ms, own_ms = 1e3 * seconds(plain) / queries, 1e3 * seconds(whole) / queries
    figures: dict[str, float | str] = {"index": spec, "LM, ms a token": lm_ms, "ms more": own_ms - lm_ms}
    return Row(f"evaluate with {store.count:,} keys", "the plain LM on the same text", ratios, must, figures)


def _thousand_settings(lm: LanguageModel, store: Datastore, held_out: Path, queries: int, rounds: int) -> Row:
    """Fitting tries 11 temperatures x 9 k x 12 λ, and refines."""
    config = window_config(TextConfig(), lm.name, lm.context_limit)
    layer = store.layers[-1]
    with open_queries(lm, documents(lm, [held_out], queries), config, [layer]) as opened:
        search = _search(store, opened, layer)
        once = lambda: _search(store, opened, layer)  # noqa: E731
        with_settings = lambda: fit(_search(store, opened, layer), opened.lm_Q)  # noqa: E731
        ratios = speed_ratios(with_settings, once, rounds)
        apart = 1e3 * seconds(lambda: fit(search, opened.lm_Q)) / queries
    stage = f"search of {store.count:,} keys and 1,188 settings of k, T, λ"
    return Row(stage, "the search alone", ratios, 0.95, {"fitting, ms a token": apart})


def _search(store: Datastore, opened: Queries, layer: str) -> Search:
    searcher = open_searcher(store, layer, "l2")
    return searcher.cached(opened.vectors(layer), opened.targets_Q, peer.K)


def _start_up(model: str, store: Path, held_out: Path, rounds: int) -> Row:
    """`knnlm eval` of a few tokens against a program that loads the same model and runs it once."""
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder, "short.txt")
        text = next(iter(read_documents([held_out]))).text
        short.write_text(text[:4000], encoding="utf-8")
        given = [str(store), "--eval-text", str(short), "--json", "--index", "exact"]
        ours = [sys.executable, "-m", "knnlm", "eval", *given]
        bare = [sys.executable, "-c", "import torch, transformers"]
        loads = [
            *(sys.executable, "-c"),
            "import torch, transformers; "
            f"transformers.AutoModelForCausalLM.from_pretrained({model!r})(torch.ones(1, 500, dtype=torch.long))",
        ]
        times = {name: [_process(one) for _ in range(rounds)] for name, one in (("o", ours), ("b", bare), ("l", loads))}
    ratios = tuple(b / o for b, o in zip(times["l"], times["o"], strict=True))
    added: dict[str, float | str] = {
        f"seconds over {name}": float(np.median(times["o"]) - np.median(times[key]))
        for name, key in (("import torch, transformers", "b"), ("a program that loads and runs the model", "l"))
    }
    return Row(
        "knnlm eval on 1,000 tokens", "a program that loads the model and runs it once", ratios, None, dict(added)
    )


def _process(command: Sequence[str]) -> float:
    return seconds(lambda: subprocess.run(command, check=True, capture_output=True))


def layer_table(model: str, text: Sequence[Path], held_out: Path, *, keys: int, queries: int) -> Row:
    """`run` over every layer and part, against a peer's run for one layer times the number of layers."""
    lm = load_model(model, dtype="float32")
    every = replace(settings(keys, queries), layers=LayerConfig(layers="all"))
    with tempfile.TemporaryDirectory() as folder:
        ours = seconds(lambda: run(lm, text, Path(folder, "ours"), eval_text=[held_out], settings=every))
    theirs = peer.run(lm, text, held_out, keys, queries)
    layers = len(lm.layer_names)
    ratio = layers * sum(float(value) for value in theirs.values()) / ours
    figures = {"ours, s": ours, "keys": float(keys), **theirs}
    return Row(f"run: {layers} layers in one table", "knn-transformers, a run a layer", (ratio,), 10, figures)

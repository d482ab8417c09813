"""Evaluation beside the plain LM, 1,000 settings beside one search, the layer table beside a peer's way, start-up.

Legend: N keys, Q queries, K neighbours, D dimension, V vocabulary.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from extraction import all_batches
from numpy.typing import NDArray
from ratios import Row, seconds, speed_ratios

from knnlm.collect import collect
from knnlm.config import EvalConfig, LayerConfig, Settings, TextConfig
from knnlm.corpus import read_documents, tokenize
from knnlm.datastore import Datastore
from knnlm.evaluation import Queries, open_queries
from knnlm.layers import FINAL
from knnlm.lm import LanguageModel, load_model
from knnlm.pipeline import build, evaluate, run
from knnlm.plan import window_config
from knnlm.probability import Search, fit
from knnlm.search import open_searcher
from knnlm.windows import Batch, TokenDocument, take_slices

LAYER = "-1.ffn_input"
K = 1024
# knn-transformers: faiss.IndexIVFPQ(quantizer, dimension, 4096, 64, 8), nprobe 32, whatever the number of keys.
PEER_LISTS, PEER_CODES, PEER_PROBES = 4096, 64, 32
PEER_TEMPERATURE, PEER_LAMBDA = 10.0, 0.25


def rows(
    model: str, text: Sequence[Path], held_out: Path, *, keys: Sequence[int], queries: int, rounds: int
) -> Iterator[Row]:
    """All lines about evaluation; `keys` are the sizes of the datastores."""
    lm = load_model(model, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        for count in keys:
            store = build(lm, text, Path(folder, f"{count}"), settings=settings(count, queries))
            yield _beside_the_lm(lm, store, held_out, queries, rounds)
        yield _thousand_settings(lm, store, held_out, queries, rounds)
        yield _start_up(model, store.folder, held_out, rounds)


def settings(count: int, queries: int) -> Settings:
    return Settings(
        text=TextConfig(max_tokens=count),
        layers=LayerConfig(layers=LAYER, select=LAYER),
        evaluation=EvalConfig(eval_tokens=queries, examples=0),
    )


def documents(lm: LanguageModel, held_out: Path, queries: int) -> list[TokenDocument]:
    return take_slices(tokenize(read_documents([held_out]), lm.encode), queries, seed=0)


def _beside_the_lm(lm: LanguageModel, store: Datastore, held_out: Path, queries: int, rounds: int) -> Row:
    """All of `evaluate`: forward pass, search, fit, statistics."""
    docs, config = documents(lm, held_out, queries), window_config(lm, TextConfig())
    every = settings(store.count, queries)
    ratios = speed_ratios(
        lambda: evaluate(lm, store, [held_out], settings=every),
        lambda: collect(lm, docs, config, (), log_probs=True),
        rounds,
    )
    spec = next((str(one["spec"]) for one in store.manifest.indexes.values()), "exact")
    must = 0.8 if store.count <= 200_000 else 0.5
    figures: dict[str, float | str] = {"keys": float(store.count), "index": spec, "queries": float(queries)}
    return Row(f"evaluate with {store.count:,} keys", "the plain LM on the same text", ratios, must, figures)


def _thousand_settings(lm: LanguageModel, store: Datastore, held_out: Path, queries: int, rounds: int) -> Row:
    """Fitting tries 11 temperatures x 9 k x 12 λ, and refines."""
    config = window_config(lm, TextConfig())
    layer = store.layers[-1]
    with open_queries(lm, documents(lm, held_out, queries), config, [layer]) as opened:
        search = _search(store, opened, layer)
        once = lambda: _search(store, opened, layer)  # noqa: E731
        with_settings = lambda: fit(_search(store, opened, layer), opened.lm_Q)  # noqa: E731
        ratios = speed_ratios(with_settings, once, rounds)
        apart = seconds(lambda: fit(search, opened.lm_Q))
    return Row("search and 1,188 settings of k, T, λ", "the search alone", ratios, 0.95, {"seconds of fitting": apart})


def _search(store: Datastore, opened: Queries, layer: str) -> Search:
    searcher = open_searcher(store, layer, "l2", exact=True)
    return searcher.cached(opened.vectors(layer), opened.targets_Q, K)


def _start_up(model: str, store: Path, held_out: Path, rounds: int) -> Row:
    """A whole `knnlm eval` of a few tokens beside a program that loads the same model and runs it once."""
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder, "short.txt")
        text = next(iter(read_documents([held_out]))).text
        short.write_text(text[:4000], encoding="utf-8")
        ours = [
            sys.executable,
            "-m",
            "knnlm",
            "eval",
            str(store),
            "--eval-text",
            str(short),
            "--json",
            "--index",
            "exact",
        ]
        bare = [sys.executable, "-c", "import torch, transformers"]
        loads = [
            *(sys.executable, "-c"),
            "import torch, transformers; "
            f"transformers.AutoModelForCausalLM.from_pretrained({model!r})(torch.ones(1, 500, dtype=torch.long))",
        ]
        times = {name: [process(one) for _ in range(rounds)] for name, one in (("o", ours), ("b", bare), ("l", loads))}
    ratios = tuple(b / o for b, o in zip(times["l"], times["o"], strict=True))
    added = {
        f"seconds over {name}": float(np.median(times["o"]) - np.median(times[key]))
        for name, key in (("import torch, transformers", "b"), ("a program that loads and runs the model", "l"))
    }
    return Row(
        "knnlm eval on 1,000 tokens", "a program that loads the model and runs it once", ratios, None, dict(added)
    )


def process(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def layer_table(model: str, text: Sequence[Path], held_out: Path, *, keys: int, queries: int) -> Row:
    """`run` over every layer and part, beside a peer's run for one layer times the layers."""
    lm = load_model(model, dtype="float32")
    every = replace(settings(keys, queries), layers=LayerConfig(layers="all"))
    with tempfile.TemporaryDirectory() as folder:
        ours = seconds(lambda: run(lm, text, Path(folder, "ours"), eval_text=[held_out], settings=every))
    peer = peer_run(lm, text, held_out, keys, queries)
    layers = len(lm.layer_names)
    theirs = layers * sum(float(value) for value in peer.values())
    figures = {"ours, s": ours, "keys": float(keys), **peer}
    return Row(f"run: {layers} layers in one table", "knn-transformers, a run a layer", (theirs / ours,), 10, figures)


def peer_run(
    lm: LanguageModel, text: Sequence[Path], held_out: Path, keys: int, queries: int
) -> dict[str, float | str]:
    """The steps of neulab/knn-transformers for one layer, written anew: save keys, train its index, evaluate."""
    docs = take_slices(tokenize(read_documents(text), lm.encode), keys + 1000, seed=0)
    layer = [name for name in lm.layer_names if name.endswith("ffn_input")][-1]
    kept_ND, values_N = np.zeros((keys, lm.dims[layer]), np.float16), np.zeros(keys, np.int64)
    times = {"saving": seconds(lambda: _save(lm, docs, layer, kept_ND, values_N))}
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(kept_ND.shape[1]), kept_ND.shape[1], PEER_LISTS, PEER_CODES, 8)
    index.nprobe = PEER_PROBES
    keys_ND = kept_ND.astype(np.float32)
    times["training"] = seconds(lambda: index.train(keys_ND))
    times["adding"] = seconds(lambda: index.add(keys_ND))
    test = documents(lm, held_out, queries)
    times["evaluating"] = seconds(lambda: _peer_evaluate(lm, test, layer, index, keys_ND, values_N))
    return {f"peer's {name}, s": value for name, value in times.items()}


def _save(
    lm: LanguageModel,
    docs: Sequence[TokenDocument],
    layer: str,
    kept_ND: NDArray[np.float16],
    values_N: NDArray[np.int64],
) -> None:
    at = 0
    for batch in all_batches(lm, docs):
        vectors_BTD = _vectors(lm, batch, [layer])[layer]
        for row, window in enumerate(batch.windows):
            stop = min(at + len(window.targets) - window.first, len(kept_ND))
            kept_ND[at:stop] = vectors_BTD[row, window.first : window.first + stop - at].numpy()
            values_N[at:stop] = window.targets[window.first :][: stop - at]
            at = stop


def _vectors(lm: LanguageModel, batch: Batch, layers: Sequence[str]) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    tokens_BT, lengths_B = torch.from_numpy(batch.tokens_BT), torch.from_numpy(batch.lengths_B)
    lm.forward(tokens_BT, lengths_B, layers, lambda name, vectors: seen.update({name: vectors.clone()}))
    return seen


def _peer_evaluate(
    lm: LanguageModel,
    docs: Sequence[TokenDocument],
    layer: str,
    index: Any,  # noqa: ANN401  (FAISS has no types)
    keys_ND: NDArray[np.float32],
    values_N: NDArray[np.int64],
) -> float:
    """A table of tokens x vocabulary a window, as the peer makes it; λ and T are constants there."""
    total, count = 0.0, 0
    for batch in all_batches(lm, docs):
        vectors = _vectors(lm, batch, [layer, FINAL])
        for row, window in enumerate(batch.windows):
            counted = slice(window.first, len(window.targets))
            queries_QD = vectors[layer][row, counted]
            _, ids_QK = index.search(queries_QD.numpy(), K)
            found_QK = torch.from_numpy(np.maximum(ids_QK, 0))
            distances_QK = ((queries_QD[:, None] - torch.from_numpy(keys_ND)[found_QK]) ** 2).sum(-1)
            distances_QK[torch.from_numpy(ids_QK) < 0] = torch.inf
            lm_QV = lm.log_probs(vectors[FINAL][row, counted])
            weights_QK = torch.softmax(-distances_QK / PEER_TEMPERATURE, dim=1)
            knn_QV = torch.zeros_like(lm_QV).scatter_add_(1, torch.from_numpy(values_N)[found_QK], weights_QK)
            knn_QV = knn_QV.clamp_min(1e-30).log()
            mixed_QV = torch.logaddexp(knn_QV + math.log(PEER_LAMBDA), lm_QV + math.log1p(-PEER_LAMBDA))
            targets_Q1 = torch.from_numpy(window.targets[counted].astype(np.int64))[:, None]
            total -= float(mixed_QV.gather(1, targets_Q1).sum())
            count += len(targets_Q1)
    return math.exp(total / count)

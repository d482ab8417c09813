"""Reimplementation of neulab/knn-transformers for one layer: save keys, train the index, evaluate.

Legend: B batch, T time, N keys, Q queries, K neighbours, D dimension, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from extraction import all_batches, documents
from numpy.typing import NDArray
from ratios import seconds

from knnlm.layer_names import FINAL
from knnlm.model.lm import LanguageModel
from knnlm.text.windows import Batch, TokenDocument

# Its index and search, whatever the number of keys, as a factory string and nprobe.
INDEX, LISTS, PROBES = "IVF4096,PQ64", 4096, 32
# Its neighbours, and constants that users set.
K, TEMPERATURE, LAMBDA = 1024, 10.0, 0.25


def run(lm: LanguageModel, text: Sequence[Path], held_out: Path, keys: int, queries: int) -> dict[str, float | str]:
    """Seconds of each step."""
    docs = documents(lm, text, keys + 1000)
    layer = [name for name in lm.layer_names if name.endswith("ffn_input")][-1]
    kept_ND, values_N = np.zeros((keys, lm.dims[layer]), np.float16), np.zeros(keys, np.int64)
    times = {"saving": seconds(lambda: _save(lm, docs, layer, kept_ND, values_N))}
    index = faiss.index_factory(kept_ND.shape[1], INDEX)
    index.nprobe = PROBES
    keys_ND = kept_ND.astype(np.float32)
    times["training"] = seconds(lambda: index.train(keys_ND))
    times["adding"] = seconds(lambda: index.add(keys_ND))
    test = documents(lm, [held_out], queries)
    times["evaluating"] = seconds(lambda: _evaluate(lm, test, layer, index, keys_ND, values_N))
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
    lm.forward(torch.from_numpy(batch.tokens_BT), layers, lambda name, vectors: seen.update({name: vectors.clone()}))
    return seen


def _evaluate(
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
            weights_QK = torch.softmax(-distances_QK / TEMPERATURE, dim=1)
            knn_QV = torch.zeros_like(lm_QV).scatter_add_(1, torch.from_numpy(values_N)[found_QK], weights_QK)
            knn_QV = knn_QV.clamp_min(1e-30).log()
            mixed_QV = torch.logaddexp(knn_QV + math.log(LAMBDA), lm_QV + math.log1p(-LAMBDA))
            targets_Q1 = torch.from_numpy(window.targets[counted].astype(np.int64))[:, None]
            total -= float(mixed_QV.gather(1, targets_Q1).sum())
            count += len(targets_Q1)
    return math.exp(total / count)

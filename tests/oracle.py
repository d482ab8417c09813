"""A kNN-LM in fifty lines of float64 loops, with none of the project's code: what everything is compared with.

Windows, targets and mixing are written again from design.md section 6 and Khandelwal et al. 2020; keys are raw (never
centred), in float64, and every distance is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Pass:
    """Every token with a predecessor: its key, itself, and the LM's log-probability of it."""

    keys: NDArray[np.float64]
    targets: NDArray[np.int64]
    log_probs: NDArray[np.float64]


def run_documents(model, module, take: str, documents: Sequence[Sequence[int]], context: int, stride: int) -> Pass:
    """Keys at `module`'s input or output for each document, by sliding windows."""
    keys, targets, log_probs = [], [], []
    for tokens in documents:
        scored = 1  # the next target without a key; token 0 has no predecessor
        start = 0
        while scored < len(tokens):
            window = list(tokens[start : start + context + 1])
            hidden, logits = forward(model, module, take, window[:-1])
            log_softmax = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
            log_softmax -= logits.max(1, keepdims=True)
            for position, target in enumerate(window[1:]):
                if start + position + 1 >= scored:
                    keys.append(hidden[position])
                    targets.append(target)
                    log_probs.append(log_softmax[position, target])
            scored = start + len(window)
            start += stride
    return Pass(np.array(keys), np.array(targets), np.array(log_probs))


def forward(model, module, take: str, tokens: Sequence[int]):
    """The module's input or output [T, D] and the logits [T, V] of one window, float64."""
    caught = []

    def hook(_module, args, output):
        tensor = args[0] if take == "input" else output
        caught.append((tensor[0] if isinstance(tensor, tuple) else tensor).detach())

    handle = module.register_forward_hook(hook)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double().numpy()
    handle.remove()
    return caught[0].reshape(len(tokens), -1).double().numpy(), logits


def perplexity(store: Pass, queries: Pass, k: int, temperature: float, lam: float, metric: str = "l2") -> float:
    """exp of the mean -log(lambda p_kNN + (1 - lambda) p_LM), everything in float64."""
    losses = []
    for query, target, log_prob in zip(queries.keys, queries.targets, queries.log_probs, strict=True):
        if metric == "l2":
            distances = ((store.keys - query) ** 2).sum(1)
        elif metric == "ip":
            distances = -(store.keys @ query)
        else:
            unit = store.keys / np.linalg.norm(store.keys, axis=1, keepdims=True)
            distances = 2 - 2 * unit @ (query / np.linalg.norm(query))
        nearest = np.argsort(distances, kind="stable")[:k]
        weights = np.exp(-(distances[nearest] - distances[nearest[0]]) / temperature)
        p_knn = weights[store.targets[nearest] == target].sum() / weights.sum()
        losses.append(-np.log(lam * p_knn + (1 - lam) * np.exp(log_prob)))
    return float(np.exp(np.mean(losses)))

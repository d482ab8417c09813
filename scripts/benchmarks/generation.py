"""Milliseconds per step of generate(), for the plain LM and the kNN-LM: generation.py STORE [ROWS...].

STORE is made by `knnlm run`, which fits a λ for each query.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import torch

from knnlm import KNNLM, load_model, open_datastore

STEPS, REPEATS = 32, 3


def milliseconds(model: Any, ids_BT: torch.Tensor) -> float:  # noqa: ANN401 - any model with generate()
    """Milliseconds per step, the best of several runs."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
        model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
        taken.append(time.perf_counter() - start)
    return min(taken) / STEPS * 1e3


def main() -> None:
    store = open_datastore(sys.argv[1])
    lm = load_model(store.model)
    mixed, fixed, off = (KNNLM.from_store(store, lm=lm) for _ in range(3))
    fixed.retrieval = replace(fixed.retrieval, setting=replace(fixed.retrieval.setting, gate=None))
    off.retrieval = replace(off.retrieval, setting=replace(off.retrieval.setting, lam=0.0))
    print(f"{len(store):,} keys of {mixed.retrieval.searcher.index.dim} numbers, {mixed.retrieval.setting}")
    for rows in map(int, sys.argv[2:] or ["1", "16"]):
        ids_BT = torch.tensor([lm.encode("The borrow checker").tolist()] * rows)
        figures = [milliseconds(model, ids_BT) for model in (lm.model, off, fixed, mixed)]
        told = "{} rows: plain {:.1f} ms, lambda 0 {:.1f} ms, fixed lambda {:.1f} ms, lambda by query {:.1f} ms"
        print(told.format(rows, *figures))


if __name__ == "__main__":
    main()

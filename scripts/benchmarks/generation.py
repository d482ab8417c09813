"""Milliseconds of generate(), for the plain LM and the kNN-LM: generation.py STORE [ROWS...].

Of a step, and of a prompt. STORE is made by `knnlm run` or `build`, which fit a λ for each query.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import torch

from knnlm import KNNLM, load_model, open_datastore
from knnlm.knn.mixing import Mix

STEPS, REPEATS, PROMPT = 32, 3, 256


def milliseconds(model: Any, ids_BT: torch.Tensor, steps: int) -> float:  # noqa: ANN401 - any model with generate()
    """Milliseconds of one call, the best of several."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
        model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
        taken.append(time.perf_counter() - start)
    return min(taken) * 1e3


def main() -> None:
    store = open_datastore(sys.argv[1])
    lm = load_model(store.model)
    own = KNNLM.from_store(store, lm=lm).retrieval
    settings = {
        "lambda 0": replace(own.setting, lam=0.0),
        "fixed lambda": Mix(own.setting.k, own.setting.temperature, own.setting.lam),
        "by query": replace(own.setting, by_text=False),
        "by query and text": replace(own.setting, by_text=True),
    }
    models = {name: KNNLM.from_retrieval(lm, replace(own, setting=setting)) for name, setting in settings.items()}
    print(f"{len(store):,} keys of {own.searcher.index.dim} numbers, {own.setting}")
    short, text = lm.encode("The borrow checker").tolist(), store.values[:PROMPT].tolist()
    for rows in map(int, sys.argv[2:] or ["1", "16"]):
        for name, model in {"plain": lm.model, **models}.items():
            first = milliseconds(model, torch.tensor([short] * rows), 1)
            step = (milliseconds(model, torch.tensor([short] * rows), STEPS + 1) - first) / STEPS
            prompt = milliseconds(model, torch.tensor([text] * rows), 1)
            print(f"{rows} rows, {name}: {step:.1f} ms a step, {prompt:.0f} ms a prompt of {PROMPT}", flush=True)


if __name__ == "__main__":
    main()

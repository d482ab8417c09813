"""What citations and the copying guard cost: citations.py MODEL TEXT [KEYS].

A datastore of KEYS keys (100,000 by default) is built from nine tenths of the text. Then, for the held-out rest:

- milliseconds of a citation for each token of an answer, its forward pass and search included, beside those of a step
  of generate(); ratios are of one run, the median of several;
- for several N, how many of its tokens the guard forbids, as they end a run of more than N that stands in one document,
  and the change of perplexity of the others, whose share the forbidden tokens' probability becomes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from knnlm import KNNLM, load_model
from knnlm.config import KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.pipeline import build
from knnlm.text.corpus import read_documents

PROMPT, ANSWER, REPEATS, WINDOW, WINDOWS = 32, 64, 3, 256, 8
K, TEMPERATURE, LAMBDA = 1024, 10.0, 0.4


def milliseconds(work: Callable[[], object]) -> float:
    """Milliseconds for each token of an answer, the median of several runs."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken) / ANSWER * 1e3


def speed(model: KNNLM, tokens: list[int]) -> None:
    prompt = torch.tensor([tokens[:PROMPT]])
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
    answer = model.generate(prompt, **options)[0].tolist()
    memory, start = model.citer.memory(model.retrieval.searcher.store), time.perf_counter()
    assert memory.text is not None
    print(f"text sorted in {time.perf_counter() - start:.2f} s")
    guard = model.copy_guard(8)
    flat = torch.zeros(model.config.vocab_size) - float(np.log(model.config.vocab_size))
    cite = milliseconds(lambda: model.citer.tokens(answer, PROMPT, model.retrieval).whole)
    held = milliseconds(lambda: [guard.apply(answer[PROMPT : PROMPT + at], flat) for at in range(ANSWER)])
    step = milliseconds(lambda: model.generate(prompt, **options))
    print(f"a token: generate {step:.2f} ms, cited {cite:.2f} ms more, guarded {held:.2f} ms more")


def cost(model: KNNLM, windows: list[list[int]]) -> None:
    runs = (2, 4, 8, 16)
    log_probs = [model(torch.tensor([one[:-1]])).logits[0] for one in windows]
    for longest in runs:
        guard, forbidden, lost, plain = model.copy_guard(longest), 0, [], []
        for one, log_probs_TV in zip(windows, log_probs, strict=True):
            for place, log_probs_V in enumerate(log_probs_TV, 1):
                banned = guard.banned(one[:place])
                if one[place] in banned:
                    forbidden += 1
                    continue
                mass = float(log_probs_V[torch.from_numpy(banned).long()].double().exp().sum()) if len(banned) else 0.0
                lost.append(-np.log1p(-min(mass, 1 - 1e-9)))
                plain.append(float(log_probs_V[one[place]]))
        total = forbidden + len(lost)
        change = np.expm1(-np.mean(lost))
        told = f"max_copy {longest}: {forbidden / total:.2%} of {total:,} tokens forbidden, perplexity of the others"
        print(f"{told} {np.exp(-np.mean(plain)):.2f}, {change:+.2%}", flush=True)


def main() -> None:
    name, text, keys = sys.argv[1], sys.argv[2], int((sys.argv[3:] or ["100000"])[0])
    lm = load_model(name)
    documents = [document.text for document in read_documents([Path(text)])]
    settings = Settings(
        text=TextConfig(max_tokens=keys + len(documents)),
        layers=LayerConfig(layers="-1.ffn_input"),
        knn=KNNConfig(index="exact"),
    )
    with tempfile.TemporaryDirectory() as folder:
        training = Path(folder) / "train.jsonl"
        kept = [one for number, one in enumerate(documents) if number % 10 != 4]
        training.write_text("".join(json.dumps({"text": one}) + "\n" for one in kept), encoding="utf-8")
        store = build(lm, [training], Path(folder) / "store", settings=settings)
        model = KNNLM.from_store(store, None, min(K, store.count), TEMPERATURE, LAMBDA, lm=lm)
        held_out = [lm.encode(one).tolist() for one in documents[4::10]]
        windows = [one[:WINDOW] for one in held_out if len(one) >= WINDOW][:WINDOWS]
        print(f"{store.count:,} keys of {model.retrieval.searcher.index.dim} numbers, k {model.retrieval.setting.k}")
        speed(model, windows[0])
        cost(model, windows)


if __name__ == "__main__":
    main()

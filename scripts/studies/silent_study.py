"""What λ by the text so far is worth at home and costs elsewhere: the rows of docs/mixing.md.

    python scripts/studies/silent_study.py build --model MODEL --stores FOLDER --text TEXT
    python scripts/studies/silent_study.py measure --model MODEL --stores FOLDER --text TEXT... --elsewhere TEXT...

`build` holds a tenth of a text out and makes a datastore of the rest, as `knnlm build` does: k, T, λ and the gate are
fitted on text that it keeps back. `measure` reads each held-out part, and some of every other text, once, and mixes
with each datastore's own settings; no number is fitted here. Shapes: Q queries.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from layer_study import split_text

from knnlm.config import KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.evaluation.queries import Floats, Queries, open_queries
from knnlm.knn.retrieval import open_retrieval
from knnlm.knn.trust import log_probs_by_text
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.pipeline import build
from knnlm.statistics import relative_change
from knnlm.store.datastore import Datastore
from knnlm.text.corpus import read_documents, tokenize
from knnlm.text.held_out import take_slices
from knnlm.text.windows import window_config


def settings(args: argparse.Namespace) -> Settings:
    text = TextConfig(context=args.context, stride=args.context, max_tokens=args.max_tokens)
    return Settings(text=text, layers=LayerConfig(layers=args.layer), knn=KNNConfig(index="exact"))


def make_stores(lm: LanguageModel, args: argparse.Namespace) -> None:
    for text in args.text:
        folder = args.stores / text.stem
        folder.mkdir(parents=True, exist_ok=True)
        training, _ = split_text([text], folder)
        store = build(lm, [training], folder / "store", settings=settings(args))
        print(f"{text.stem}: {store.count:,} keys, {open_retrieval(store).setting}", flush=True)


def losses(store: Datastore, queries: Queries) -> Iterator[Floats]:
    """-log p of each target with the gate alone, and by the text so far."""
    retrieval = open_retrieval(store)
    vectors_QD = queries.vectors(retrieval.layer)
    search = retrieval.searcher.cached(vectors_QD, queries.targets_Q, retrieval.setting.k)
    for by_text in (False, True):
        setting = replace(retrieval.setting, by_text=by_text)
        yield -log_probs_by_text(search, queries.lm_Q, setting, queries.documents_Q)


def told(losses_Q: Floats, base_Q: Floats, queries: Queries) -> str:
    change, interval = relative_change(losses_Q, base_Q, queries.parts.clusters_Q)
    return f"{change:+.2%} ({interval.low:+.2%} … {interval.high:+.2%})"


def measure(lm: LanguageModel, args: argparse.Namespace) -> None:
    stores = {text.stem: Datastore.open(args.stores / text.stem / "store") for text in args.text}
    homes = {name: args.stores / name / "eval.jsonl" for name in stores}
    texts = homes | {path.stem: path for path in args.elsewhere}
    layers = sorted({layer for store in stores.values() for layer in store.layers})
    window = window_config(settings(args).text, lm.name, lm.context_limit)
    for text, path in texts.items():
        documents = take_slices(tokenize(read_documents([path]), lm.encode), args.eval_tokens, seed=0)
        with ExitStack() as stack:
            queries = stack.enter_context(open_queries(lm, documents, window, layers))
            lm_Q = -queries.lm_Q
            print(f"{text}: {len(lm_Q):,} tokens of {len(documents)} documents, LM {np.exp(lm_Q.mean()):.2f}")
            for name, store in stores.items():
                gate_Q, by_text_Q = losses(store, queries)
                more = "" if name != text else f", kept {(lm_Q - by_text_Q).mean() / (lm_Q - gate_Q).mean():.1%}"
                figures = f"gate {told(gate_Q, lm_Q, queries)}, by text {told(by_text_Q, lm_Q, queries)}"
                print(f"  store {name}: {figures}{more}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "measure"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--stores", type=Path, required=True)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--elsewhere", nargs="*", type=Path, default=())
    parser.add_argument("--layer", default="-1.ffn_input")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--eval-tokens", type=int, default=1500)
    args = parser.parse_args()
    lm = load_model(args.model)
    (make_stores if args.what == "build" else measure)(lm, args)


if __name__ == "__main__":
    main()

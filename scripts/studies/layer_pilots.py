"""Each layer's pilot and its full evaluation, on one text, so that any rule of choice can be judged.

    .venv/bin/python scripts/studies/layer_pilots.py --model MODEL --text nursing.jsonl --out study/smol.nursing
    .venv/bin/python scripts/studies/layer_rules.py study/smol.*

One pass over the training text gives all layers a dispersion and a sample, as in `knnlm run`, and stores keys of the
layers to evaluate. Those are searched exactly; k, lambda and temperature are fitted on each half of the held-out text.
With `--sizes`, `ffn_input` of all blocks is also evaluated in smaller stores, each a part of the next larger one:
folders `keys-SIZE` in the case's.
The same command goes on after a kill: with the store, and then with each layer. With more `--layers` it adds those to a
finished case.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layer_sample import write_scored
from layer_study import split_text
from numpy.typing import NDArray

from index.torch_threads import one_thread
from knnlm.config import TextConfig
from knnlm.evaluation.outcomes import cross_fit, cross_fitted_losses
from knnlm.evaluation.queries import Queries, open_queries
from knnlm.extraction.collect import collect
from knnlm.knn.mixing import Search
from knnlm.layer_names import select_layers
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.places import DATASTORE
from knnlm.scores.layer_scorer import LayerScorer
from knnlm.store.datastore import Datastore
from knnlm.store.writer import DatastoreWriter
from knnlm.text.corpus import read_documents, tokenize_measured
from knnlm.text.held_out import take_slices
from knnlm.text.windows import TokenDocument, WindowConfig, window_config

# Queries searched at a time, and keys in a group: the k nearest keys lie in the k groups with the smallest minima.
BLOCK, GROUP = 256, 8


def slices(lm: LanguageModel, path: Path, tokens: int) -> list[TokenDocument]:
    """`tokens` of a text, spread evenly over it."""
    return take_slices(tokenize_measured(read_documents([path]), lm.encode_with_ends), tokens, seed=0)


class SomeLayers(DatastoreWriter):
    """Writes keys of its own layers only, in a pass that scores all."""

    own: frozenset[str] = frozenset()

    def append_keys(self, layer: str, vectors_ND: NDArray[np.floating[Any]]) -> None:
        """As the base class, for the layers that it was begun with."""
        if layer in self.own:
            super().append_keys(layer, vectors_ND)


def make_store(
    lm: LanguageModel, documents: Sequence[TokenDocument], window: WindowConfig, layers: Sequence[str], out: Path
) -> None:
    """One pass: store the layers' keys, and write scores and pilots of all layers, unless the case has them."""
    dims, made = {name: lm.dims[name] for name in layers}, lm.fingerprint
    shutil.rmtree(out / "store", ignore_errors=True)
    scored = (out / "scores.json").exists()
    scorer = None if scored else LayerScorer(dict(lm.dims), head=lm.dims["final_norm"])
    with SomeLayers(out / "store", dims, fingerprint=made, context=window.context, stride=window.stride) as writer:
        writer.own = frozenset(layers)
        collect(lm, documents, window, lm.layer_names if scorer else layers, scorer=scorer, writer=writer)
        writer.finish()
    if scorer:
        write_scored(scorer, lm, out)


def nested_rows(store: Datastore, size: int) -> NDArray[np.int64]:
    """The first `size` rows of the documents in random order: those of a smaller size are some of a larger one's."""
    starts = store.documents[:, 0]
    ends = np.append(starts[1:], store.count)
    order = np.random.default_rng(0).permutation(len(starts))
    return np.concatenate([np.arange(starts[place], ends[place]) for place in order])[:size]


def searched(
    store: Datastore, queries: Queries, layer: str, k: int, sizes: Sequence[int] = ()
) -> Iterator[tuple[int, Search]]:
    """The k nearest keys of each query, in float32: among all keys, and among those of each size."""
    keys = store.keys(layer)
    keys_ND = torch.from_numpy(keys.read(0, len(keys)))
    query_QD, values_N = torch.from_numpy(queries.vectors(layer) - keys.centre), np.asarray(store.values)
    for size in (*sizes, store.count):
        rows_N = slice(None) if size == store.count else nested_rows(store, size)
        parts = _blocks(keys_ND[rows_N], query_QD, min(k, size))
        ids_QK = torch.cat([ids for _, ids in parts]).numpy()
        hits_QK = values_N[rows_N][ids_QK] == queries.targets_Q[:, None]
        yield size, Search(torch.cat([distances for distances, _ in parts]).numpy(), hits_QK)


def _blocks(keys_ND: torch.Tensor, query_QD: torch.Tensor, k: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Squared distances and places of the nearest keys, by blocks of queries."""
    pad = -len(keys_ND) % GROUP
    half_N = torch.nn.functional.pad(keys_ND.square().sum(1) / 2, (0, pad), value=torch.inf)
    keys_DN = torch.nn.functional.pad(keys_ND, (0, 0, 0, pad)).T

    def nearest(block_QD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half_QN = torch.addmm(half_N, block_QD, keys_DN, alpha=-1)
        least_QG = half_QN.view(len(block_QD), GROUP, -1).amin(1)
        groups_QK = least_QG.topk(min(k, least_QG.shape[1]), largest=False, sorted=False).indices
        places = (groups_QK[:, None] + least_QG.shape[1] * torch.arange(GROUP)[None, :, None]).flatten(1)
        found = half_QN.gather(1, places).topk(k, largest=False)
        distances = (2 * found.values + block_QD.square().sum(1, keepdim=True)).clamp_(min=0)
        return distances, places.gather(1, found.indices)

    # A thread for each core, as those inside a step wait for one another on a machine that others use.
    cores = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(cores) as pool:
        return list(pool.map(nearest, torch.split(query_QD, BLOCK)))


def fitted(search: Search, queries: Queries) -> dict[str, NDArray[np.float32] | float]:
    """Cross-fitted losses of one layer, and the losses by which a best layer is picked on either half."""
    parts = queries.parts
    mine, swapped = cross_fit(search, queries.lm_Q, parts)
    return {
        "losses": cross_fitted_losses(mine, swapped, parts).astype(np.float32),
        "tuning_loss": float(mine.losses_Q[parts.tuning_Q].mean()),
        "swapped_loss": float(swapped.losses_Q[parts.fitting_Q].mean()),
        "k": mine.mix.k,
    }


def evaluate(store: Datastore, queries: Queries, layers: Sequence[str], args: argparse.Namespace) -> None:
    """Write `common.npz`, and one .npz for each layer and size."""
    parts, sizes = queries.parts, [size for size in args.sizes if size < store.count]
    common = {"lm": queries.lm_Q, "tuning": parts.tuning_Q, "fitting": parts.fitting_Q, "clusters": parts.clusters_Q}
    folders = {store.count: args.out} | {size: args.out / f"keys-{size}" for size in sizes}
    for size, folder in folders.items():
        folder.mkdir(exist_ok=True)
        np.savez(folder / "common.npz", keys=size, **common)
    for layer in layers:
        smaller = sizes if layer.endswith(".ffn_input") else ()
        for size, search in searched(store, queries, layer, args.max_k, smaller):
            np.savez(folders[size] / f"layer-{layer}.npz", **fitted(search, queries))


def main() -> None:
    """Read the options, and write the case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", default="all", help="layers to evaluate in full")
    parser.add_argument("--sizes", type=int, nargs="*", default=(), help="smaller stores, for `ffn_input`")
    parser.add_argument("--keys", type=int, default=60_000)
    parser.add_argument("--eval-tokens", type=int, default=2500)
    parser.add_argument("--max-k", type=int, default=512)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lm = load_model(args.model, dtype=args.dtype)
    layers, window = select_layers(args.layers, lm.layer_names), window_config(TextConfig(), lm.name, lm.context_limit)
    training, held_out = split_text([args.text], args.out)
    missing = [layer for layer in layers if not (args.out / f"layer-{layer}.npz").exists()]
    if not ((args.out / "scores.json").exists() and (args.out / "store" / DATASTORE).exists()):
        make_store(lm, slices(lm, training, args.keys), window, missing, args.out)
    store = Datastore.open(args.out / "store")
    with open_queries(lm, slices(lm, held_out, args.eval_tokens), window, missing) as queries:
        evaluate(store, queries, missing, args)
    shutil.rmtree(args.out / "store")


if __name__ == "__main__":
    main()

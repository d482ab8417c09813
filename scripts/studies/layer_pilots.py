"""Each layer's pilot and its full evaluation, on one text, so that any rule of choice can be judged.

    .venv/bin/python scripts/studies/layer_pilots.py --model MODEL --text nursing.jsonl --out study/smol.nursing
    .venv/bin/python scripts/studies/layer_rules.py study/smol.*

A pass over the training text gives all layers a dispersion and a sample, as in `knnlm run`; a second one stores keys of
the layers to evaluate. Those are searched exactly; k, lambda and temperature are fitted on each half of the
held-out text.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from layer_study import split_text
from numpy.typing import NDArray

from knnlm.config import TextConfig
from knnlm.evaluation.outcomes import cross_fit, cross_fitted_losses
from knnlm.evaluation.piloting import pilots_of
from knnlm.evaluation.queries import Queries, open_queries
from knnlm.extraction.collect import collect
from knnlm.knn.mixing import Search
from knnlm.layer_names import select_layers
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.scores.layer_scorer import FOR_CHOICE, LayerScorer
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


def make_store(
    lm: LanguageModel, documents: Sequence[TokenDocument], window: WindowConfig, layers: Sequence[str], out: Path
) -> Datastore:
    """Store the layers' keys, and write scores and pilots of all layers to `scores.json` and `pilots.npz`."""
    scorer = LayerScorer(dict(lm.dims), head=lm.dims["final_norm"])
    collect(lm, documents, window, lm.layer_names, scorer=scorer)
    pilots, measure = {}, pilots_of(lm, scorer.head, seed=scorer.seed)
    scores = scorer.scores(measure_pilot=measure, only=FOR_CHOICE)
    for one in scores:
        pilots[one.layer] = scorer.pilot_of(one.layer)
    losses = {name: pilot.losses_Q for name, pilot in pilots.items()}
    np.savez(out / "pilots.npz", cluster=next(iter(pilots.values())).cluster_Q, **losses)
    (out / "scores.json").write_text(json.dumps([asdict(one) for one in scores]), encoding="utf-8")
    dims, made = {name: lm.dims[name] for name in layers}, lm.fingerprint
    with DatastoreWriter(out / "store", dims, fingerprint=made, context=window.context, stride=window.stride) as writer:
        collect(lm, documents, window, layers, writer=writer)
        writer.finish()
    return Datastore.open(out / "store")


def searched(store: Datastore, queries: Queries, layer: str, k: int) -> Search:
    """The k nearest keys of each query, in float32."""
    keys = store.keys(layer)
    keys_ND = torch.from_numpy(keys.read(0, len(keys)))
    query_QD = torch.from_numpy(queries.vectors(layer) - keys.centre)
    parts = list(_blocks(keys_ND, query_QD, min(k, len(keys_ND))))
    ids_QK = torch.cat([ids for _, ids in parts]).numpy()
    hits_QK = np.asarray(store.values)[ids_QK] == queries.targets_Q[:, None]
    return Search(torch.cat([distances for distances, _ in parts]).numpy(), hits_QK)


def _blocks(keys_ND: torch.Tensor, query_QD: torch.Tensor, k: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Squared distances and places of the nearest keys, by blocks of queries."""
    pad = -len(keys_ND) % GROUP
    half_N = torch.nn.functional.pad(keys_ND.square().sum(1) / 2, (0, pad), value=torch.inf)
    keys_DN = torch.nn.functional.pad(keys_ND, (0, 0, 0, pad)).T
    for block_QD in torch.split(query_QD, BLOCK):
        half_QN = torch.addmm(half_N, block_QD, keys_DN, alpha=-1)
        least_QG = half_QN.view(len(block_QD), GROUP, -1).amin(1)
        groups_QK = least_QG.topk(min(k, least_QG.shape[1]), largest=False, sorted=False).indices
        places = (groups_QK[:, None] + least_QG.shape[1] * torch.arange(GROUP)[None, :, None]).flatten(1)
        found = half_QN.gather(1, places).topk(k, largest=False)
        distances = (2 * found.values + block_QD.square().sum(1, keepdim=True)).clamp_(min=0)
        yield distances, places.gather(1, found.indices)


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


def main() -> None:
    """Read the options, and write one .npz for each layer that is evaluated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", default="all", help="layers to evaluate in full")
    parser.add_argument("--keys", type=int, default=60_000)
    parser.add_argument("--eval-tokens", type=int, default=2500)
    parser.add_argument("--max-k", type=int, default=512)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    lm = load_model(args.model, dtype=args.dtype)
    layers, window = select_layers(args.layers, lm.layer_names), window_config(TextConfig(), lm.name, lm.context_limit)
    training, held_out = split_text([args.text], args.out)
    store = make_store(lm, slices(lm, training, args.keys), window, layers, args.out)
    with open_queries(lm, slices(lm, held_out, args.eval_tokens), window, layers) as queries:
        parts = queries.parts
        common = {
            "lm": queries.lm_Q,
            "tuning": parts.tuning_Q,
            "fitting": parts.fitting_Q,
            "clusters": parts.clusters_Q,
        }
        np.savez(args.out / "common.npz", keys=store.count, **common)
        for layer in layers:
            np.savez(args.out / f"layer-{layer}.npz", **fitted(searched(store, queries, layer, args.max_k), queries))
    shutil.rmtree(args.out / "store")


if __name__ == "__main__":
    main()

"""The neighbours' part in a language model's predictions: which layer, index and setting, and the mixing of all tokens.

Shapes: B rows, N positions, Q those of them that are searched for, D dimension, K neighbours, V vocabulary, M pairs of
a position and a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm.config import KNNConfig
from knnlm.datastore import Datastore
from knnlm.errors import InputError
from knnlm.probability import Mix, TokenShares, mix, token_shares
from knnlm.search import QUERY_BLOCK, LayerSearcher, built_with, check_k, open_searcher


@dataclass(frozen=True)
class Retrieval:
    """A layer's keys with what searches them, and the setting of the kNN-LM."""

    searcher: LayerSearcher
    setting: Mix

    @property
    def layer(self) -> str:
        """Whose vectors are the queries."""
        return self.searcher.layer

    def mix_in(self, log_probs_NV: Tensor, rows_Q: Tensor, vectors_QD: Tensor) -> None:
        """Turn the plain LM's log-probabilities into the mixed ones, in place, at the rows that are searched for.

        A position without any neighbour, as a poor index may leave one, keeps the plain LM's.
        """
        if self.setting.lam == 0:
            return
        for start in range(0, len(rows_Q), QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            self._mix_block(log_probs_NV, rows_Q[block], self.shares(vectors_QD[block]))

    def shares(self, vectors_QD: Tensor) -> TokenShares:
        """p_kNN of raw vectors of the layer."""
        queries_QD = vectors_QD.float().cpu().numpy()
        found = self.searcher.neighbors(queries_QD, self.setting.k)
        return token_shares(found.distances_QK, self.searcher.store.values[found.ids_QK], self.setting.temperature)

    def _mix_block(self, log_probs_NV: Tensor, rows_Q: Tensor, shares: TokenShares) -> None:
        device, lam = log_probs_NV.device, self.setting.lam
        rows_M = rows_Q[torch.from_numpy(shares.rows_M).to(rows_Q.device)].to(device)
        tokens_M = torch.from_numpy(shares.tokens_M).to(device)
        mixed_M = mix(log_probs_NV[rows_M, tokens_M].double().cpu().numpy(), shares.log_probs_M, lam)
        # What no neighbour votes for. An expanded tensor: no copy of the rows is made.
        found_Q = rows_Q[np.unique(shares.rows_M)].to(device)
        rest = log_probs_NV.new_tensor(math.log1p(-lam) if lam < 1 else -math.inf)
        log_probs_NV.index_add_(0, found_Q, rest.expand(len(found_Q), log_probs_NV.shape[1]))
        log_probs_NV[rows_M, tokens_M] = torch.from_numpy(mixed_M).to(log_probs_NV)


@dataclass(frozen=True)
class RowRetrieval(Retrieval):
    """A setting of its own for each row of a batch, which has the same number of positions in every row."""

    settings_B: tuple[Mix, ...]

    def mix_in(self, log_probs_NV: Tensor, rows_Q: Tensor, vectors_QD: Tensor) -> None:
        """As `Retrieval.mix_in`: one search for each of the different settings."""
        positions = len(log_probs_NV) // len(self.settings_B)
        owners_Q = (rows_Q // positions).tolist()
        for setting in dict.fromkeys(self.settings_B):
            chosen_Q = torch.tensor([self.settings_B[owner] == setting for owner in owners_Q], dtype=torch.bool)
            same = Retrieval(self.searcher, setting)
            same.mix_in(log_probs_NV, rows_Q[chosen_Q.to(rows_Q.device)], vectors_QD[chosen_Q.to(vectors_QD.device)])


def open_retrieval(
    store: Datastore,
    layer: str | None = None,
    k: int | None = None,
    temperature: float | None = None,
    lam: float | None = None,
) -> Retrieval:
    """What is not given is what the datastore's evaluation fitted; the layer is the chosen one.

    :raises InputError: something is neither given nor fitted, or no layer was chosen among several; a wrong value.
    :raises DatastoreMismatch: the layer is not stored.
    """
    layer = layer or _chosen_layer(store)
    metric = str(store.manifest.indexes.get(layer, built_with(store)).get("metric", "l2"))
    searcher = open_searcher(store, layer, metric)
    setting = _setting(store, layer, KNNConfig(k=k, temperature=temperature, lam=lam, metric=metric))
    check_k(setting.k, store.count)
    return Retrieval(searcher, setting)


def _chosen_layer(store: Datastore) -> str:
    scores = store.manifest.scores
    chosen = (scores.get("choice") or {}).get("layer") if isinstance(scores, Mapping) else None
    if chosen in store.layers:
        return str(chosen)
    if len(store.layers) == 1:
        return store.layers[0]
    raise InputError(f"no layer was chosen for {store.folder}; take --layer with one of {', '.join(store.layers)}")


def _setting(store: Datastore, layer: str, given: KNNConfig) -> Mix:
    fitted = (store.manifest.fitted or {}).get(layer, {})
    values: dict[str, Any] = {
        "k": given.k if given.k is not None else fitted.get("k"),
        "temperature": given.temperature if given.temperature is not None else fitted.get("temperature"),
        "lambda": given.lam if given.lam is not None else fitted.get("lambda"),
    }
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if missing:
        raise InputError(
            f"nothing was fitted for {layer} of {store.folder}; give {', '.join(missing)} (knnlm eval prints them)"
        )
    return Mix(int(values["k"]), float(values["temperature"]), float(values["lambda"]))

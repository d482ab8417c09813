"""Retrieval in generation: the layer, index and setting in use, and the mixture over the whole vocabulary.

Shapes: B rows, N positions, Q positions that are searched for, D dimension, K neighbours, V vocabulary, M pairs of a
position and a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm.config import KNNConfig
from knnlm.errors import InputError
from knnlm.knn.joint import Searcher, open_search
from knnlm.knn.mixing import (
    NEAREST,
    Floats,
    Gate,
    Mix,
    Search,
    TokenShares,
    knn_log_probs,
    mix,
    token_shares,
)
from knnlm.knn.searcher import QUERY_BLOCK, OpenIndex, built_with, check_k
from knnlm.knn.trust import token_gains
from knnlm.memory import LEAST_WORK
from knnlm.store.datastore import Datastore
from knnlm.store.joint import AnyStore


@dataclass(frozen=True, eq=False)
class Found:
    """The neighbours of some queries."""

    distances_QK: NDArray[np.float32]
    """Ascending; +inf for an absent one."""
    values_QK: NDArray[np.integer[Any]]
    """Their tokens, -1 for an absent one."""

    def rows(self, chosen_Q: NDArray[np.bool_]) -> Found:
        """Return the neighbours of some of the queries."""
        return Found(self.distances_QK[chosen_Q], self.values_QK[chosen_Q])


@dataclass(frozen=True)
class Retrieval:
    """A layer's keys with their searcher, and the setting of the kNN-LM."""

    searcher: Searcher
    setting: Mix

    @property
    def layer(self) -> str:
        """The layer whose vectors are the queries."""
        return self.searcher.layer

    def mix_in(self, log_probs_NV: Tensor, rows_Q: Tensor, vectors_QD: Tensor) -> None:
        """Replace the plain LM's log-probabilities by the mixed ones, in place, at the rows that are searched for.

        A position for which the index finds no neighbour keeps the plain LM's.
        """
        if self.setting.lam == 0:
            return
        for start in range(0, len(rows_Q), QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            found = self.find(vectors_QD[block])
            self.mix_shares(log_probs_NV, rows_Q[block], self.shares(found), self.lambdas(found))

    def of_rows(self, rows: int) -> tuple[Retrieval, ...]:
        """Return the retrieval of each of a batch's rows."""
        return (self,) * rows

    def find(self, vectors_QD: Tensor) -> Found:
        """Search for raw vectors of the layer."""
        found = self.searcher.neighbors(vectors_QD.float().cpu().numpy(), self.setting.k)
        values_QK = np.where(found.ids_QK >= 0, self.searcher.store.values[found.ids_QK], -1)
        return Found(found.distances_QK, values_QK)

    def shares(self, found: Found) -> TokenShares:
        """p_kNN of each query."""
        return token_shares(found.distances_QK, np.maximum(found.values_QK, 0), self.setting.temperature)

    def lambdas(self, found: Found) -> Floats:
        """Lambda of each query at full trust, [Q]; 0 without any neighbour."""
        lambdas_Q = self.setting.lambdas(found.distances_QK, found.values_QK[:, :NEAREST])
        return np.where(np.isfinite(found.distances_QK[:, 0]), lambdas_Q, 0.0)

    def gains(self, found: Found, targets_Q: NDArray[np.integer[Any]], lm_log_probs: Floats) -> Floats:
        """Log p of each target in the mixture at full trust, minus log p_LM, [Q]: what moves the trust."""
        search = Search(found.distances_QK, found.values_QK == targets_Q[:, None])
        knn_Q = knn_log_probs(search, self.setting.k, self.setting.temperature)
        return token_gains(mix(lm_log_probs, knn_Q, self.lambdas(found)), lm_log_probs)

    def gains_at(self, vectors_QD: Tensor, targets_Q: NDArray[np.integer[Any]], lm_log_probs: Floats) -> Floats:
        """As `gains`, of raw vectors of the layer, which are searched for."""
        starts = range(0, len(vectors_QD), QUERY_BLOCK)
        blocks = [slice(start, start + QUERY_BLOCK) for start in starts]
        return np.concatenate(
            [self.gains(self.find(vectors_QD[one]), targets_Q[one], lm_log_probs[one]) for one in blocks]
        )

    def mix_shares(self, log_probs_NV: Tensor, rows_Q: Tensor, shares: TokenShares, lambdas_Q: Floats) -> None:
        """As `mix_in`, of what was found, with these lambdas."""
        device = log_probs_NV.device
        rows_M = rows_Q[torch.from_numpy(shares.rows_M).to(rows_Q.device)].to(device)
        tokens_M = torch.from_numpy(shares.tokens_M).to(device)
        lm_M = log_probs_NV[rows_M, tokens_M].double().cpu().numpy()
        mixed_M = mix(lm_M, shares.log_probs_M, lambdas_Q[shares.rows_M])
        # First the tokens without a neighbour. The tensor is expanded, so no rows are copied.
        found = np.unique(shares.rows_M)
        with np.errstate(divide="ignore"):
            rest_Q1 = torch.from_numpy(np.log1p(-lambdas_Q[found])[:, None]).to(log_probs_NV)
        log_probs_NV.index_add_(0, rows_Q[found].to(device), rest_Q1.expand(-1, log_probs_NV.shape[1]))
        log_probs_NV[rows_M, tokens_M] = torch.from_numpy(mixed_M).to(log_probs_NV)


@dataclass(frozen=True)
class RowRetrieval(Retrieval):
    """Retrieval with one for each row of a batch, all of one layer; every row has the same number of positions."""

    retrievals_B: tuple[Retrieval, ...]

    def of_rows(self, rows: int) -> tuple[Retrieval, ...]:
        """Return the retrieval of each row."""
        return self.retrievals_B

    def mix_in(self, log_probs_NV: Tensor, rows_Q: Tensor, vectors_QD: Tensor) -> None:
        """As `Retrieval.mix_in`, with one search for each distinct retrieval."""
        positions = len(log_probs_NV) // len(self.retrievals_B)
        owners_Q = (rows_Q // positions).tolist()
        for one in dict.fromkeys(self.retrievals_B):
            chosen_Q = torch.tensor([self.retrievals_B[owner] == one for owner in owners_Q], dtype=torch.bool)
            one.mix_in(log_probs_NV, rows_Q[chosen_Q.to(rows_Q.device)], vectors_QD[chosen_Q.to(vectors_QD.device)])


def open_retrieval(
    store: AnyStore,
    layer: str | None = None,
    k: int | None = None,
    temperature: float | None = None,
    lam: float | None = None,
    memory: float | None = None,
    opening: OpenIndex | None = None,
) -> Retrieval:
    """Open the retrieval of a layer, by default the chosen one; settings default to those fitted by an evaluation.

    A given lambda is the same for all queries; the fitted one varies with the query, by the gate fitted with it, and
    with the text so far. Of several datastores the first gives the layer and the settings.

    :param memory: bytes that the process may take; with it, searches take `knnlm.memory.LEAST_WORK` each.
    :param opening: as in `open_searcher`.
    :raises InputError: a setting is neither given nor fitted, a value is invalid, or no layer was chosen among several.
    :raises DatastoreMismatch: the layer is not stored, in one of them.
    """
    layer = layer or _chosen_layer(store.first)
    metric = search_metric(store.first, layer)
    searcher = open_search(store, layer, metric, opening=opening)
    if memory is not None:  # how much the model will leave is not known yet, and generation has few queries
        for one in searcher.searchers:
            one.index.work_bytes = LEAST_WORK
    setting = _setting(store.first, layer, KNNConfig(k=k, temperature=temperature, lam=lam, metric=metric))
    check_k(setting.k, store.count)
    return Retrieval(searcher.at(setting.temperature), setting)


def search_metric(store: Datastore, layer: str) -> str:
    """Return the metric that a layer is searched with: its index's, else the one that the datastore was built with."""
    return str(store.manifest.indexes.get(layer, built_with(store)).get("metric", "l2"))


def _chosen_layer(store: Datastore) -> str:
    scores = store.manifest.scores
    chosen = (scores.get("choice") or {}).get("layer") if isinstance(scores, Mapping) else None
    if chosen in store.layers:
        return str(chosen)
    if len(store.layers) == 1:
        return store.layers[0]
    raise InputError(f"no layer was chosen for {store.folder}; name one with `layer`: {', '.join(store.layers)}")


def _setting(store: Datastore, layer: str, given: KNNConfig) -> Mix:
    fitted = (store.manifest.fitted or {}).get(layer, {})
    values: dict[str, Any] = {
        "k": given.k if given.k is not None else fitted.get("k"),
        "temperature": given.temperature if given.temperature is not None else fitted.get("temperature"),
        "lam": given.lam if given.lam is not None else fitted.get("lambda"),
    }
    missing = [f"`{name}`" for name, value in values.items() if value is None]
    if missing:
        raise InputError(
            f"nothing was fitted for {layer} of {store.folder}; give {', '.join(missing)} (`knnlm.evaluate` fits them)"
        )
    # Datastores of older versions have no gate.
    gate = None if given.lam is not None else fitted.get("gate")
    return Mix(
        int(values["k"]),
        float(values["temperature"]),
        float(values["lam"]),
        gate and Gate(float(gate["offset"]), float(gate["distance"]), float(gate["different"])),
        by_text=bool(gate),
    )

"""`KNNLM`: a causal LM of `transformers` whose every forward pass gives the mixed distribution.

A class is made for the model's own class, so that caches, positions and the preparation of inputs stay what its
architecture needs, and `generate()` works unchanged. The object shares the weights of the given model and has modules
of its own: the given model never sees a hook.

Shapes: B batch, T time, D dimension, N positions (B x T), Q those of them that are searched for, V vocabulary.
"""

# ruff: noqa: ANN401 - arguments and outputs of forward are the architecture's own
from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from knnlm.errors import InputError, ModelError
from knnlm.knn.retrieval import Retrieval, open_retrieval
from knnlm.layer_names import FINAL, check_names
from knnlm.model.decoder import find_decoder
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.store.datastore import Datastore, as_datastore

IGNORED = -100
"""The label of a position that has no part in the loss, in `transformers`."""


class KNNLM:
    """A kNN-LM that is a language model like any other: `KNNLM.from_store(STORE)`, then `generate()`, or call it.

    Besides what is here it has everything of the model's own class. The logits are log-probabilities, float32, at every
    position that the attention mask does not hide; those of padding are the plain LM's. A forward pass has no gradient.
    """

    generation_config: Any
    """A copy of the model's."""
    tokenizer: Any
    """The model's own."""
    retrieval: Retrieval
    """Layer, index and setting; another one of the same layer may take its place."""
    _plain: _Plain

    @classmethod
    def from_store(
        cls,
        store: str | Path | Datastore,
        layer: str | None = None,
        k: int | None = None,
        temperature: float | None = None,
        lam: float | None = None,
        *,
        lm: LanguageModel | None = None,
    ) -> KNNLM:
        """The datastore's model with the memory that the datastore is.

        :param layer: whose keys are searched; the chosen one.
        :param k: as `temperature` and `lam`: what the datastore's evaluation fitted for the layer.
        :param lm: the model, where it is in memory or no longer where the datastore says. Its weights are shared.
        :raises InputError: something is neither given nor fitted; a value that cannot be.
        :raises DatastoreMismatch: the datastore was made with another model, or has no such layer.
        :raises ModelError: the model is wrapped, as adapters are by peft.
        """
        store = as_datastore(store)
        retrieval = open_retrieval(store, layer, k, temperature, lam)
        return cls.from_retrieval(lm or load_model(store.manifest.model), retrieval)

    @staticmethod
    def from_retrieval(lm: LanguageModel, retrieval: Retrieval) -> KNNLM:
        """A model with the memory that `open_retrieval` opened. Raises as `from_store`."""
        _check_kind(type(lm.model))
        retrieval.searcher.store.check_model(lm.fingerprint)
        check_names([retrieval.layer], lm.layer_names)
        model: Any = _own_modules(lm.model)
        plain = _Plain(model)
        model.__class__ = _class_for(cast(Any, type(lm.model)))
        model.tokenizer, model.retrieval, model._plain = lm.tokenizer, retrieval, plain
        return cast(KNNLM, model)

    def __repr__(self) -> str:
        kind, mix, store = f"KNNLM[{type(self).__name__}]", self.retrieval.setting, self.retrieval.searcher.store
        return (
            f"{kind}: the model of {store.manifest.model} with the memory {store.folder}\n"
            f"  keys of {self.retrieval.layer}, {store.count:,}; k {mix.k}, λ {mix.lam:.3g}"
            f"{', moved by the query' if mix.gate else ''}, T {mix.temperature:.4g}"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own forward, whose arguments it takes, with the mixed distribution's log-probabilities.

        With `labels` the loss is the mixed distribution's. `logits_to_keep` is a number of last positions, or a list of
        positions: only these are searched for.
        """
        given = self._plain.named(args) | kwargs
        as_tuple = given.pop("return_dict", None) is False
        labels, finished = given.pop("labels", None), given.pop("finished_rows", None)
        keep = _Keep(given.get("logits_to_keep", 0))
        with torch.no_grad():
            output, vectors_BTD = self._plain.run(given, self.retrieval.layer, keep)
            log_probs_NV = torch.log_softmax(output.logits.flatten(0, 1).float(), dim=-1)
            rows_Q = _searched_rows(output.logits.shape[:2], keep, given, finished).to(vectors_BTD.device)
            self.retrieval.mix_in(log_probs_NV, rows_Q, vectors_BTD.flatten(0, 1)[rows_Q])
            log_probs_BTV = log_probs_NV.view(output.logits.shape)
        loss = {} if labels is None else {"loss": _loss(log_probs_BTV, keep(labels))}
        mixed = type(output)(**{**output, "logits": log_probs_BTV, **loss})
        return mixed.to_tuple() if as_tuple else mixed

    def unmixed(self, tokens_BT: Tensor, past: Any = None) -> tuple[Any, Tensor]:
        """The plain LM's output and the layer's vectors [B, T, D], for whoever mixes a few positions only.

        :param past: the cache of an earlier output (`past_key_values`), after whose tokens these come.
        """
        cached = {} if past is None else {"past_key_values": past, "use_cache": True}
        with torch.no_grad():
            return self._plain.run({"input_ids": tokens_BT, **cached}, self.retrieval.layer, _Keep(0))

    def _sample(self, *args: Any, stopping_criteria: Any, **kwargs: Any) -> Any:
        """Greedy search and sampling: `forward` is told which rows are finished, and does not search for them."""
        watched = _Watched(stopping_criteria)
        return cast(Any, super())._sample(*args, stopping_criteria=watched, finished_rows=watched, **kwargs)

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """A search is nothing that torch.compile could compile."""
        return False

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102
        def __getattr__(self, name: str) -> Any: ...


def _check_kind(kind: type[nn.Module]) -> None:
    """A wrapper's generate() is that of the model inside, which would silently go on without the memory."""
    if not hasattr(kind, "_sample"):
        raise ModelError(
            f"{kind.__name__} does not generate itself, as a wrapper around a model; give the model inside, of an "
            "adapter with its weights merged (merge_and_unload)"
        )


def _own_modules(model: nn.Module) -> nn.Module:
    """Copy a model's modules and share its weights: hooks on the copy are none on the model, in any thread."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, cast(dict[int, Any], shared))


@cache
def _class_for(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass for a class of model. `generate()` looks at the signature of forward, and at names of classes."""

    @wraps(kind.forward)
    def forward(self: KNNLM, *args: Any, **kwargs: Any) -> Any:
        return KNNLM.forward(self, *args, **kwargs)

    members = {"forward": forward, "__module__": __name__, "__qualname__": f"KNNLM[{kind.__name__}]"}
    return type(kind.__name__, (KNNLM, kind), members)


class _Plain:
    """The model without its memory: its own forward, with hooks while it runs."""

    def __init__(self, model: nn.Module) -> None:
        self._names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        # accelerate puts a forward of its own into the object, where it would hide that of the class.
        self._forward: Callable[..., Any] = vars(model).pop("forward", model.forward)
        self._decoder = find_decoder(model)
        self._lock = Lock()

    def named(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """Positional arguments of forward by their names."""
        return dict(zip(self._names, args, strict=False))

    def run(self, given: Mapping[str, Any], layer: str, keep: _Keep) -> tuple[Any, Tensor]:
        """The plain model's output, and the layer's vectors [B, T, D] at the positions that have logits."""
        received: list[Tensor] = []
        # The model itself keeps these positions only of what enters its head.
        kept: Callable[[Tensor], Tensor] = Tensor.detach if layer == FINAL else keep

        def take(_: str, vectors_BTD: Tensor) -> None:
            received.append(kept(vectors_BTD).clone())

        # Hooks of two threads would take each other's vectors.
        with self._lock, self._decoder.attach([layer], take):
            output = self._forward(**given, return_dict=True)
        return output, received[-1]


class _Keep:
    """`logits_to_keep` of transformers: the positions, of every row, that get logits."""

    def __init__(self, logits_to_keep: int | Tensor) -> None:
        if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim != 1:
            shape = tuple(logits_to_keep.shape)
            raise InputError(f"logits_to_keep has the shape {shape}; give a number, or the same positions for all rows")
        self._keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep or None, None)

    def __call__(self, tensor_BT: Tensor) -> Tensor:
        """What is kept of a tensor [B, T, ...]."""
        return tensor_BT[:, self._keep]


def _searched_rows(shape_BT: Sequence[int], keep: _Keep, given: Mapping[str, Any], finished: _Watched | None) -> Tensor:
    """The places, among all positions with logits, that are neither padding nor of a finished row: int64 [Q]."""
    searched_BT = torch.ones(tuple(shape_BT), dtype=torch.bool)
    mask_BT, length = given.get("attention_mask"), _length(given)
    # A mask of 4 dimensions, which a static cache takes, does not tell what is padding.
    if isinstance(mask_BT, Tensor) and mask_BT.ndim == 2 and mask_BT.shape[1] >= length:
        searched_BT &= keep(mask_BT[:, mask_BT.shape[1] - length :].bool().cpu())
    if finished is not None and finished.rows_B is not None:
        searched_BT &= ~finished.rows_B.cpu()[:, None]
    return searched_BT.flatten().nonzero()[:, 0]


def _length(given: Mapping[str, Any]) -> int:
    """T of a forward pass: of the new tokens, without those in the cache."""
    entering = given.get("input_ids")
    return int((given["inputs_embeds"] if entering is None else entering).shape[1])


def _loss(log_probs_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean -log p of the labels that follow each position, as every causal LM of transformers shifts them."""
    targets = labels_BT[:, 1:].flatten().to(log_probs_BTV.device)
    return nn.functional.nll_loss(log_probs_BTV[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED)


class _Watched:
    """The stopping criteria of one `generate()`, which remember the rows that they stopped.

    Only where there is an end token: without one, transformers goes on with rows that other criteria have stopped.
    """

    rows_B: Tensor | None = None

    def __init__(self, criteria: Any) -> None:
        self._criteria = criteria
        self._pads = any(hasattr(one, "eos_token_id") for one in criteria)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        stopped_B: Tensor = self._criteria(*args, **kwargs)
        if self._pads:
            self.rows_B = stopped_B if self.rows_B is None else self.rows_B | stopped_B
        return stopped_B

    def __iter__(self) -> Iterator[Any]:
        return iter(self._criteria)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._criteria, name)

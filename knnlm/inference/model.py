"""`KNNLM`: a causal LM of `transformers` whose forward pass returns the mixed distribution.

It is a subclass of the model's own class, so that caches, positions and input preparation suit the architecture, and
`generate()` works unchanged. The object shares the weights of the given model but has its own modules: no hook is
ever attached to the given model.

Shapes: B batch, T time, D dimension, N positions (B x T), Q searched positions, V vocabulary.
"""

# ruff: noqa: ANN401 - arguments and outputs of forward are the architecture's own
from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from knnlm.errors import InputError, ModelError
from knnlm.inference.by_text import Read, RowPlan, TextMemory, texts_so_far
from knnlm.inference.cite import Citations, Citer
from knnlm.inference.copying import CopyGuard
from knnlm.inference.own_model import own_model
from knnlm.knn.retrieval import Retrieval, open_retrieval
from knnlm.layer_names import FINAL, check_names
from knnlm.model.decoder import find_decoder, find_head
from knnlm.model.head import log_softmax
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.store.joint import GivenStores, as_store
from knnlm.store.tokens import check_tokens

IGNORED = -100
"""Label of a position that `transformers` leaves out of the loss."""


class KNNLM:
    """A kNN-LM with the interface of its `transformers` model: `KNNLM.from_store(STORE)`, then `generate()` or a call.

    It has all attributes of the model's own class. Its logits are mixed log-probabilities, float32; at padding they are
    the plain LM's log-probabilities. Forward passes are without gradients.
    """

    generation_config: Any
    """A copy of the model's."""
    tokenizer: Any
    """The model's own."""
    retrieval: Retrieval
    """Layer, index and setting; may be replaced by another `Retrieval` of the same layer."""
    citer: Citer
    """Finds the documents behind tokens."""
    texts: TextMemory
    """What is known of the texts that were read last, where λ is by the text so far."""
    _plain: _Plain

    @classmethod
    def from_store(
        cls,
        store: GivenStores,
        layer: str | None = None,
        k: int | None = None,
        temperature: float | None = None,
        lam: float | None = None,
        *,
        lm: LanguageModel | None = None,
    ) -> KNNLM:
        """Combine a datastore with the model that it was made with.

        :param store: a datastore or its folder, or several, whose neighbours are merged (`knnlm.open_datastores`).
        :param layer: layer whose keys are searched; the chosen one by default.
        :param k: neighbours; `k`, `temperature` and `lam` default to the values that an evaluation fitted.
        :param lm: the model, if it is already loaded or has moved since the datastore was made. Its weights are shared.
        :raises InputError: a value is neither given nor fitted, or is out of range.
        :raises DatastoreMismatch: the datastore was made with another model, or has no such layer.
        :raises DatastoreCorrupt: a file that is read is missing, short or changed.
        :raises ModelError: the model is wrapped, as adapters are by peft; or the datastore's is not where it was.
        """
        opened = as_store(store)
        retrieval = open_retrieval(opened, layer, k, temperature, lam)
        if lm is None:
            with own_model(opened, field="lm") as name:
                lm = load_model(name)
        return cls.from_retrieval(lm, retrieval)

    @staticmethod
    def from_retrieval(lm: LanguageModel, retrieval: Retrieval, citer: Citer | None = None) -> KNNLM:
        """Combine a model with a retrieval from `open_retrieval`. Raises as `from_store`.

        :param citer: that of another `KNNLM` of this model, which shares what it knows of the datastore's text.
        """
        _check_kind(type(lm.model))
        check_fits(lm, retrieval)
        model: Any = _own_modules(lm.model)
        plain = _Plain(model)
        model.__class__ = _class_for(cast(Any, type(lm.model)))
        model.tokenizer, model.retrieval, model._plain = lm.tokenizer, retrieval, plain
        model.texts = TextMemory(lm)
        model.citer = citer or Citer(lm)
        return cast(KNNLM, model)

    def __repr__(self) -> str:
        kind, mix, store = f"KNNLM[{type(self).__name__}]", self.retrieval.setting, self.retrieval.searcher.store
        places = " + ".join(str(one.folder) for one in store.stores)
        return (
            f"{kind}: the model of {store.first.model} with the memory {places}\n"
            f"  keys of {self.retrieval.layer}, {store.count:,}; k {mix.k}, λ {mix.lam:.3g}"
            f"{', moved by query and text' if mix.gate else ''}, T {mix.temperature:.4g}"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward, with the same arguments; logits are the mixed log-probabilities.

        With `labels`, the loss is that of the mixed distribution. With `logits_to_keep`, a number of last positions or
        a list of positions, only these are mixed. Where λ is by the text so far, all positions that are not in a cache
        are searched for, and a call with a cache of your own needs `text_so_far`: the whole rows' tokens and their
        mask, or None, as `generate()` gives them.
        :raises InputError: λ is by the text so far, and this is not known.
        """
        given = self._plain.named(args) | kwargs
        as_tuple = given.pop("return_dict", None) is False
        labels, finished = given.pop("labels", None), given.pop("finished_rows", None)
        text, keep = given.pop("text_so_far", None), _Keep(given.get("logits_to_keep", 0))
        with torch.no_grad():
            output, log_probs_BTV = self._mixed(given, keep, text, finished)
        loss = {} if labels is None else {"loss": _loss(log_probs_BTV, keep(labels))}
        mixed = type(output)(**{**output, "logits": log_probs_BTV, **loss})
        return mixed.to_tuple() if as_tuple else mixed

    def _mixed(self, given: Mapping[str, Any], keep: _Keep, text: Any, finished: _Watched | None) -> tuple[Any, Tensor]:
        """The model's output, and the mixed log-probabilities [B, T, V] of the positions that are kept."""
        retrieval, kept = self.retrieval, keep(torch.arange(_length(given))[None])[0].tolist()
        batch = _entering(given).shape[0]
        rows_Q = _searched_rows((batch, len(kept)), keep, given, finished)
        plans: list[RowPlan] = []
        by_text_B = [one.setting.by_text for one in retrieval.of_rows(batch)]
        if any(by_text_B):
            plans = self.texts.plans(texts_so_far(given, _entering(given), text), kept, rows_Q, retrieval)
            rows_Q = rows_Q[[not by_text_B[row] for row in (rows_Q // len(kept)).tolist()]]
        output, read = self._plain.run(given, retrieval.layer, keep, wide=any(len(one.places_Q) > 1 for one in plans))
        log_probs_NV, rows_Q = log_softmax(output.logits.flatten(0, 1)), rows_Q.to(read.kept_BTD.device)
        retrieval.mix_in(log_probs_NV, rows_Q, read.kept_BTD.flatten(0, 1)[rows_Q])
        if plans:
            self.texts.mix_read(log_probs_NV, plans, read)
        return output, log_probs_NV.view(output.logits.shape)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the model's own; with the whole text so far, of which a pass with a cache sees the last tokens."""
        given = cast(Any, super()).prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return {**given, "text_so_far": (input_ids, kwargs.get("attention_mask"))}

    def unmixed(self, tokens_BT: Tensor, past: Any = None, *, last: int = 0) -> tuple[Any, Tensor]:
        """The plain LM's output and the layer's vectors [B, T, D], for callers that mix only some positions.

        :param past: the cache (`past_key_values`) of the tokens before these.
        :param last: logits and vectors of so many last positions are enough; 0 for all. There may be more.
        """
        cached = {} if past is None else {"past_key_values": past, "use_cache": True}
        keep = {"logits_to_keep": last} if self._plain.takes("logits_to_keep") else {}
        with torch.no_grad():
            output, read = self._plain.run(
                {"input_ids": tokens_BT, **cached, **keep}, self.retrieval.layer, _Keep(last)
            )
        return output, read.kept_BTD

    def cite(self, text: str, prompt: str = "") -> Citations:
        """Return the documents behind a text: their shares of its probability, and what that is without each of them.

        `whole` of the result is the text's citation, `tokens` are those of its tokens, `span(first, last)` is that of
        some of them.

        :param text: at most as long as the model takes, with the prompt.
        :param prompt: what the text follows; it is not cited.
        :raises InputError: the text is too long, or has no token that something predicts.
        """
        return self.citer.text(text, prompt, self.retrieval)

    def copy_guard(self, max_copy: int) -> CopyGuard:
        """Return a guard against runs of more than `max_copy` generated tokens from one document.

        :raises InputError: `max_copy` is below 1.
        """
        return self.citer.copy_guard(self.retrieval.searcher.store, max_copy)

    def _sample(self, *args: Any, stopping_criteria: Any, **kwargs: Any) -> Any:
        """Greedy search and sampling; `forward` does not search for rows that are finished."""
        watched = _Watched(stopping_criteria)
        return cast(Any, super())._sample(*args, stopping_criteria=watched, finished_rows=watched, **kwargs)

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """Whether torch.compile can be used: no, as it cannot compile a search."""
        return False

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102
        def __getattr__(self, name: str) -> Any: ...


def check_fits(lm: LanguageModel, retrieval: Retrieval) -> None:
    """:raises DatastoreMismatch: a retrieval is of another model. :raises DatastoreCorrupt: it has other tokens."""
    store = retrieval.searcher.store
    store.first.check_model(lm.fingerprint)
    check_tokens(store, lm.vocabulary)
    check_names([retrieval.layer], lm.layer_names)


def _check_kind(kind: type[nn.Module]) -> None:
    """:raises ModelError: `kind` wraps a model, whose generate() would silently run without retrieval."""
    if not hasattr(kind, "_sample"):
        raise ModelError(
            f"{kind.__name__} does not generate itself, as a wrapper around a model; give the model inside, of an "
            "adapter with its weights merged (merge_and_unload)"
        )


def _own_modules(model: nn.Module) -> nn.Module:
    """Copy a model's modules, sharing its weights: hooks on the copy do not run in the model, in any thread."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, cast(dict[int, Any], shared))


@cache
def _class_for(kind: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a model's class, with its name and its signature of forward, which `generate()` looks at."""

    @wraps(kind.forward)
    def forward(self: KNNLM, *args: Any, **kwargs: Any) -> Any:
        return KNNLM.forward(self, *args, **kwargs)

    @wraps(cast(Any, kind).prepare_inputs_for_generation)
    def prepare(self: KNNLM, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return KNNLM.prepare_inputs_for_generation(self, *args, **kwargs)

    given = {"forward": forward, "prepare_inputs_for_generation": prepare}
    members = {**given, "__module__": __name__, "__qualname__": f"KNNLM[{kind.__name__}]"}
    return type(kind.__name__, (KNNLM, kind), members)


class _Plain:
    """The model without retrieval: its own forward, with hooks while it runs."""

    def __init__(self, model: nn.Module) -> None:
        self._names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        # accelerate sets a forward on the object, which would hide that of the class.
        self._forward: Callable[..., Any] = vars(model).pop("forward", model.forward)
        self._decoder, self._head = find_decoder(model), find_head(model)
        self._lock = Lock()

    def takes(self, name: str) -> bool:
        """Whether forward has an argument of this name."""
        return name in self._names

    def named(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """Positional arguments of forward by name."""
        return dict(zip(self._names, args, strict=False))

    def run(self, given: Mapping[str, Any], layer: str, keep: _Keep, *, wide: bool = False) -> tuple[Any, Read]:
        """The plain model's output, and the vectors at the positions that have logits; if `wide`, at all of them."""
        received: dict[str, Tensor] = {}
        # The model itself keeps only these positions of the input of its head.
        kept: Callable[[Tensor], Tensor] = Tensor.detach if layer == FINAL or wide else keep

        def take(name: str, vectors_BTD: Tensor) -> None:
            received[name] = kept(vectors_BTD).clone()

        names = list(dict.fromkeys((layer, FINAL))) if wide else [layer]
        # Without the lock, hooks of two threads would receive each other's vectors.
        with self._lock, self._decoder.attach(names, take), self._narrowed(keep) if wide else nullcontext():
            every = {"logits_to_keep": 0} if wide and "logits_to_keep" in given else {}
            output = self._forward(**{**given, **every}, return_dict=True)
        if wide:
            return output, Read(keep(received[layer]), received[layer], received[FINAL])
        return output, Read(received[layer])

    @contextmanager
    def _narrowed(self, keep: _Keep) -> Iterator[None]:
        """A block in which the head gets only some of the positions that enter it."""

        def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (keep(args[0]), *args[1:])

        handle = self._head.register_forward_pre_hook(narrow)
        try:
            yield
        finally:
            handle.remove()


class _Keep:
    """`logits_to_keep` of transformers: the positions of every row that get logits."""

    def __init__(self, logits_to_keep: int | Tensor) -> None:
        if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim != 1:
            shape = tuple(logits_to_keep.shape)
            raise InputError(f"logits_to_keep has the shape {shape}; give a number, or the same positions for all rows")
        self._keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep or None, None)

    def __call__(self, tensor_BT: Tensor) -> Tensor:
        """Select these positions of a tensor [B, T, ...]."""
        return tensor_BT[:, self._keep]


def _searched_rows(shape_BT: Sequence[int], keep: _Keep, given: Mapping[str, Any], finished: _Watched | None) -> Tensor:
    """Indices, among all positions with logits, of those neither padding nor in a finished row: int64 [Q]."""
    searched_BT = torch.ones(tuple(shape_BT), dtype=torch.bool)
    mask_BT, length = given.get("attention_mask"), _length(given)
    # A 4-dimensional mask, used with a static cache, does not show what is padding.
    if isinstance(mask_BT, Tensor) and mask_BT.ndim == 2 and mask_BT.shape[1] >= length:
        searched_BT &= keep(mask_BT[:, mask_BT.shape[1] - length :].bool().cpu())
    if finished is not None and finished.rows_B is not None:
        searched_BT &= ~finished.rows_B.cpu()[:, None]
    return searched_BT.flatten().nonzero()[:, 0]


def _entering(given: Mapping[str, Any]) -> Tensor:
    """Tokens or embeddings of a forward pass [B, T, ...], without those in the cache."""
    entering = given.get("input_ids")
    return cast(Tensor, given["inputs_embeds"] if entering is None else entering)


def _length(given: Mapping[str, Any]) -> int:
    """T of a forward pass: the number of new tokens, without those in the cache."""
    return int(_entering(given).shape[1])


def _loss(log_probs_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean -log p of the label after each position, shifted as in every causal LM of transformers."""
    targets = labels_BT[:, 1:].flatten().to(log_probs_BTV.device)
    return nn.functional.nll_loss(log_probs_BTV[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED)


class _Watched:
    """Stopping criteria of one `generate()` that record which rows they stopped.

    Only if there is an end token: without one, transformers continues rows that other criteria have stopped.
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

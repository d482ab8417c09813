"""The kNN-LM as the model `knnlm` of EleutherAI's lm-evaluation-harness. Only this module imports lm_eval.

Importing this module registers the model, which is what `knnlm.register_lm_eval` does. Requests, batches and windows
are made by the harness's own class for `transformers` models; only the tokens that it scores are searched for.

Shapes: B batch, T time, D dimension, Q scored tokens, V vocabulary.
"""

# ruff: noqa: ANN401 - options are the harness's own
from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knnlm.errors import InputError, missing_library, not_installed
from knnlm.inference.model import KNNLM
from knnlm.inference.own_model import own_model
from knnlm.knn.retrieval import open_retrieval
from knnlm.model.loading import load_model
from knnlm.store.datastore import Datastore
from knnlm.store.joint import GivenStores, JointStore, as_store

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise InputError(not_installed("lm-eval", missing_library(error), "eval")) from error


@register_model("knnlm")
class HarnessModel(HFLM):  # type: ignore[misc] # lm_eval has no types
    """lm-eval's model `hf`, with the mixed distribution in place of the LM's.

    Where λ is by the text so far, a request is a text of its own, or a window of one that is longer than the model
    takes: its context is searched for too.

    :param store: the datastore, or several. `layer`, `k`, `temperature` and `lam` (or `lambda`) are as in
        `KNNLM.from_store`.
    :param weights: what each of several datastores counts for, as in `knnlm.open_datastores`.
    :param model: path or id of the datastore's model, if it has moved.
    :param max_length: longest input in tokens; the model's limit by default.
    :raises InputError: an unknown argument; or as `KNNLM.from_store`.
    :raises DatastoreMismatch: as `KNNLM.from_store`.
    """

    _rows: Iterator[tuple[Tensor, Tensor]] = iter(())
    """Tokens [T] and vectors [T, D] of each row of the batch being scored."""

    def __init__(
        self,
        store: GivenStores,
        layer: str | None = None,
        k: int | None = None,
        temperature: float | None = None,
        lam: float | None = None,
        model: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        trust_remote_code: bool = False,
        weights: Sequence[float] | None = None,
        **others: Any,
    ) -> None:
        lam = others.pop("lambda", lam)  # a keyword in Python
        if others:
            raise InputError(f"knnlm has no argument {', '.join(others)}; see docs/lm-eval.md for those that it has")
        opened = as_store(_named(store), weights)
        retrieval = open_retrieval(opened, layer, k, temperature, lam)
        with own_model(opened, model) as source:
            lm = load_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        super().__init__(
            KNNLM.from_retrieval(lm, retrieval),
            backend="causal",
            tokenizer=lm.tokenizer,
            max_length=max_length,
            softmax_dtype=torch.float32,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> HarnessModel:
        """Make the model; model_args take precedence over the device and batch_size that lm-eval fills in."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if str(options.get("device")).startswith("cuda") and not torch.cuda.is_available():
            del options["device"]  # cuda:0 is lm-eval's default on every machine
        return cls(**{**options, **arg_dict})

    def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
        """The plain LM's logits [B, T, V], which the harness normalizes; vectors are kept for `_select_cont_toks`."""
        output, vectors_BTD = self.model.unmixed(inps)
        self._rows = iter(zip(inps, vectors_BTD, strict=True))
        logits_BTV: Tensor = output.logits
        return logits_BTV

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        """Mixed log-probabilities [Q, V] of the scored tokens; the harness calls this once for each row, in order."""
        log_probs_QV: Tensor = super()._select_cont_toks(logits, contlen, inplen)
        tokens_T, vectors_TD = next(self._rows)
        retrieval = self.model.retrieval
        if retrieval.setting.by_text:
            text = tokens_T[:inplen].cpu().numpy()
            self.model.texts.mix_end(log_probs_QV, text, logits, vectors_TD[:inplen], retrieval)
        else:
            vectors_QD: Tensor = super()._select_cont_toks(vectors_TD, contlen, inplen)
            rows_Q = torch.arange(len(vectors_QD), device=vectors_QD.device)
            retrieval.mix_in(log_probs_QV, rows_Q, vectors_QD)
        return log_probs_QV


def _named(store: Any) -> GivenStores:
    """The datastores with their names as text: lm-eval parses 7 as a number."""
    if isinstance(store, Datastore | JointStore):
        return store
    if isinstance(store, list | tuple):
        return [one if isinstance(one, Datastore) else str(one) for one in store]
    return str(store)


def main(arguments: Sequence[str]) -> None:
    """Run the command `lm_eval` with these arguments and the model `knnlm` registered."""
    sys.argv = ["lm_eval", *arguments]  # all that its command line reads
    cli_evaluate()

"""The language model: a Hugging Face causal LM with its tokenizer.

A model is tested once when it is loaded: a forward pass over two short sequences gives the size of each layer's vectors
and verifies that the head is understood, that no layer holds NaN, and that no position sees later tokens.

Shapes: B batch, T time, D dimension, N rows, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from knnlm.errors import InputError, ModelError
from knnlm.layer_names import FINAL, check_names, list_names
from knnlm.model.decoder import Decoder, Receive, find_decoder
from knnlm.model.encoding import TextEncoder
from knnlm.model.fingerprint import digest_config, digest_tokenizer, digest_weights
from knnlm.model.head import find_scores, log_prob, log_softmax, near
from knnlm.shown import brief

# Logits computed at a time (64 MB in float32).
_HEAD_SCORES = 1 << 24
_PROBE_TOKENS = 6
ADVICE = "give a decoder-only causal language model such as GPT-2 or Llama"


class _Enough(Exception):
    """Leaves the model's forward pass once all wanted layers have been received."""


class LanguageModel:
    """A causal LM whose layers can be read and whose head can be applied to stored vectors.

    Made by `load_model`, or by `from_model` from a model in memory; `adapter` is the digest of an adapter merged into
    its weights. Raises ModelError if the model is not a decoder-only causal LM, its head does more than multiply, scale
    and cap, or it gives NaN.
    """

    layer_names: tuple[str, ...]
    """All readable layers, in network order."""
    dims: Mapping[str, int]
    """The size of each layer's vectors."""
    context_limit: int | None
    """The longest input in tokens; None if the architecture sets no limit (BLOOM)."""
    vocabulary: int
    """The number of tokens that the head scores."""
    notes: tuple[str, ...]
    """Sentences for the user, such as which layers cannot be read."""
    details: tuple[str, ...]
    """Sentences for a user who asks, such as why the model is not computed in the checkpoint's type."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        details: Sequence[str] = (),
        adapter: str = "",
    ) -> None:
        self.name, self._adapter = name, adapter
        self.model = model
        nn.Module.eval(model)
        self.tokenizer = tokenizer
        self._decoder: Decoder = find_decoder(model)
        self._text = TextEncoder(tokenizer)
        self._options: dict[str, Any] = {"use_cache": False} if _takes(model.forward, "use_cache") else {}
        self.context_limit = context_limit_of(model.config)
        vectors, logits = self._probe()
        self.dims = {layer: vectors[layer].shape[-1] for layer in self._decoder.names if layer in vectors}
        self.layer_names = tuple(self.dims)
        self.vocabulary = logits.shape[-1]
        self._head = find_scores(model, vectors[FINAL], logits)
        unread = [layer for layer in self._decoder.names if layer not in vectors]
        self.notes = (f"{name} has layers that cannot be read: {list_names(unread)}",) if unread else ()
        self.details = tuple(details)

    def __repr__(self) -> str:
        limit = f"at most {self.context_limit:,} tokens" if self.context_limit else "input of any length"
        return (
            f"<LanguageModel {self.name}: {type(self.model).__name__}, {self.dtype} on {self.device}, "
            f"{self.vocabulary:,} tokens in the vocabulary, {limit}, {len(self.layer_names)} layers to read: "
            f"{brief(self.layer_names)}>"
        )

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str) -> Self:
        """Wrap a model in memory; it is put into evaluation mode and otherwise left as it is."""
        return cls(model, tokenizer, name=name)

    @property
    def device(self) -> torch.device:
        """The device of the input."""
        return self._embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of computation."""
        return self.model.dtype

    @cached_property
    def fingerprint(self) -> Mapping[str, str]:
        """Identity of the model: its name as `model`, and SHA-256 of `config`, `weights` (sampled) and `tokenizer`.

        Independent of the type of computation and of the device.
        """
        return {
            "model": self.name,
            "config": digest_config(self.model.config),
            "weights": digest_weights(self.model, self._adapter),
            "tokenizer": digest_tokenizer(self.tokenizer),
        }

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the tokens of a text, int32 [n], with BOS if the tokenizer itself adds one."""
        return self._text(text)

    def encode_with_ends(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the tokens, and where in the text's UTF-8 bytes each ends, int64 [n]; see `TextEncoder.with_ends`."""
        return self._text.with_ends(text)

    @property
    def word(self) -> str:
        """A short text that the tokenizer can encode, such as a letter."""
        return self._text.word

    def decode(self, tokens: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of tokens unchanged: special tokens kept, spaces not cleaned up."""
        ids = [int(token) for token in tokens]
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def token_text(self, token: int) -> str:
        """Return the text of one token; if it is part of a character, its bytes, as in `⟨E2 96⟩`."""
        text = self.decode([token])
        return f"⟨{self._text.bytes_of(token).hex(' ').upper()}⟩" if "\N{REPLACEMENT CHARACTER}" in text else text

    def forward(
        self,
        tokens_BT: Tensor,
        layers: Sequence[str],
        receive: Receive,
        *,
        stop_early: bool = True,
    ) -> None:
        """Run the model on tokens (int64) and call `receive(layer, vectors_BTD)` once for each layer.

        Shorter rows are padded on the right with any tokens; vectors there are undefined. No mask is needed, as earlier
        positions do not see them (only Reformer's do, with one too), and with one a pass took a fifth longer. The head
        is not run, nor, with `stop_early`, anything above the deepest wanted layer. See `Decoder.attach` for how long
        the vectors are valid.

        Raises LayerError for an unknown layer, InputError for tokens outside the vocabulary or more than
        `context_limit`.
        """
        check_names(layers, self.layer_names)
        self._check_tokens(tokens_BT)
        wanted = set(layers)
        missing = set(layers) if stop_early else {FINAL}

        def take(layer: str, vectors_BTD: Tensor) -> None:
            if layer in wanted:
                receive(layer, vectors_BTD)
            missing.discard(layer)
            if not missing:
                raise _Enough

        hooked = tuple(dict.fromkeys((*layers, FINAL)))
        with torch.inference_mode(), suppress(_Enough), self._decoder.attach(hooked, take):
            self._run(tokens_BT)

    def log_probs(self, final_ND: Tensor) -> Tensor:
        """Return the log-probabilities of all tokens, float32 [N, V], from `final_norm` vectors."""
        with torch.inference_mode():
            return log_softmax(self._head(final_ND))

    def target_log_probs(self, final_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Return the log-probability of each target, float64 [N] on the CPU, from `final_norm` vectors.

        The head is applied to blocks of rows: memory does not grow with N × V.
        """
        rows = max(1, _HEAD_SCORES // self.vocabulary)
        with torch.inference_mode():
            pairs = zip(torch.split(final_ND, rows), torch.split(targets_N, rows), strict=True)
            parts = [log_prob(self._head(final), targets) for final, targets in pairs]
        return torch.cat([torch.empty(0, dtype=torch.float64), *parts])

    @property
    def _embeddings(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.get_input_embeddings())

    def _run(self, tokens_BT: Tensor) -> Any:  # noqa: ANN401 - a transformers ModelOutput
        return self.model(tokens_BT.to(self.device), **self._options)

    def _check_tokens(self, tokens_BT: Tensor) -> None:
        count, length = self._embeddings.num_embeddings, tokens_BT.shape[-1]
        if tokens_BT.numel() == 0:
            raise InputError(f"no tokens in a batch of shape {tuple(tokens_BT.shape)}; give at least one")
        low, high = int(tokens_BT.min()), int(tokens_BT.max())
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise InputError(f"token {wrong} is none of the {count} of {self.name}; use its own tokenizer")
        if self.context_limit is not None and length > self.context_limit:
            raise InputError(f"{length} tokens, but {self.name} takes at most {self.context_limit} at once; use fewer")

    def _probe(self) -> tuple[dict[str, Tensor], Tensor]:
        """Run two sequences that differ in the last token: all layers' vectors, and the model's own logits."""
        length = min(_PROBE_TOKENS, self.context_limit or _PROBE_TOKENS)
        tokens_BT = torch.arange(length).remainder(self._embeddings.num_embeddings).repeat(2, 1)
        tokens_BT[1, -1] = 0
        received: dict[str, list[Tensor]] = {}

        def keep(layer: str, vectors_BTD: Tensor) -> None:
            received.setdefault(layer, []).append(vectors_BTD.clone())

        with torch.inference_mode(), self._decoder.attach(self._decoder.names, keep):
            logits: Tensor = self._run(tokens_BT).logits
        # Not readable: modules run several times (looped blocks), and several streams (hyper-connections).
        single = {layer: tensors[0] for layer, tensors in received.items() if len(tensors) == 1}
        vectors = {layer: v for layer, v in single.items() if v.ndim == 3 and v.shape[:2] == tokens_BT.shape}
        if FINAL not in vectors:
            raise ModelError(f"what enters the LM head of {self.name} cannot be read; use another model")
        self._check_probe(vectors)
        return vectors, logits

    def _check_probe(self, vectors: Mapping[str, Tensor]) -> None:
        for layer in self._decoder.names:
            if layer in vectors and not torch.isfinite(vectors[layer]).all():
                raise ModelError(f"{self.name} gives NaN or infinite values in layer {layer}; try `dtype='float32'`")
        first, second = vectors[FINAL][:, :-1]
        if not near(first, second):
            raise ModelError(f"{self.name} sees later tokens, as an encoder does; {ADVICE}")


def context_limit_of(config: PretrainedConfig) -> int | None:
    """Return the longest input in tokens that a configuration states; None if it states none."""
    text = config.get_text_config()
    fields = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    values = (getattr(text, field, None) for field in fields)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _takes(function: Callable[..., object], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

"""The language model: a Hugging Face causal LM with its tokenizer. The only import of `transformers`.

A model is probed once when it is loaded: two short sequences run through all of it, which gives the size of each layer's
vectors and proves that the head is understood, that no layer holds NaN, and that no position sees later tokens.

Shapes: B batch, T time, D dimension, N rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from knnlm.errors import InputError, ModelError
from knnlm.layers import FINAL, Decoder, Receive, check_names, find_decoder, find_head

# Rows of the head's table made at once: at most this many scores (64 MB in float32).
_HEAD_SCORES = 1 << 24
# Long text is tokenised in pieces of about this many characters.
_PIECE = 1 << 18
# A space between a word and a letter: byte-level BPE never joins what stands on the two sides of this place.
_CUT = re.compile(r"(?<=\S) (?=[^\W\d_])")
# bfloat16 is taken on a CPU where its products are at least so many times as fast as float32's.
_WORTHWHILE = 1.3
_SAMPLED_ELEMENTS = 16
_PROBE_TOKENS = 6


class _Enough(Exception):
    """All wanted layers have been received; leaves the model's forward pass."""


class LanguageModel:
    """A causal LM whose layers can be read and whose head can be applied to vectors read before.

    Made by `load_model`, or by `from_model` of a model in memory. Raises ModelError when the model is not a decoder-only
    causal LM, or its head is not understood, or it gives NaN.
    """

    layer_names: tuple[str, ...]
    """In the order of the network."""
    dims: Mapping[str, int]
    """The size of each layer's vectors."""
    context_limit: int | None
    """The longest input in tokens; None where the architecture sets no limit (BLOOM)."""
    vocabulary: int
    """The number of tokens that the head scores."""
    notes: tuple[str, ...]
    """Sentences for the user, such as why another type than the checkpoint's is computed in."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, notes: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._decoder: Decoder = find_decoder(model)
        self._text = _TextEncoder(tokenizer)
        self._options: dict[str, Any] = {"use_cache": False} if _takes(model.forward, "use_cache") else {}
        self.context_limit = _context_limit(model.config)
        vectors, logits = self._probe()
        self.dims = {layer: vectors[layer].shape[-1] for layer in self._decoder.names if layer in vectors}
        self.layer_names = tuple(self.dims)
        self.vocabulary = logits.shape[-1]
        self._head = _find_scores(model, vectors[FINAL], logits)
        unread = [layer for layer in self._decoder.names if layer not in vectors]
        self.notes = (*notes, *([f"layers that this model does not compute: {', '.join(unread)}"] if unread else []))

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str) -> Self:
        """Wrap a model that is in memory already; it is put into evaluation mode and otherwise left as it is."""
        return cls(model, tokenizer, name=name)

    @staticmethod
    def load(
        name_or_folder: str | Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
    ) -> LanguageModel:
        """Do as `load_model`."""
        return load_model(name_or_folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)

    @property
    def device(self) -> torch.device:
        """Where the input goes."""
        return self._embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that is computed in."""
        return self.model.dtype

    @cached_property
    def fingerprint(self) -> Mapping[str, str]:
        """What tells this model from others: `model`, and sha256 of `config`, `weights` (sampled) and `tokenizer`.

        The same for every type of computation and every device.
        """
        return {
            "model": self.name,
            "config": _digest_config(self.model.config),
            "weights": _digest_weights(self.model),
            "tokenizer": _digest_tokenizer(self.tokenizer),
        }

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the tokens of a text, int32 [n], with what the tokenizer itself puts in front (BOS), and nothing behind."""
        return self._text(text)

    def decode(self, tokens: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of tokens as it stands: special tokens kept, spaces not tidied."""
        ids = [int(token) for token in tokens]
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def forward(
        self,
        tokens_BT: Tensor,
        lengths_B: Tensor | None,
        layers: Sequence[str],
        receive: Receive,
        *,
        stop_early: bool = True,
    ) -> None:
        """Run the model on right-padded tokens (int64) and call `receive(layer, vectors_BTD)` once for each layer.

        The head is not run, nor, with `stop_early`, anything above the deepest wanted layer. Vectors of padding may hold
        anything. See `Decoder.attach` for how long the vectors are valid.

        Raises LayerError for an unknown layer, InputError for tokens outside the vocabulary or more than `context_limit`.
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
            self._run(tokens_BT, lengths_B)

    def log_probs(self, final_ND: Tensor) -> Tensor:
        """Return the log-probabilities of all tokens, float32 [N, V], of vectors of the layer `final_norm`."""
        with torch.inference_mode():
            return torch.log_softmax(self._head(final_ND).float(), dim=-1)

    def target_log_probs(self, final_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Return the log-probability of each target, float64 [N] on the CPU, of vectors of the layer `final_norm`.

        The head is applied to some rows at a time: memory does not grow with N × V.
        """
        rows = max(1, _HEAD_SCORES // self.vocabulary)
        with torch.inference_mode():
            pairs = zip(final_ND.split(rows), targets_N.split(rows), strict=True)
            parts = [_log_prob(self._head(final), targets) for final, targets in pairs]
        return torch.cat([torch.empty(0, dtype=torch.float64), *parts])

    @property
    def _embeddings(self) -> nn.Embedding:
        embeddings: nn.Embedding = self.model.get_input_embeddings()
        return embeddings

    def _run(self, tokens_BT: Tensor, lengths_B: Tensor | None) -> Any:  # noqa: ANN401 - a transformers ModelOutput
        options = dict(self._options)
        if lengths_B is not None and int(lengths_B.min()) < tokens_BT.shape[1]:
            mask_BT = torch.arange(tokens_BT.shape[1]) < lengths_B.cpu()[:, None]
            options["attention_mask"] = mask_BT.long().to(self.device)
        return self.model(tokens_BT.to(self.device), **options)

    def _check_tokens(self, tokens_BT: Tensor) -> None:
        count, length = self._embeddings.num_embeddings, tokens_BT.shape[-1]
        if tokens_BT.numel() == 0:
            raise InputError(f"no tokens in a batch of shape {tuple(tokens_BT.shape)}; give at least one")
        low, high = int(tokens_BT.min()), int(tokens_BT.max())
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise InputError(
                f"token {wrong} is not in the vocabulary of {self.name} ({count} tokens); use its tokenizer"
            )
        if self.context_limit is not None and length > self.context_limit:
            raise InputError(
                f"{length} tokens are more than {self.name} takes at once ({self.context_limit}); use fewer"
            )

    def _probe(self) -> tuple[dict[str, Tensor], Tensor]:
        """Run two sequences that differ in the last token; return all layers' vectors and the model's own logits."""
        length = min(_PROBE_TOKENS, self.context_limit or _PROBE_TOKENS)
        tokens_BT = torch.arange(2 * length).remainder(self._embeddings.num_embeddings)[:length].repeat(2, 1)
        tokens_BT[1, -1] = 0
        vectors: dict[str, Tensor] = {}

        def keep(layer: str, vectors_BTD: Tensor) -> None:
            vectors[layer] = vectors_BTD.clone()

        with torch.inference_mode(), self._decoder.attach(self._decoder.names, keep):
            logits: Tensor = self._run(tokens_BT, None).logits
        if FINAL not in vectors:
            raise ModelError(f"{self.name} does not use its LM head, so its scores cannot be read; use another model")
        self._check_probe(vectors)
        return vectors, logits

    def _check_probe(self, vectors: Mapping[str, Tensor]) -> None:
        for layer in (layer for layer in self._decoder.names if layer in vectors):
            if not torch.isfinite(vectors[layer]).all():
                raise ModelError(f"{self.name} gives NaN or infinite values in layer {layer}; try --dtype float32")
        first, second = vectors[FINAL][:, :-1].float()
        if not _near(first, second, self.dtype):
            raise ModelError(f"{self.name} sees later tokens, as an encoder does; give a decoder-only causal LM")


def load_model(
    name_or_folder: str | Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> LanguageModel:
    """Load a causal LM and its tokenizer from a folder (the network is not touched) or from the hub.

    `dtype` is float32, bfloat16, float16 or auto: the checkpoint's own type, except on a CPU, where a half-precision
    checkpoint is computed in bfloat16 only if this CPU is measured to be fast at it, and else in float32. `device` is
    cpu, cuda, mps or auto.

    Raises ModelError for what is not a decoder-only causal LM with a tokenizer, InputError for a wrong option.
    """
    source = str(name_or_folder)
    target = _pick_device(device)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": _is_local(source)}
    config = _load_config(source, options)
    tokenizer = _load_tokenizer(source, options)
    taken, note = _pick_dtype(dtype, source, config, target, options)
    model = _load_weights(source, taken, options)
    # A quantised model, or one spread over devices, has its place and types already.
    if not getattr(model, "is_quantized", False) and getattr(model, "hf_device_map", None) is None:
        model.to(target)
    model.requires_grad_(False)
    return LanguageModel(model, tokenizer, name=source, notes=[note] if note else [])


def _is_local(source: str) -> bool:
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{source} is not a model: it has no config.json; give a folder made by save_pretrained")
        return True
    if path.exists():
        raise ModelError(f"{source} is a file; give the folder of a model, or a name on the hub")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"there is no folder {source}; give the folder of a model, or a name on the hub")
    return False


def _load_config(source: str, options: Mapping[str, Any]) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, **options)
    except Exception as error:
        raise ModelError(f"{source} could not be read as a model: {_line(error)}") from error
    advice = "give a decoder-only causal language model such as GPT-2 or Llama"
    if config.is_encoder_decoder:
        raise ModelError(f"{source} is an encoder-decoder model; {advice}")
    if any("MaskedLM" in name for name in config.architectures or ()):
        raise ModelError(f"{source} is an encoder-only model; {advice}")
    return config


def _load_tokenizer(source: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        raise ModelError(f"{source} has no tokenizer that can be loaded: {_line(error)}") from error
    # Without files some tokenizer classes come up empty instead of failing.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ModelError(f"{source} has no tokenizer; save one into it with tokenizer.save_pretrained")
    return tokenizer


def _load_weights(source: str, dtype: torch.dtype | str, options: Mapping[str, Any]) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except Exception as error:
        raise ModelError(f"{source} could not be loaded as a causal language model: {_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills them with random numbers.
        raise ModelError(f"{source} lacks {len(missing)} weights of a causal language model, such as {missing[0]}")
    loaded: PreTrainedModel = model
    return loaded


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:299] + "…"


# Device and type


def _pick_device(device: str) -> torch.device:
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    kind = device.partition(":")[0]
    if kind not in present:
        raise InputError(f"--device is {device!r}; take auto, cpu, cuda or mps")
    if not present[kind]:
        raise InputError(f"--device is {device!r}, but this machine has none that torch can use; take auto or cpu")
    return torch.device(device)


def _pick_dtype(
    dtype: str, source: str, config: PretrainedConfig, device: torch.device, options: Mapping[str, Any]
) -> tuple[torch.dtype | str, str | None]:
    """Return the type to load in (`auto` leaves a quantised model as it is), and a note for the user."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto" and dtype not in known:
        raise InputError(f"--dtype is {dtype!r}; take auto, {', '.join(known)}")
    if dtype == "float16" and device.type == "cpu":
        raise InputError("--dtype float16 is not for a CPU, which computes it slowly; take float32 or auto")
    if dtype != "auto":
        return known[dtype], None
    if getattr(config, "quantization_config", None) is not None:
        return "auto", None
    stated = config.get_text_config().dtype or _load_weights(source, "auto", options).dtype
    stated = getattr(torch, stated) if isinstance(stated, str) else stated
    if device.type != "cpu":
        return stated, None
    return _pick_on_cpu(stated)


def _pick_on_cpu(stated: torch.dtype) -> tuple[torch.dtype, str | None]:
    if stated not in (torch.bfloat16, torch.float16):
        return torch.float32, None
    speed = bfloat16_speed()
    taken = torch.bfloat16 if speed >= _WORTHWHILE else torch.float32
    if taken == stated:
        return taken, None
    names = (str(kind).removeprefix("torch.") for kind in (stated, taken))
    return (
        taken,
        "a {} checkpoint, computed in {}: this CPU's bfloat16 products are {:.2g} times as fast as float32's".format(
            *names, speed
        ),
    )


@cache
def bfloat16_speed() -> float:
    """Return how many times as fast as float32 this CPU multiplies bfloat16 matrices, measured once in a few milliseconds.

    Between 0.003 (AVX2 only) and 2.5 (AMX) on the machines of design.md, section 5.
    """
    small = _seconds(torch.float32, 64) / _seconds(torch.bfloat16, 64)
    # Where bfloat16 is emulated, a large product would take a second.
    return small if small < 0.1 else _seconds(torch.float32, 512) / _seconds(torch.bfloat16, 512)


def _seconds(dtype: torch.dtype, size: int) -> float:
    matrix = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(6):  # the first warms up, and the shortest is the least disturbed by other work
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - start)
    return min(times)


# Scores of the vocabulary


def _find_scores(model: PreTrainedModel, final_BTD: Tensor, logits_BTV: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function from `final_norm` vectors to the model's logits, proven on one input."""
    head, own = find_head(model), _head_dtype(model)
    for scale in (_scale_of(model.config), _unscaled):

        def scores(final_ND: Tensor, scale: Callable[[Tensor], Tensor] = scale) -> Tensor:
            device = next(head.parameters()).device
            return scale(head(final_ND.to(device, own)))

        with torch.inference_mode():
            found = scores(final_BTD)
        if found.shape == logits_BTV.shape and _near(found, logits_BTV, model.dtype):
            return scores
    raise ModelError(f"the LM head of {type(model).__name__} is not understood: it does more than multiply and scale")


def _head_dtype(model: PreTrainedModel) -> torch.dtype:
    weight = next(find_head(model).parameters())
    return weight.dtype if weight.is_floating_point() else model.dtype


def _unscaled(logits: Tensor) -> Tensor:
    return logits


def _scale_of(config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
    """Return what a configuration says happens to the head's output (Cohere and Falcon-H1, Granite, Gemma-2)."""
    text = config.get_text_config()
    factor = _number(text, "logit_scale", 1.0) * _number(text, "lm_head_multiplier", 1.0)
    factor /= _number(text, "logits_scaling", 1.0)
    cap = _number(text, "final_logit_softcapping", 0.0)

    def scale(logits: Tensor) -> Tensor:
        logits = logits if factor == 1.0 else logits * factor
        return torch.tanh(logits / cap) * cap if cap else logits

    return scale


def _number(config: PretrainedConfig, field: str, default: float) -> float:
    value = getattr(config, field, None)
    return float(value) if isinstance(value, int | float) else default


def _near(first: Tensor, second: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    return bool((first - second).abs().max() <= tolerance * second.abs().max()) if first.numel() else True


def _log_prob(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return log-softmax at the targets, float64 [N]: differences to the largest score, so that float32 loses little."""
    largest_N1 = logits_NV.max(dim=-1, keepdim=True).values
    shifted_NV = logits_NV.float() - largest_N1.float()
    target_N = shifted_NV.gather(1, targets_N.to(shifted_NV.device)[:, None])[:, 0]
    return target_N.cpu().double() - shifted_NV.exp_().sum(dim=-1).cpu().double().log()


# Text


class _TextEncoder:
    """Text to tokens: what the tokenizer puts in front once, long text in pieces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._prefix = self._find_prefix()
        self._gap = self._find_gap()

    def __call__(self, text: str) -> NDArray[np.int32]:
        parts = [np.asarray(self._ids(piece), dtype=np.int32) for piece in self._pieces(text)]
        return np.concatenate([np.asarray(self._prefix, dtype=np.int32), *parts])

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def _find_prefix(self) -> list[int]:
        bare, full = self._ids("a"), self._ids("a", special=True)
        starts = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
        return full[: next(starts, 0)]

    def _find_gap(self) -> int | None:
        """Return how many characters of the space at a cut to leave out, such that pieces give the tokens of the whole.

        0 for byte-level BPE; 1 where the tokenizer puts a space in front of every text (SentencePiece); None: never cut.
        """
        whole, left = self._ids("the cat sat"), self._ids("the cat")
        return next((gap for gap in (0, 1) if left + self._ids(" sat"[gap:]) == whole), None)

    def _pieces(self, text: str) -> Iterator[str]:
        start = 0
        while self._gap is not None and len(text) - start > _PIECE:
            cut = _CUT.search(text, start + _PIECE)
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.start() + self._gap
        yield text[start:]


# Facts about a model


def _context_limit(config: PretrainedConfig) -> int | None:
    text = config.get_text_config()
    fields = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    values = (getattr(text, field, None) for field in fields)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _takes(function: Callable[..., object], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _digest_config(config: PretrainedConfig) -> str:
    # What loading adds, or what changes no vector.
    ignored = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache"}
    fields = {key: value for key, value in config.to_diff_dict().items() if key not in ignored}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def _digest_weights(model: nn.Module) -> str:
    """Hash a few elements of each parameter, rounded to bfloat16 so that the type of computation does not matter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        places = torch.arange(_SAMPLED_ELEMENTS, device=flat.device) * max(flat.numel() - 1, 0)
        sample = flat[places // (_SAMPLED_ELEMENTS - 1)].float().bfloat16().view(torch.int16).cpu()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: dict[str, Any] = tokenizer.get_vocab()
    else:
        state = json.loads(backend.to_str())
        # Set by calls, not by the tokenizer's maker.
        state = {key: value for key, value in state.items() if key not in {"truncation", "padding"}}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

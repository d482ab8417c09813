"""Loading a causal LM with its tokenizer: with its weights, as a configuration only, or with random weights."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from knnlm.errors import InputError, ModelError
from knnlm.model.adapters import digest_adapter, merge_adapter
from knnlm.model.decoder import find_decoder
from knnlm.model.encoding import is_empty
from knnlm.model.gguf_files import read_once, stated_type
from knnlm.model.hardware import pick_device, pick_dtype_on_cpu
from knnlm.model.hub import quiet_hub
from knnlm.model.lm import ADVICE, LanguageModel, context_limit_of
from knnlm.model.sources import Source, find_source


def load_model(
    name_or_folder: str | Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> LanguageModel:
    """Load a causal LM and its tokenizer from a folder or .gguf file (without network access), or from the hub.

    A LoRA adapter's folder gives its base model with the adapter merged in (extra `train`); GGUF needs the extra
    `gguf`.

    `dtype` is float32, bfloat16, float16 or auto: the checkpoint's own type, except on a CPU. There a bfloat16
    checkpoint is computed in bfloat16 only if the CPU has units for it; otherwise, like float16, in float32. `device`
    is cpu, cuda, mps or auto.

    Raises ModelError for anything but a decoder-only causal LM with a tokenizer, InputError for a wrong option.
    """
    target = pick_device(device)
    source = find_source(str(name_or_folder), trust_remote_code=trust_remote_code)
    with _reading(source):
        config, tokenizer = _load_config(source), _load_tokenizer(source)
        taken, note = _pick_dtype(dtype, source, config, target)
        model, adapter = _load_weights(source, taken), ""
    if source.adapter is not None:
        model, adapter = merge_adapter(model, source.adapter), digest_adapter(source.adapter)
    _place(model, target)
    return LanguageModel(model, tokenizer, name=source.name, details=[note] if note else [], adapter=adapter)


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model without its weights.

    Raises ModelError if there is none.
    """
    return _load_tokenizer(find_source(str(name_or_folder)))


def model_file(name_or_folder: str | Path, name: str) -> Path | None:
    """Return the local path of a model's own file, fetched from the hub if needed; None if the model lacks it.

    An adapter's files are its own, not its base's. Raises ModelError if there is no such model.
    """
    if Path(name_or_folder).is_dir():
        return path if (path := Path(name_or_folder, name)).is_file() else None
    source = find_source(str(name_or_folder))
    if source.adapter is not None:
        return path if (path := source.adapter / name).is_file() else None
    if source.options["local_files_only"]:
        raise ModelError(f"{source.name} is a GGUF file; give the folder of a model, or a name on the hub")
    try:
        with quiet_hub():
            found = cached_file(source.place, name, _raise_exceptions_for_missing_entries=False)
    except Exception as error:
        raise _unreadable(source, "could not be read as a model", error) from error
    return None if found is None else Path(found)


def random_model(
    name_or_folder: str | Path,
    *,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Build the model of a configuration with random initial weights instead of trained ones.

    Its name is the given one followed by ` (random)`; `dtype` auto is float32. Raises as `load_model`.
    """
    target = pick_device(device)
    source = find_source(str(name_or_folder), trust_remote_code=trust_remote_code)
    config, tokenizer = _load_config(source), _load_tokenizer(source)
    taken, _ = _pick_dtype("float32" if dtype == "auto" else dtype, source, config, target)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _from_config(source, config, trust_remote_code).to(taken)
    _place(model, target)
    return LanguageModel(model, tokenizer, name=f"{source.name} (random)")


@dataclass(frozen=True)
class Outline:
    """A model's layers and context, known without its weights."""

    layer_names: tuple[str, ...]
    """In network order; some may turn out not to be readable."""
    context_limit: int | None


def read_outline(name_or_folder: str | Path, *, trust_remote_code: bool = False) -> Outline:
    """Return a model's layers and context from its configuration alone. Raises ModelError as `load_model`."""
    source = find_source(str(name_or_folder), trust_remote_code=trust_remote_code)
    with _reading(source):
        config = _load_config(source)
    with torch.device("meta"):  # takes no memory and draws no random numbers
        model = _from_config(source, config, trust_remote_code)
    return Outline(find_decoder(model).names, context_limit_of(config))


def _from_config(source: Source, config: PretrainedConfig, trust_remote_code: bool) -> Any:  # noqa: ANN401
    try:
        return cast(Any, AutoModelForCausalLM).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _unreadable(source, "could not be built as a causal language model", error) from error


def _reading(source: Source) -> AbstractContextManager[None]:
    return read_once() if _is_gguf(source) else nullcontext()


def _is_gguf(source: Source) -> bool:
    return "gguf_file" in source.options


def _place(model: nn.Module, device: torch.device) -> None:
    model.requires_grad_(False)
    # A quantised model, or one spread over devices, is already placed.
    if not getattr(model, "is_quantized", False) and getattr(model, "hf_device_map", None) is None:
        model.to(device)


def _load_config(source: Source) -> PretrainedConfig:
    try:
        with quiet_hub():
            config: PretrainedConfig = AutoConfig.from_pretrained(source.place, **source.options)
    except Exception as error:
        raise _unreadable(source, "could not be read as a model", error) from error
    if config.is_encoder_decoder:
        raise ModelError(f"{source.name} is an encoder-decoder model; {ADVICE}")
    if any("MaskedLM" in name for name in config.architectures or ()):
        raise ModelError(f"{source.name} is an encoder-only model; {ADVICE}")
    return config


def _load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    try:
        with quiet_hub():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.tokenizer, **source.options)
    except Exception as error:
        raise _unreadable(source, "has no tokenizer that can be loaded", error) from error
    # Without files some tokenizer classes are empty instead of failing.
    if is_empty(tokenizer):
        raise ModelError(f"{source.name} has no tokenizer; save one into it with tokenizer.save_pretrained")
    return tokenizer


def _load_weights(source: Source, dtype: torch.dtype | str) -> PreTrainedModel:
    # Never a pickle, which could run arbitrary code. A GGUF file's progress bar cannot be turned off.
    is_gguf = _is_gguf(source)
    reader = {"quantization_config": GgufConfig(dequantize=True)} if is_gguf else {"use_safetensors": True}
    try:
        with quiet_hub(), redirect_stderr(io.StringIO()) if is_gguf else nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.place,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below: transformers' own error says to look elsewhere
                **reader,
                **source.options,
            )
    except Exception as error:
        raise _unreadable(source, "could not be loaded as a causal language model", error) from error
    model: PreTrainedModel = loaded[0]
    if others := sorted(loaded[1]["mismatched_keys"]):
        weight, here, wanted = others[0]
        raise ModelError(
            f"{source.name} has {len(others)} weights of other shapes than its configuration says, such as {weight}: "
            f"{list(here)} for {list(wanted)}; take files that belong together"
        )
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        # transformers fills them with random numbers.
        raise ModelError(f"{source.name} lacks {len(missing)} weights of a causal language model, such as {missing[0]}")
    return model


def _unreadable(source: Source, fact: str, error: Exception) -> ModelError:
    text = " ".join(str(error).split())
    name = source.name if source.adapter is None else f"{source.place}, the base of the adapter {source.name},"
    if "couldn't connect to" in text:
        return ModelError(
            f"{name} {fact}: it is not on this machine, and the hub was not reached; connect, or give a folder"
        )
    return ModelError(f"{name} {fact}: {text if len(text) <= 300 else text[:299] + '…'}")


def _pick_dtype(
    dtype: str, source: Source, config: PretrainedConfig, device: torch.device
) -> tuple[torch.dtype | str, str | None]:
    """The type to load in (`auto` leaves a quantised model as it is), and a note for the user."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto" and dtype not in known:
        raise InputError(f"`dtype` is {dtype!r}; take auto, {', '.join(known)}")
    if dtype == "float16" and device.type == "cpu":
        raise InputError("`dtype='float16'` is not for a CPU, which computes it slowly; take float32 or auto")
    if dtype != "auto":
        return known[dtype], None
    if getattr(config, "quantization_config", None) is not None:
        return "auto", None
    stated = _stated_type(source, config)
    if device.type != "cpu":
        return stated, None
    return pick_dtype_on_cpu(stated)


def _stated_type(source: Source, config: PretrainedConfig) -> torch.dtype:
    if _is_gguf(source):
        return cast(torch.dtype, getattr(torch, stated_type(str(Path(source.place, source.options["gguf_file"])))))
    stated = config.get_text_config().dtype or _load_weights(source, "auto").dtype
    return cast(torch.dtype, getattr(torch, stated) if isinstance(stated, str) else stated)

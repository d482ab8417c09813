"""Loading a causal LM with its tokenizer: weights, configuration alone, or new random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from knnlm.errors import InputError, ModelError
from knnlm.model.decoder import find_decoder
from knnlm.model.encoding import is_empty
from knnlm.model.hardware import pick_device, pick_dtype_on_cpu
from knnlm.model.lm import ADVICE, LanguageModel, context_limit_of


def load_model(
    name_or_folder: str | Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> LanguageModel:
    """Load a causal LM and its tokenizer from a folder (the network is not touched) or from the hub.

    `dtype` is float32, bfloat16, float16 or auto: the checkpoint's own type, except on a CPU. There a bfloat16
    checkpoint is computed as such only if the CPU is measured to be fast at it, and else, like a float16 one, in
    float32. `device` is cpu, cuda, mps or auto.

    Raises ModelError for what is not a decoder-only causal LM with a tokenizer, InputError for a wrong option.
    """
    source = str(name_or_folder)
    target = pick_device(device)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": _is_local(source)}
    config = _load_config(source, options)
    tokenizer = _load_tokenizer(source, options)
    taken, note = _pick_dtype(dtype, source, config, target, options)
    model = _load_weights(source, taken, options)
    _place(model, target)
    return LanguageModel(model, tokenizer, name=source, notes=[note] if note else [])


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model without its weights.

    Raises ModelError when there is none.
    """
    source = str(name_or_folder)
    return _load_tokenizer(source, {"local_files_only": _is_local(source)})


def model_file(name_or_folder: str | Path, name: str) -> Path | None:
    """Return where a file of a model is on this machine, fetched from the hub if need be; None if it has no such file.

    Raises ModelError when there is no such model.
    """
    source = str(name_or_folder)
    if _is_local(source):
        return path if (path := Path(source, name)).is_file() else None
    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except Exception as error:
        raise ModelError(f"{source} could not be read as a model: {_line(error)}") from error
    return None if found is None else Path(found)


def random_model(
    name_or_folder: str | Path,
    *,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Build the model that a configuration describes with the weights that its training began from, not the trained.

    Its name is the given one with ` (random)` behind it; `dtype` auto is float32. Raises as `load_model`.
    """
    source = str(name_or_folder)
    target = pick_device(device)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": _is_local(source)}
    config, tokenizer = _load_config(source, options), _load_tokenizer(source, options)
    taken, _ = _pick_dtype("float32" if dtype == "auto" else dtype, source, config, target, options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _from_config(source, config, trust_remote_code).to(taken)
    _place(model, target)
    return LanguageModel(model, tokenizer, name=f"{source} (random)")


@dataclass(frozen=True)
class Outline:
    """What a model is before its weights are read."""

    layer_names: tuple[str, ...]
    """In the order of the network; a few may turn out not to be readable."""
    context_limit: int | None


def read_outline(name_or_folder: str | Path, *, trust_remote_code: bool = False) -> Outline:
    """Tell a model's layers and context from its configuration alone. Raises ModelError, as `load_model`."""
    source = str(name_or_folder)
    config = _load_config(source, {"trust_remote_code": trust_remote_code, "local_files_only": _is_local(source)})
    with torch.device("meta"):  # no memory is taken and no number is drawn
        model = _from_config(source, config, trust_remote_code)
    return Outline(find_decoder(model).names, context_limit_of(config))


def _from_config(source: str, config: PretrainedConfig, trust_remote_code: bool) -> Any:  # noqa: ANN401
    try:
        return cast(Any, AutoModelForCausalLM).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"{source} could not be built as a causal language model: {_line(error)}") from error


def _place(model: nn.Module, device: torch.device) -> None:
    model.requires_grad_(False)
    # A quantised model, or one spread over devices, has its place already.
    if not getattr(model, "is_quantized", False) and getattr(model, "hf_device_map", None) is None:
        model.to(device)


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
    if config.is_encoder_decoder:
        raise ModelError(f"{source} is an encoder-decoder model; {ADVICE}")
    if any("MaskedLM" in name for name in config.architectures or ()):
        raise ModelError(f"{source} is an encoder-only model; {ADVICE}")
    return config


def _load_tokenizer(source: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        raise ModelError(f"{source} has no tokenizer that can be loaded: {_line(error)}") from error
    # Without files some tokenizer classes come up empty instead of failing.
    if is_empty(tokenizer):
        raise ModelError(f"{source} has no tokenizer; save one into it with tokenizer.save_pretrained")
    return tokenizer


def _load_weights(source: str, dtype: torch.dtype | str, options: Mapping[str, Any]) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except Exception as error:
        raise ModelError(f"{source} could not be loaded as a causal language model: {_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        # transformers fills them with random numbers.
        raise ModelError(f"{source} lacks {len(missing)} weights of a causal language model, such as {missing[0]}")
    return model


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:299] + "…"


def _pick_dtype(
    dtype: str, source: str, config: PretrainedConfig, device: torch.device, options: Mapping[str, Any]
) -> tuple[torch.dtype | str, str | None]:
    """Return the type to load in (`auto` leaves a quantised model as it is), and a note for the user."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto" and dtype not in known:
        raise InputError(f"`dtype` is {dtype!r}; take auto, {', '.join(known)}")
    if dtype == "float16" and device.type == "cpu":
        raise InputError("`dtype='float16'` is not for a CPU, which computes it slowly; take float32 or auto")
    if dtype != "auto":
        return known[dtype], None
    if getattr(config, "quantization_config", None) is not None:
        return "auto", None
    stated = config.get_text_config().dtype or _load_weights(source, "auto", options).dtype
    stated = getattr(torch, stated) if isinstance(stated, str) else stated
    if device.type != "cpu":
        return stated, None
    return pick_dtype_on_cpu(stated)

"""Fingerprint of a model: SHA-256 of its configuration, of a sample of its weights, and of its tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

_SAMPLED_ELEMENTS = 16


def digest_config(config: Any) -> str:  # noqa: ANN401 - transformers stays in lm.py
    """Hash a `transformers` configuration, without fields that loading adds or that do not affect vectors."""
    ignored = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache"}
    fields = {key: value for key, value in config.to_diff_dict().items() if key not in ignored}
    if "gguf_file" in (fields.get("quantization_config") or {}):  # the file's name; its weights are unpacked
        del fields["quantization_config"]
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def digest_weights(model: nn.Module, adapter: str = "") -> str:
    """Hash a few elements of each parameter, rounded to bfloat16 so that the computation's type does not matter.

    :param adapter: digest of an adapter merged into the weights, whose changes the rounding may hide.
    """
    digest = hashlib.sha256(adapter.encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        places = torch.arange(_SAMPLED_ELEMENTS, device=flat.device) * max(flat.numel() - 1, 0)
        sample = flat[places // (_SAMPLED_ELEMENTS - 1)].float().bfloat16().view(torch.int16).cpu()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def digest_tokenizer(tokenizer: Any) -> str:  # noqa: ANN401
    """Hash the vocabulary and the rules of a `transformers` tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: dict[str, Any] = tokenizer.get_vocab()
    else:
        state = json.loads(backend.to_str())
        # Set by calls, not part of the tokenizer.
        state = {key: value for key, value in state.items() if key not in {"truncation", "padding"}}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

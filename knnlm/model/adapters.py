"""LoRA adapters: added to a model, or read from a folder and merged. The only module that imports `peft`."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from knnlm.errors import ModelError, first_line
from knnlm.model.sources import ADAPTER, ADAPTER_WEIGHTS


def add_lora(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """Return the model with LoRA on every linear layer of the blocks; the base weights stay (Hu et al. 2022)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings(), torch.random.fork_rng():
        # peft warns of an option that it corrects itself, and of an attribute that transformers has renamed.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def merge_adapter(model: Any, folder: Path) -> Any:  # noqa: ANN401 - a PreTrainedModel
    """Return the model with an adapter merged into its weights.

    :raises ModelError: the adapter does not fit this model, or is of a kind that cannot be merged.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted: Any = PeftModel.from_pretrained(model, str(folder))
            if not hasattr(adapted.base_model, "merge_and_unload"):
                kind = adapted.peft_config["default"].peft_type
                raise ModelError(f"{folder} is an adapter of the kind {kind}, which changes no weights; give a LoRA")
            return adapted.merge_and_unload()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{folder} could not be loaded as an adapter of its base: {first_line(error)}") from error


def digest_adapter(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights and configuration (which holds their scale)."""
    digest = hashlib.sha256()
    for file in (ADAPTER, ADAPTER_WEIGHTS):
        digest.update((folder / file).read_bytes())
    return digest.hexdigest()

"""The LM head applied to stored vectors: from `final_norm` vectors to the model's logits.

Shapes: B batch, T time, D dimension, N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from knnlm.errors import ModelError
from knnlm.model.decoder import find_head

Scores = Callable[[Tensor], Tensor]
# Logits that are widened to float64 at a time: 64 MB.
_BLOCK = 1 << 23


def find_scores(model: nn.Module, final_BTD: Tensor, logits_BTV: Tensor) -> Scores:
    """Return the function from `final_norm` vectors to logits, verified on vectors whose logits are known.

    Raises ModelError for a head that does more than multiply, scale and cap.
    """
    for scale in (_scale_of(model.config), _unscaled):
        scores = _scores(find_head(model), scale, final_BTD.dtype)
        with torch.inference_mode():
            found = scores(final_BTD)
        if found.shape == logits_BTV.shape and near(found, logits_BTV):
            return scores
    raise ModelError(f"the LM head of {type(model).__name__} is not understood: it does more than multiply and scale")


def _scores(head: nn.Module, scale: Scores, dtype: torch.dtype) -> Scores:
    def scores(final_ND: Tensor) -> Tensor:
        weight = next(head.parameters())
        logits: Tensor = head(final_ND.to(weight.device, dtype))
        return scale(logits)

    return scores


def _unscaled(logits: Tensor) -> Tensor:
    return logits


def _scale_of(config: Any) -> Scores:  # noqa: ANN401
    """The configured scaling and capping of the head's output, as in Cohere, Falcon-H1, Granite, Gemma-2."""
    text = config.get_text_config()
    factor = _number(text, "logit_scale", 1.0) * _number(text, "lm_head_multiplier", 1.0)
    factor /= _number(text, "logits_scaling", 1.0)
    cap = _number(text, "final_logit_softcapping", _number(text, "logits_soft_cap", 0.0))

    def scale(logits: Tensor) -> Tensor:
        logits = logits if factor == 1.0 else logits * factor
        return torch.tanh(logits / cap) * cap if cap else logits

    return scale


def _number(config: object, field: str, default: float) -> float:
    value = getattr(config, field, None)
    return float(value) if isinstance(value, int | float) else default


def near(first: Tensor, second: Tensor) -> bool:
    """Return whether two computations of the same values agree within the rounding of their type."""
    tolerance = 1e-4 if second.dtype == torch.float32 else 3e-2
    return not second.numel() or bool((first - second).abs().max() <= tolerance * second.abs().max())


def log_prob(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return log-softmax at the targets, float64 [N]; float32 suffices for differences from the largest logit."""
    largest_N1 = logits_NV.max(dim=-1, keepdim=True).values
    shifted_NV = logits_NV.float() - largest_N1.float()
    target_N = shifted_NV.gather(1, targets_N.to(shifted_NV.device)[:, None])[:, 0]
    return target_N.cpu().double() - shifted_NV.exp_().sum(dim=-1).cpu().double().log()


def log_softmax(logits_NV: Tensor) -> Tensor:
    """Return the log-probabilities of the whole vocabulary, float32 [N, V], whose sum is 1 within 1e-6.

    Computed in float64, as sums of 50,000 and more terms in float32 are off by up to 1e-5.
    """
    rows = max(1, _BLOCK // logits_NV.shape[-1])
    # MPS has no float64.
    wide = torch.float32 if logits_NV.device.type == "mps" else torch.float64
    parts = [torch.log_softmax(part, -1, dtype=wide).float() for part in torch.split(logits_NV, rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)

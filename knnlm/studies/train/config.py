"""Settings of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from knnlm.config import check_positive, check_seed
from knnlm.errors import InputError

REGULARIZERS = ("push-away", "uniformity", "different-tokens")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class PushAway:
    """Term added to the training loss: -λ times the mean distance of a layer's vectors, or λ times their uniformity."""

    weight: float = 0.0
    """λ; 0.001 to 0.1 in arXiv 2506.24106. With 0, training is a plain Trainer's to the last bit."""
    regularizer: str = "push-away"
    """`push-away`: mean distance over batch and sequence. `uniformity`: Wang & Isola 2020. `different-tokens`: mean
    distance of contexts with different next tokens."""
    layer: str = "final_norm"
    """A layer's name, or a pattern that matches one, such as `-1.ffn_input`; the paper uses the last layer."""
    between_domains: bool = False
    """Mean distance over pairs between domains A and B, in place of all pairs."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise InputError(f"`weight` is {self.weight}, but λ must be a finite number of at least 0")
        if self.regularizer not in REGULARIZERS:
            raise InputError(f"`regularizer` is {self.regularizer!r}, but must be one of {', '.join(REGULARIZERS)}")
        if self.between_domains and self.regularizer != "push-away":
            raise InputError(f"`regularizer={self.regularizer!r}` has no form between domains; leave `other_text` out")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training."""

    push_away: PushAway = PushAway()
    steps: int = 1000
    batch_size: int = 8
    """Windows in a step; with two domains, half of them from each."""
    context: int | None = None
    """Tokens in a window; None: the model's limit, at most 512."""
    learning_rate: float | None = None
    """Peak learning rate; None: 5e-4 from scratch (as in arXiv 2506.24106) and with LoRA, else 5e-5."""
    schedule: str = "cosine"
    """After a linear warm-up over a twentieth of the steps, at most 100: `cosine` decays to 0, `constant` stays."""
    from_scratch: bool = False
    """Use the model's shape and tokenizer with new random weights."""
    lora: int | None = None
    """Rank of LoRA (Hu et al. 2022) on the linear layers of all blocks, scaled by 2; None: train all weights."""
    evaluations: int = 10
    """Number of evaluations during training, with a checkpoint at each."""
    text_field: str = "text"
    dtype: str = "auto"
    """Type of matrix products, with float32 weights; `auto` is bfloat16 if that is faster on this machine."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context", "learning_rate", "evaluations"):
            check_positive(name, getattr(self, name))
        check_positive("lora", self.lora)
        if self.context == 1:
            raise InputError("`context` is 1, but a window needs a token and the next one; take at least 2")
        if self.from_scratch and self.lora:
            raise InputError("`lora` changes a trained model, `from_scratch` starts without one; leave one of them out")
        if self.schedule not in SCHEDULES:
            raise InputError(f"`schedule` is {self.schedule!r}, but must be one of {', '.join(SCHEDULES)}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"`dtype` is {self.dtype!r}, but training takes auto, float32 or bfloat16")
        if self.push_away.between_domains and self.batch_size % 2:
            raise InputError(f"`batch_size` is {self.batch_size}, but has to be even: half of it is `other_text`")
        check_seed(self.seed)

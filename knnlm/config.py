"""Settings: frozen, keyword-only dataclasses that check their values. `None` means fitted or determined at run time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

from knnlm.errors import InputError

KEY_BYTES = {"float16": 2, "float32": 4}
METRICS = ("l2", "cosine", "ip")
# Padded tokens in one forward pass: enough to fill the cores, small enough that activations stay near the caches.
BATCH_TOKENS = 4096
LEAST_EVAL_TOKENS = 128
# Keys of a part of a datastore, of each layer: its work is what a kill costs, and one file is copied in seconds.
PART_ROWS = 1 << 20
# A document is cut where a part would otherwise have this many times as many keys.
LONGEST_PART = 2
# FAISS keeps its seed in an int32.
LARGEST_SEED = (1 << 31) - 1


def check_positive(name: str, value: float | None) -> None:
    """Raise InputError unless the value is None or a finite number above 0."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise InputError(f"`{name}` is {value}, but must be a finite number above 0")


def check_whole(name: str, value: object, *, least: int) -> None:
    """Raise InputError unless the value is an integer of at least `least`: NumPy's count, booleans do not."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise InputError(f"`{name}` is {value}, but must be a whole number of at least {least}")


def check_seed(seed: int) -> None:
    """Raise InputError unless the seed is one that NumPy, torch and FAISS all accept."""
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"`seed` is {seed}, but must be from 0 to {LARGEST_SEED}")


def check_stride(stride: int, context: int, source: str = "") -> None:
    """Raise InputError if windows of `context` tokens that begin `stride` tokens apart leave tokens out.

    :param source: where the context comes from, if it is not a setting.
    """
    if stride > context:
        raise InputError(
            f"`stride={stride}` is over `context={context}`{source}: tokens between windows would never be scored; "
            "take a stride of at most the context"
        )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How text becomes windows of tokens (design.md, section 6)."""

    context: int | None = None
    """Tokens of a window; None: the model's limit, at most 1024."""
    stride: int | None = None
    """New tokens in each window after the first; None: half of the context."""
    max_tokens: int | None = None
    """Tokens of the datastore's text to use; None: all."""
    text_field: str = "text"
    protocol: str = "documents"
    """`documents`, or `knn-transformers` for figures comparable with that project's run_clm.py."""
    windows: int | None = None
    """Windows per forward pass; None: as many as fit into `BATCH_TOKENS`."""

    def __post_init__(self) -> None:
        for name, value in (("context", self.context), ("stride", self.stride), ("max_tokens", self.max_tokens)):
            check_positive(name, value)
        check_positive("windows", self.windows)
        if self.protocol != "documents" and self.max_tokens:
            raise InputError(f"`protocol={self.protocol!r}` takes the whole text; leave `max_tokens` out")
        if self.context and self.stride:
            check_stride(self.stride, self.context)

    def batch_tokens(self, context: int) -> int:
        """Padded tokens in one forward pass of windows of `context` tokens."""
        return self.windows * context if self.windows else BATCH_TOKENS


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Which layers are examined, which of them may be chosen, and how one is chosen."""

    layers: str | None = None
    """Patterns of layers to examine; None: every part of every block, and `final_norm`. `run` stores and evaluates all
    layers that are named here, else the few that can matter."""
    candidates: str = "candidates"
    """Patterns of layers that may be chosen; by default `ffn_input` of the upper half of the blocks."""
    select: str = "auto"
    """`auto` (the last `ffn_input`, unless another layer's pilot is better beyond the interval; by dispersion without
    pilots), or among the candidates `dispersion`, `probe` (how often nearest keys have the same next token), `pilot`
    (the best perplexity of a small kNN-LM inside a sample), or the name of a layer."""


@dataclass(frozen=True, kw_only=True)
class KNNConfig:
    """The kNN distribution and its weight in the mixture.

    A `k`, `temperature` or `lam` of None is fitted on the tuning part: the half of the evaluation text on which nothing
    is reported.
    """

    k: int | None = None
    temperature: float | None = None
    lam: float | None = None
    metric: str = "l2"
    index: str = "auto"
    """`auto`, `exact`, or a FAISS factory string."""
    max_k: int = 1024
    """The largest k tried in fitting."""

    def __post_init__(self) -> None:
        if self.k is not None:
            check_whole("k", self.k, least=1)
        check_whole("max_k", self.max_k, least=1)
        check_positive("temperature", self.temperature)
        if self.lam is not None and not 0 <= self.lam <= 1:
            raise InputError(f"`lam` is {self.lam}, but is the weight of the kNN distribution, from 0 to 1")
        if self.metric not in METRICS:
            raise InputError(f"`metric` is {self.metric!r}, but must be one of {', '.join(METRICS)}")

    @property
    def is_fitted(self) -> bool:
        """Whether k, temperature or lambda has to be fitted."""
        return None in (self.k, self.temperature, self.lam)

    @property
    def search_k(self) -> int:
        """Neighbours to retrieve for each query."""
        return self.k or self.max_k


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How much of the evaluation text is used, and how many examples are reported."""

    eval_tokens: int | None = 20_000
    """Token budget, spread over the documents; None: the whole evaluation text."""
    examples: int = 12
    """Tokens shown with their neighbours: this many of those helped most, and of those hurt most."""

    def __post_init__(self) -> None:
        check_positive("eval_tokens", self.eval_tokens)
        if self.eval_tokens and self.eval_tokens < LEAST_EVAL_TOKENS:
            raise InputError(
                f"`eval_tokens` is {self.eval_tokens}, but half of them tune and half report: at least "
                f"{LEAST_EVAL_TOKENS} are needed"
            )
        check_whole("examples", self.examples, least=0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of the functions in `knnlm.pipeline.verbs`."""

    text: TextConfig = TextConfig()
    layers: LayerConfig = LayerConfig()
    knn: KNNConfig = KNNConfig()
    evaluation: EvalConfig = EvalConfig()
    key_dtype: str = "float16"
    """Type of the keys on disk: `float16`, or `float32` for values that overflow float16 or must not be rounded."""
    disk_budget: float | None = None
    """Bytes of disk for keys; None: half of the free space."""
    memory: float | None = None
    """Bytes of memory that the process may take, without mapped files (`knnlm.memory`); None: as much as is quick."""
    seed: int = 0
    """Seed of all random draws."""

    def __post_init__(self) -> None:
        check_positive("disk_budget", self.disk_budget)
        check_positive("memory", self.memory)
        check_seed(self.seed)
        if self.key_dtype not in KEY_BYTES:
            raise InputError(f"`key_dtype` is {self.key_dtype!r}, but must be one of {', '.join(KEY_BYTES)}")

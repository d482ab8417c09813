"""How much a request may ask for, and how many may wait."""

from __future__ import annotations

from dataclasses import dataclass, fields

from knnlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is beyond them is refused, with a 4xx that names the limit."""

    prompt_tokens: int = 8192
    """Of one prompt; the model's own context is a limit as well."""
    completion_tokens: int = 2048
    """Of one choice."""
    neighbors: int = 1024
    """k of a request's own setting; the served setting may have more."""
    scored_tokens: int = 65_536
    """Of all prompts of a request, times n, where their log-probabilities are told."""
    batch: int = 16
    """Choices that are continued together."""
    queue: int = 128
    """Choices, and the explorer's calls, that wait."""
    seconds: float = 120.0
    """For a request's body to come, and again for its answer."""
    body_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not 0 < value < float("inf"):
                raise InputError(f"`{one.name}` is {value}, but must be above 0")

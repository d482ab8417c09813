"""Limits of a request and of the queue."""

from __future__ import annotations

from dataclasses import dataclass, fields

from knnlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Requests beyond a limit are refused with a 4xx that names it."""

    prompt_tokens: int = 8192
    """Tokens of one prompt; the model's own context is a limit as well."""
    completion_tokens: int = 2048
    """Generated tokens of one choice."""
    neighbors: int = 1024
    """Largest k that a request may set; the served setting may have a larger one."""
    scored_tokens: int = 65_536
    """Prompt tokens of a request, times n, whose log-probabilities are reported."""
    batch: int = 16
    """Choices generated together."""
    queue: int = 128
    """Choices and explorer calls that may wait."""
    seconds: float = 120.0
    """Seconds for a request's body to arrive, and again for its answer."""
    body_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not 0 < value < float("inf"):
                raise InputError(f"`{one.name}` is {value}, but must be above 0 and finite")

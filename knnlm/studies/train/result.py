"""What a training found, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Validation:
    """A model on held-out text, in windows that do not overlap."""

    perplexity: float
    dispersion: float
    """Of the trained layer: mean over batches of the mean pairwise distance in the batch."""


@dataclass(frozen=True)
class TrainPoint:
    """A training after some steps; the means are over the steps since the last point, None before the first step."""

    step: int
    text: Validation
    other: Validation | None = None
    """On the other domain's text."""
    cross_entropy: float | None = None
    dispersion: float | None = None
    spread: float | None = None
    """What is raised: the distance of the regularizer, or minus the uniformity."""


@dataclass(frozen=True)
class TrainResult:
    """A trained model and how it got there."""

    folder: str
    points: tuple[TrainPoint, ...]
    layer: str
    """Whose vectors the loss and the dispersions are of."""
    parameters: int
    trained_parameters: int
    tokens: int
    """Seen in training, with repetitions."""
    text_tokens: int
    """In the text, less what is held out."""
    seconds: float
    settings: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

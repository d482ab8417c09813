"""Results of a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from knnlm.shown import Shown, Table, figure


@dataclass(frozen=True)
class Validation:
    """Evaluation on held-out text, in disjoint windows."""

    perplexity: float
    dispersion: float
    """Dispersion of the trained layer: mean over batches of the mean pairwise distance within a batch."""


@dataclass(frozen=True)
class TrainPoint:
    """State of a training after some steps. Means are since the last point; None before the first step."""

    step: int
    text: Validation
    other: Validation | None = None
    """Evaluation on the other domain's text."""
    cross_entropy: float | None = None
    dispersion: float | None = None
    spread: float | None = None
    """The maximised term: the regularizer's distance, or minus the uniformity."""


def _row(one: TrainPoint) -> tuple[str, ...]:
    return (
        *(f"{one.step}", figure(one.cross_entropy, ".4f"), figure(one.spread, ".4f")),
        *(figure(one.text.dispersion, ".4f"), figure(one.text.perplexity, ".2f")),
        figure(one.other.perplexity if one.other else None, ".2f"),
    )


@dataclass(frozen=True, repr=False)
class TrainResult(Shown):
    """A trained model, with the history of its training."""

    folder: str
    points: tuple[TrainPoint, ...]
    layer: str
    """Layer of the push-away loss and the dispersions."""
    parameters: int
    trained_parameters: int
    tokens: int
    """Number of tokens seen in training, with repetitions."""
    text_tokens: int
    """Number of tokens in the text, without the held-out part."""
    seconds: float
    settings: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    """Names of the files in the folder, train.json included, which `overwrite` may remove."""

    def _facts(self) -> Iterator[str]:
        yield f"{self.folder}: {self.trained_parameters:,} of {self.parameters:,} parameters trained"
        yield f"{self.tokens:,} tokens of a text of {self.text_tokens:,}, in {figure(self.seconds, ',.0f')} s"
        for one in (self.points[0], self.points[-1]) if self.points else ():
            shown = f"perplexity {figure(one.text.perplexity)}, dispersion {figure(one.text.dispersion, '.4f')}"
            yield f"step {one.step}: {shown}"

    def _table(self) -> Table:
        heads = ("step", "loss", "raised", "dispersion", "validation perplexity", "other's")
        return Table(f"Training; dispersion of {self.layer}", heads, tuple(map(_row, self.points)))

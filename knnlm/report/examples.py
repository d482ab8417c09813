"""Display text of the tokens that retrieval helped or hurt most: white space visible, control characters replaced."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass

from knnlm.report import numbers
from knnlm.results import NeighborText, TokenExample

CONTEXT_CHARACTERS = 240
NEIGHBOR_CHARACTERS = 120
_VISIBLE = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}


@dataclass(frozen=True)
class Bar:
    """A labelled probability, as text and as a bar."""

    label: str
    text: str
    share: float
    """Length of the bar, 0 to 1."""


@dataclass(frozen=True)
class NeighborView:
    """One neighbour, as display text."""

    before: str
    token: str
    agrees: bool
    """Whether its token is the target."""
    source: str
    distance: str
    weight: Bar


@dataclass(frozen=True)
class ExampleView:
    """One token in its context, as display text."""

    before: str
    token: str
    after: str
    effect: str
    bars: tuple[Bar, ...]
    neighbors: tuple[NeighborView, ...]


def example_view(example: TokenExample) -> ExampleView:
    """A token with its probabilities and neighbours, in order of decreasing weight."""
    neighbors = sorted(example.neighbors, key=lambda neighbor: -neighbor.weight)
    return ExampleView(
        before=flow_end(example.before, CONTEXT_CHARACTERS),
        token=visible(example.token),
        after=flow_start(example.after, CONTEXT_CHARACTERS // 2),
        effect=_effect(example),
        bars=(
            _bar("LM", example.lm_probability),
            _bar("kNN", example.knn_probability),
            _bar("mixed", example.mixed_probability),
        ),
        neighbors=tuple(_neighbor_view(neighbor, example.token) for neighbor in neighbors),
    )


def visible(token: str) -> str:
    """Make white space of a token visible: `" the"` -> `"␣the"`, a line break -> `"↵"`, nothing -> `"(empty)"`."""
    return "".join(_VISIBLE.get(character, _printable(character)) for character in token) or "(empty)"


def flow_end(text: str, limit: int) -> str:
    """The end of a text, for display before a token."""
    text = _flow(text)
    if len(text) <= limit:
        return text
    end = text[-limit:]
    first_space = end.find(" ", 0, 20)  # drop a partial first word, if it is short
    return f"…{end if first_space < 0 else end[first_space:]}"


def flow_start(text: str, limit: int) -> str:
    """The start of a text, for display after a token."""
    text = _flow(text)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _flow(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\n", "↵ ").replace("\t", "⇥ ")
    return "".join(_printable(character) for character in text)


def _printable(character: str) -> str:
    """Replace control, format (such as direction-changing) and lone surrogate characters by U+FFFD."""
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(character) in {"Cc", "Cf", "Cs"} else character


def _effect(example: TokenExample) -> str:
    before, after = example.lm_probability, example.mixed_probability
    if not (before > 0 and after > 0 and math.isfinite(before) and math.isfinite(after)):
        return ""
    ratio, word = (after / before, "likelier") if after >= before else (before / after, "less likely")
    return f"{numbers.significant(ratio, 2)} times {word}"


def _bar(label: str, value: float) -> Bar:
    share = min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0
    return Bar(label, numbers.probability(value), share)


def _neighbor_view(neighbor: NeighborText, target: str) -> NeighborView:
    return NeighborView(
        before=flow_end(neighbor.before, NEIGHBOR_CHARACTERS),
        token=visible(neighbor.token),
        agrees=neighbor.token == target,
        source=_flow(neighbor.source),
        distance=numbers.significant(neighbor.distance),
        weight=_bar("weight", neighbor.weight),
    )

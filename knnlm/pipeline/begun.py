"""What a build has settled before its first key: with it the same command goes on after a kill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from knnlm.documents import score_document, score_from_document
from knnlm.errors import InputError
from knnlm.places import mark_unfinished, read_unfinished
from knnlm.results import ScoreResult


@dataclass(frozen=True)
class Begun:
    """A datastore under construction."""

    layers: tuple[str, ...]
    """The layers that are stored."""
    scored: ScoreResult | None
    """The scores by which they were chosen, or those of all keys once these are stored; None: still to come."""


def read_begun(folder: Path) -> Begun | None:
    """Return what the same work has settled in this folder; None if it begins."""
    document = read_unfinished(folder)
    if document is None:
        return None
    try:
        scores = document.get("scores")
        return Begun(tuple(map(str, document["layers"])), None if scores is None else score_from_document(scores))
    except (KeyError, TypeError, InputError):  # of another version
        return None


def begin(folder: Path, work: str, layers: Sequence[str], scored: ScoreResult | None = None) -> Begun:
    """Write down what is settled."""
    scores = None if scored is None else score_document(scored)
    mark_unfinished(folder, work, whole=False, layers=layers, scores=scores)
    return Begun(tuple(layers), scored)


def mark_whole(folder: Path, work: str, begun: Begun, scored: ScoreResult) -> None:
    """Mark the datastore as complete but for an index, fitted settings or a report."""
    mark_unfinished(folder, work, layers=begun.layers, scores=score_document(scored))

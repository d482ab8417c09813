"""What `score --vectors` takes, and what of the other options it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from knnlm.errors import InputError
from knnlm.screen import Screen

if TYPE_CHECKING:
    from knnlm.results import VectorScores

TAKES = ("vectors", "labels", "out", "overwrite", "show", "seed", "json")


def score_files(
    call: typer.Context, vectors: Sequence[Path], labels: Path | None, seed: int, screen: Screen
) -> VectorScores:
    """Scores of .npy files; nothing of a language model is loaded.

    :raises InputError: an option was given that vectors have no use for.
    """
    given = [parameter.name for parameter in call.command.params if _given(call, parameter.name or "")]
    if others := [name for name in given if name not in TAKES]:
        named = ", ".join(f"--{(name or '').replace('_', '-')}" for name in others)
        raise InputError(f"--vectors are scored without a model and a text; leave out {named}")
    from knnlm.vectors import score_vectors  # torch

    return score_vectors(vectors, labels=labels, seed=seed, progress=screen)


def _given(call: typer.Context, name: str) -> bool:
    source = call.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_given(model: str | None, text: Sequence[str] | None, labels: Path | None) -> tuple[str, Sequence[str]]:
    """The model and the text of a score without --vectors.

    :raises InputError: one of them is missing, or there are labels.
    """
    if labels is not None:
        raise InputError(f"--labels {labels} are of --vectors, which are missing")
    if model is None or not text:
        raise InputError(
            "knnlm score needs --model and --text, or --vectors alone; knnlm score --help lists the options"
        )
    return model, text

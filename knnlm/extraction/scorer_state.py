"""The scores of the parts that are finished, in a file beside them: a pass that goes on needs them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from knnlm.files import fsync_folder
from knnlm.scores.layer_scorer import LayerScorer
from knnlm.store.writer import DatastoreWriter

NAME = "scorer.npz"
# The number of parts that the file is about.
PARTS = "parts"


class ScorerState:
    """A scorer's sums and sampled vectors. What it only counts or draws is repeated when the text is read again."""

    def __init__(self, folder: Path, scorer: LayerScorer, writer: DatastoreWriter) -> None:
        """The writer then goes on only with parts whose scores are known."""
        self._path, self._scorer = folder / NAME, scorer
        self._kept = _read(self._path)
        self._parts = int(self._kept.get(PARTS, 0))
        if self._parts > writer.stored_parts:
            self._parts = 0
        writer.use_stored(self._parts)

    def between_parts(self, number: int) -> None:
        """Called before the first batch of a part that is not stored: take the scores up, or write them down."""
        if number and number == self._parts:
            self._scorer.restore(self._kept)
        elif number:
            self._write(number)
        self._kept = {}

    def _write(self, parts: int) -> None:
        temporary = self._path.with_name(f".{NAME}")
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **{PARTS: np.array(parts)}, **self._scorer.state())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        fsync_folder(self._path.parent)


def forget(folder: Path) -> None:
    """Remove the file, if there is one, once all parts are finished."""
    (folder / NAME).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as kept:
            return dict(kept)
    except (OSError, ValueError, BadZipFile):  # none, or one that a failing disk has cut short
        return {}

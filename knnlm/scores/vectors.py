"""Label-free scores of vectors from files: of images, audio, any encoder.

Legend: N rows, T vectors of a row, D dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from knnlm.errors import InputError, first_line
from knnlm.progress import Progress, Silent
from knnlm.regular import check_regular
from knnlm.results import Interval, LayerScore, VectorScores
from knnlm.scores.dispersion import BadVector, Span
from knnlm.scores.layer_scorer import LayerScorer
from knnlm.version import versions

# Elements read at a time: 16 MB of float32.
BLOCK = 1 << 22


def score_vectors(
    files: Sequence[str | Path],
    *,
    labels: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> VectorScores:
    """Score each .npy file of vectors, float [N, D], or [N, T, D] for N segments of T vectors.

    :param labels: .npy of N integers, one for each row, which the retrieval probe (how often nearest vectors agree)
        compares in place of next tokens. Without it the probe is NaN.
    :returns: scores named after the files.
    :raises InputError: a file is no such array, holds NaN, infinite or zero vectors, or does not fit the labels.
    """
    names = [Path(file).stem for file in files]
    if len(set(names)) < len(names):
        raise InputError(f"there are two files alike ({', '.join(names)}); results are named after files")
    label_N = None if labels is None else _read_labels(Path(labels))
    opened = [_open(Path(file), label_N) for file in files]
    scores = [
        _score(name, vectors_NTD, label_N, seed, progress or Silent())
        for name, vectors_NTD in zip(names, opened, strict=True)
    ]
    return VectorScores(
        layers=tuple(scores),
        rows=sum(len(vectors_NTD) for vectors_NTD in opened),
        vectors=sum(len(vectors_NTD) * vectors_NTD.shape[1] for vectors_NTD in opened),
        settings={"vectors": [str(file) for file in files], "labels": labels and str(labels), "seed": seed},
        versions=versions(),
    )


def _score(
    name: str,
    vectors_NTD: NDArray[np.floating],
    label_N: NDArray[np.int64] | None,
    seed: int,
    progress: Progress,
) -> LayerScore:
    rows, length, dim = vectors_NTD.shape
    scorer, size = LayerScorer({name: dim}, seed=seed), max(1, BLOCK // (length * dim))
    with progress.stage(f"scoring {name}", "rows") as advance:
        for start in range(0, rows, size):
            rows_NTD = vectors_NTD[start : start + size]
            _check_size(name, start, rows_NTD)
            block = torch.from_numpy(rows_NTD.astype(np.float32))
            numbers = range(start, start + len(block))
            known = np.zeros(len(block), np.int64) if label_N is None else label_N[start : start + size]
            # Every row is a cluster: the jackknife leaves rows out, and the probe searches other rows.
            scorer.begin_batch(
                [Span(row, 0, length, number) for row, number in enumerate(numbers)],
                [np.full(length, label) for label in known],
            )
            try:
                scorer.receive(name, block)
            except BadVector as error:
                raise InputError(f"row {start + error.row} of {name} {error.fault}; leave it out") from None
            advance(start + len(block), rows)
    (score,) = scorer.scores()
    return score if label_N is not None else replace(score, probe=math.nan, probe_interval=Interval(0.0, 1.0))


def _check_size(name: str, start: int, rows_NTD: NDArray[np.floating]) -> None:
    """Raise InputError for vectors, float64 or wider, that float32 would turn to zero or infinity."""
    if rows_NTD.dtype.itemsize <= 4:
        return
    largest_NT = np.abs(rows_NTD).max(axis=2)
    fits = np.finfo(np.float32)
    outside_NT = (largest_NT > fits.max) & np.isfinite(largest_NT) | (largest_NT < fits.tiny) & (largest_NT > 0)
    if outside_NT.any():
        row, place = np.argwhere(outside_NT)[0]
        raise InputError(
            f"row {start + row} of {name} has {largest_NT[row, place]:.3g} for its largest number, but scores are "
            f"computed in float32, {fits.tiny:.1e} to {fits.max:.1e}; multiply all vectors by one number, which "
            "changes no score"
        )


def _open(path: Path, label_N: NDArray[np.int64] | None) -> NDArray[np.floating]:
    """The array [N, T, D], memory-mapped."""
    vectors = _load(path)
    if vectors.ndim not in (2, 3) or vectors.dtype.kind != "f" or len(vectors) < 2 or not vectors.size:
        raise InputError(
            f"{path} holds {vectors.dtype} {list(vectors.shape)}; vectors are floats of shape [rows, dimension] or "
            "[rows, vectors, dimension], at least 2 rows"
        )
    if label_N is not None and len(label_N) != len(vectors):
        raise InputError(f"{path} has {len(vectors)} rows, but there are {len(label_N)} labels; give one for each row")
    return vectors if vectors.ndim == 3 else vectors[:, None]


def _read_labels(path: Path) -> NDArray[np.int64]:
    labels = _load(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"{path} holds {labels.dtype} {list(labels.shape)}; labels are integers, one for each row")
    return labels.astype(np.int64)


def _load(path: Path) -> NDArray[Any]:
    if not path.exists():
        raise InputError(f"there is no file {path}; give a .npy file, as numpy.save writes it")
    try:
        check_regular(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python: a damaged one gives errors of many kinds
        reason = first_line(error)
        raise InputError(f"{path} is no .npy file of numbers ({reason}); save one with numpy.save") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is an archive of arrays; save one array with numpy.save")
    return array

"""report.json: conversion of results to strict JSON and back. The schema is in docs/report-json.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from index.typed import Misfit, build, shown
from knnlm.errors import InputError
from knnlm.files import strict_json, write_text
from knnlm.layer_names import loosely_split
from knnlm.places import REPORT_FORMAT
from knnlm.results import (
    EvalResult,
    Interval,
    LayerResult,
    LayerScore,
    ScoreResult,
    VectorScores,
)

FORMAT = REPORT_FORMAT
VERSION = 1
Result = TypeVar("Result")

# A layer's row is flat: its `interval` is the dispersion's, so that of `change` is written as `change_interval`.
RENAMED = {"lam": "lambda", "interval": "change_interval"}
SCORE_FIELDS = tuple(field.name for field in fields(LayerScore) if field.name != "layer")


def to_document(result: EvalResult) -> dict[str, Any]:
    """Return an evaluation as report.json's object: NaN and infinity become null, intervals `[low, high]`."""
    document = _head("evaluation") | _plain_fields(result)
    document["layers"] = [_layer_row(layer) for layer in result.layers]
    return document


def from_document(document: Mapping[str, Any]) -> EvalResult:
    """Return the evaluation that `to_document` wrote; null becomes NaN where a number is expected.

    :raises InputError: the object is not an evaluation of this format and version, or lacks a field
    """
    _check_head(document, "evaluation")
    rows = document.get("layers")
    layers = [_layer_fields(row) for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else rows
    return _built(EvalResult, {**document, "layers": layers})


def score_document(result: ScoreResult | VectorScores) -> dict[str, Any]:
    """Return the document of `knnlm score`, with values as in `to_document`."""
    document = _head("score" if isinstance(result, ScoreResult) else "vectors") | _plain_fields(result)
    document["layers"] = [_names(score.layer) | _plain_fields(score) for score in result.layers]
    if isinstance(result, ScoreResult):
        document["selected"] = result.choice.layer
    return document


def score_from_document(document: object) -> ScoreResult:
    """Return the scores that `score_document` wrote. Raises as `from_document`."""
    if not isinstance(document, Mapping):
        raise InputError(f"not a score report: {type(document).__name__} instead of an object")
    _check_head(document, "score")
    return _built(ScoreResult, document)


def dumps(document: Mapping[str, Any]) -> str:
    """Return a document as strict JSON text; a NaN or infinity left in it raises ValueError."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_document(document: Mapping[str, Any], path: str | Path) -> None:
    """Write a document to a file atomically.

    :raises OSError: the file cannot be written
    """
    write_text(path, dumps(document))


def _head(kind: str) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "kind": kind}


def _check_head(document: Mapping[str, Any], kind: str) -> None:
    got = tuple(document.get(key) for key in ("format", "version", "kind"))
    if got != (FORMAT, VERSION, kind):
        due = (FORMAT, VERSION, kind)
        raise InputError(f"not a {kind} report: format, version and kind are {got!r}, expected {due!r}")


def _names(layer: str) -> dict[str, Any]:
    block, part = loosely_split(layer)
    return {"layer": layer, "block": block, "part": part}


def _layer_row(layer: LayerResult) -> dict[str, Any]:
    score = dict.fromkeys(SCORE_FIELDS) if layer.score is None else _plain_fields(layer.score)
    measured = {RENAMED.get(key, key): value for key, value in _plain_fields(layer).items() if key != "score"}
    return _names(layer.layer) | score | measured


def _layer_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    written = {new: old for old, new in RENAMED.items()}
    measured = {written.get(key, key): value for key, value in row.items() if key not in SCORE_FIELDS}
    score = {key: row[key] for key in SCORE_FIELDS if key in row}
    unscored = all(value is None for value in score.values())
    return measured | {"score": None if unscored else score | {"layer": row.get("layer")}}


def _plain_fields(value: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    return {field.name: plain(getattr(value, field.name)) for field in fields(value)}


def plain(value: Any) -> Any:  # noqa: ANN401 - anything that a result or a setting holds
    """Return strict JSON values: NaN and infinity become null, an interval `[low, high]`, dataclasses objects."""
    return strict_json(value, _lowered)


def _lowered(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Interval):
        return [value.low, value.high]
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, set | frozenset):
        return list(value)
    if value is None or isinstance(value, bool | float | Mapping | list | tuple):
        return value
    # str() and int() also for subclasses (StrEnum), so that the document holds plain types only
    return int(value) if isinstance(value, int) else whole_text(str(value))


def whole_text(text: str) -> str:
    """Return the text with lone surrogates escaped: the name of a file that is not UTF-8 contains them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _built(kind: type[Result], data: Mapping[str, Any]) -> Result:
    try:
        return build(kind, data, {float: _number, Interval: _interval})
    except Misfit as error:
        raise InputError(f"this report is damaged, or was written by another version: {error}") from None


def _number(value: Any) -> float:  # noqa: ANN401
    return math.nan if value is None else build(float, value)


def _interval(value: Any) -> Interval:  # noqa: ANN401
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise Misfit(f"it is {shown(value)}, but must be an interval [low, high]")
    return Interval(*map(_number, value))

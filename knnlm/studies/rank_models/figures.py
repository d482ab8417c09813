"""Measured figures of models, such as perplexities: read from a file and matched to the models."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from knnlm.errors import InputError
from knnlm.files import path_tails
from knnlm.json_text import loads
from knnlm.text.textfiles import decode_blocks


def read_scores(path: str | Path, models: Sequence[str] = ()) -> dict[str, float]:
    """Read figures by model: a JSON object of numbers, or CSV with a model and a number in the first two columns.

    :param models: names that mark the first line of CSV as a model's and not as the heading.
    :raises InputError: another format, a figure that is not finite, or a repeated model.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}; check the path")
    text = "".join(decode_blocks(Path(path)))
    pairs = _json_pairs(text, path) if text.lstrip()[:1] in ("{", "[") else _csv_pairs(text, path, models)
    scores: dict[str, float] = {}
    for model, figure in pairs:
        if model in scores:
            raise InputError(f"{path} has {model} twice; leave one out")
        scores[model] = _number(figure, f"the figure of {model} in {path}")
    if not scores:
        raise InputError(f"{path} has no figures; write a model and its figure on each line, or a JSON object")
    return scores


def match_scores(models: Sequence[str], scores: Mapping[str, float]) -> dict[str, float]:
    """Return the figure of each model: under its name, or else under the longest ending of its path that has one.

    :raises InputError: a model without a figure, or a figure that could be that of several models.
    """
    owners = Counter(tail for model in models for tail in path_tails(model))
    return {model: _number(scores[_key(model, scores, owners)], f"the figure of {model}") for model in models}


def _key(model: str, scores: Mapping[str, float], owners: Mapping[str, int]) -> str:
    whole, *ends = path_tails(model)
    if model in scores or whole in scores:
        return model if model in scores else whole
    key = next((end for end in ends if end in scores), None)
    if key is None:
        raise InputError(f"there is no figure for {model} among those of {', '.join(list(scores)[:8])}; add it")
    if owners[key] > 1:
        raise InputError(f"the figure of {key} could be that of {owners[key]} models; name {model} by more of its path")
    return key


def _number(value: object, what: str) -> float:
    try:
        number = float(str(value)) if not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{what} is {value!r}; give a finite number")
    return number


def _json_pairs(text: str, path: str | Path) -> list[tuple[str, object]]:
    try:
        document = loads(text, object_pairs_hook=list)
    except ValueError as error:
        raise InputError(f"{path} is not readable as JSON: {error}; write {{model: figure, …}}") from None
    if not text.lstrip().startswith("{"):
        raise InputError(f"{path} is no JSON object; write {{model: figure, …}}")
    return [(str(model), figure) for model, figure in document]


def _csv_pairs(text: str, path: str | Path, models: Sequence[str]) -> list[tuple[str, object]]:
    """Return model and figure of each line. The first is a heading if it has no number and names no model."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text)) if any(row)]
    except csv.Error as error:
        raise InputError(f"{path} is not readable as CSV: {error}; write a model and its figure on each line") from None
    pairs: list[tuple[str, object]] = [(row[0].strip(), row[1].strip() if len(row) > 1 else "") for row in rows]
    known = {tail for model in models for tail in (model, *path_tails(model))}
    return pairs[1:] if pairs and not _is_number(pairs[0][1]) and pairs[0][0] not in known else pairs


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True

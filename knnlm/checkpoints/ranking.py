"""Which checkpoint suits a domain best, from a few rows of its output matrix: the dispersion gap of arXiv 2506.24106.

    G = within(T) + between(T, general)

T are tokens of the domain. `within` is the mean of 1 - cos over all pairs of their rows, `between` over all pairs of
one of T with one of the general set (a sum, though the paper calls it a gap). No forward pass, no model: the larger G,
the better the model is said to be. Distances come from sums of unit rows in float64, not from pairs: with the mean unit
rows u and v, within = N/(N-1) (1 - |u|^2) and between = 1 - u.v exactly.

Legend: N tokens, D dimension.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnlm.checkpoints.output_matrix import OutputMatrix, find_output_matrix
from knnlm.checkpoints.token_sets import TokenSets, TokenSource, choose_tokens
from knnlm.correlation import CorrelationEstimate, correlate
from knnlm.dispersion import from_sum, unit_rows
from knnlm.errors import InputError
from knnlm.fingerprint import digest_tokenizer
from knnlm.textfiles import decode_blocks

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class ModelGap:
    """The dispersion gap of one model."""

    model: str
    gap: float
    """within + between."""
    within: float
    """Mean of 1 - cos over pairs of domain tokens."""
    between: float
    """Mean of 1 - cos over a domain token and a general one."""
    domain_tokens: int
    general_tokens: int
    tensor: str
    """Whose rows were compared."""
    tied: bool
    """The tensor holds the input embeddings too."""
    measured: float | None = None
    """What `scores` says of the model, such as its perplexity."""


@dataclass(frozen=True)
class Ranking:
    """Models by their gap, the largest first."""

    models: tuple[ModelGap, ...]
    correlation: CorrelationEstimate | None = None
    """Of the gap with what was measured: near -1 where a large gap goes with a low perplexity."""
    regret: float | None = None
    """What was measured of the first model over the lowest of all, minus 1; None where a figure is not above 0."""
    notes: tuple[str, ...] = ()
    """Sentences about what the ranking cannot tell."""


def rank_models(
    models: Sequence[str | Path], tokens: TokenSource, *, scores: Mapping[str, float] | None = None
) -> Ranking:
    """Rank folders or hub names by the dispersion gap; `scores` are measured figures to compare with, low is good.

    :raises InputError: tokens that a model does not have, or a model without a score.
    :raises ModelError: a model without safetensors, a known output matrix or, unless `tokens` are ids, a tokenizer.
    """
    names = tuple(dict.fromkeys(map(str, models)))
    if not names:
        raise InputError("no model was given; name one or more folders or models of the hub")
    figures = {} if scores is None else {name: _score_of(name, scores) for name in names}
    matrices = [find_output_matrix(name) for name in names]
    sets = _token_sets(names, tokens)
    gaps = [_gap(matrix, own, figures.get(matrix.model)) for matrix, own in zip(matrices, sets, strict=True)]
    gaps.sort(key=lambda one: -one.gap)
    notes = (*_same_rows(gaps), *_different_tokens(matrices, sets))
    if scores is None:
        return Ranking(tuple(gaps), notes=notes)
    ranked = [figures[one.model] for one in gaps]
    regret = ranked[0] / min(ranked) - 1 if min(ranked) > 0 else None
    return Ranking(tuple(gaps), correlate([one.gap for one in gaps], ranked), regret, notes)


def dispersion_gap(domain_ND: Float64, general_ND: Float64) -> tuple[float, float]:
    """`within` the first set and `between` the two, from rows of any length; their sum is the gap."""
    domain_D, general_D = (unit_rows(rows_ND).sum(axis=0) for rows_ND in (domain_ND, general_ND))
    count = len(domain_ND)
    between = 1 - float(domain_D @ general_D) / (count * len(general_ND))
    return float(from_sum(domain_D, count)), between


def read_scores(path: str | Path) -> dict[str, float]:
    """Measured figures by model: a JSON object of numbers, or CSV with a model and a number in the first two columns.

    :raises InputError: another form, a figure that is not finite, or a model twice.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}; check the path")
    text = "".join(decode_blocks(Path(path)))
    pairs = _json_pairs(text, path) if text.lstrip()[:1] in ("{", "[") else _csv_pairs(text)
    scores: dict[str, float] = {}
    for model, figure in pairs:
        if model in scores:
            raise InputError(f"{path} has {model} twice; leave one out")
        scores[model] = _number(figure, f"the figure of {model} in {path}")
    if not scores:
        raise InputError(f"{path} has no figures; write a model and its figure on each line, or a JSON object")
    return scores


# The parts of a ranking


def _token_sets(models: Sequence[str], source: TokenSource) -> list[TokenSets]:
    """The sets of each model; models with the same tokenizer share the work."""
    if not source.needs_tokenizer:
        return [choose_tokens(source, None)] * len(models)
    from knnlm.lm import load_tokenizer  # here: transformers takes seconds, and files of ids do without

    known: dict[str, TokenSets] = {}
    digests = []
    for model in models:
        tokenizer = load_tokenizer(model)
        digests.append(digest_tokenizer(tokenizer))
        if digests[-1] not in known:
            known[digests[-1]] = choose_tokens(source, tokenizer)
    return [known[digest] for digest in digests]


def _gap(matrix: OutputMatrix, sets: TokenSets, measured: float | None) -> ModelGap:
    within, between = dispersion_gap(_rows(matrix, sets.domain), _rows(matrix, sets.general))
    counts = len(sets.domain), len(sets.general)
    return ModelGap(
        matrix.model, within + between, within, between, *counts, matrix.tensor, matrix.tied, measured=measured
    )


def _rows(matrix: OutputMatrix, tokens: Sequence[int]) -> Float64:
    rows_ND = matrix.rows(tokens)
    usable_N = np.isfinite(rows_ND).all(axis=1) & rows_ND.any(axis=1)
    if not usable_N.all():
        token = tokens[int(usable_N.argmin())]
        raise InputError(f"the row of token {token} in {matrix.model} is zero or not finite; leave the token out")
    return rows_ND


def _same_rows(gaps: Sequence[ModelGap]) -> list[str]:
    """Models that the gap cannot tell apart, such as a model and one whose adapter left the output matrix alone."""
    alike: dict[tuple[float, float], list[str]] = {}
    for one in gaps:
        alike.setdefault((one.within, one.between), []).append(one.model)
    return [
        f"{', '.join(models)} have the same rows: their training left the output matrix alone, and the gap sees no more"
        for models in alike.values()
        if len(models) > 1
    ]


def _different_tokens(matrices: Sequence[OutputMatrix], sets: Sequence[TokenSets]) -> list[str]:
    if len(set(sets)) > 1:
        return ["the models have different tokenizers: their gaps are of different tokens"]
    heights = sorted({matrix.shape[0] for matrix in matrices})
    if len(heights) > 1:
        sizes = " and ".join(map(str, heights))
        return [f"the models have {sizes} tokens: an id may not mean the same token in all of them"]
    return []


# Measured figures


def _score_of(model: str, scores: Mapping[str, float]) -> float:
    """By the model's name as it was given, or the last part of it."""
    for name in (model, Path(model).name):
        if name in scores:
            return _number(scores[name], f"the figure of {model}")
    raise InputError(f"there is no figure for {model} among those of {', '.join(list(scores)[:8])}; add it")


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
        document = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON: {error}; write {{model: figure, …}}") from None
    if not text.lstrip().startswith("{"):
        raise InputError(f"{path} is no JSON object; write {{model: figure, …}}")
    return [(str(model), figure) for model, figure in document]


def _csv_pairs(text: str) -> list[tuple[str, object]]:
    """A first line whose second column is no number is a heading."""
    rows = [row for row in csv.reader(io.StringIO(text)) if any(row)]
    pairs: list[tuple[str, object]] = [(row[0].strip(), row[1].strip() if len(row) > 1 else "") for row in rows]
    return pairs[1:] if pairs and not _is_number(pairs[0][1]) else pairs


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True

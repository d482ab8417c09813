"""Ranking of checkpoints for a domain by a few rows of their output matrices: the dispersion gap of arXiv 2506.24106.

    G = within(T) + between(T, general)

T are tokens of the domain. `within` is the mean of 1 - cos over all pairs of their rows, `between` the mean over all
pairs of one of T and one of the general set. G is a sum, though the paper calls it a gap; according to the paper, a
larger G means a better model. No model is loaded. Distances are computed from sums of unit rows in float64: with the
mean unit rows u and v, within = N/(N-1) (1 - |u|^2) and between = 1 - u.v exactly.

Legend: N tokens, D dimension.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnlm.errors import InputError
from knnlm.model.fingerprint import digest_tokenizer
from knnlm.scores.dispersion import from_sum, unit_rows
from knnlm.shown import Shown, Table, figure
from knnlm.statistics import CorrelationEstimate, correlate
from knnlm.studies.rank_models.figures import match_scores
from knnlm.studies.rank_models.output_matrix import OutputMatrix, find_output_matrix
from knnlm.studies.rank_models.token_sets import TokenSource, Vocabulary, choose_tokens

Float64 = NDArray[np.float64]

RELEASED = (
    "the gap: the mean distance within T plus that between T and everyday tokens, 1 - cos of rows of the output matrix",
    "T: digits for mathematics, Python's keywords for code",
)
OURS = (
    "the built-in everyday words, which are not published, and how words become tokens: those that a model's own "
    "tokenizer has whole, with and without a space before them",
    "tokens from text: of T the most characteristic (weighted log-odds), of everyday language the most frequent",
    "a token of both sets counts in T only",
    "the intervals: models are taken as independent, which steps of one training are not",
)


@dataclass(frozen=True)
class ModelGap:
    """Dispersion gap of one model."""

    model: str
    gap: float
    """within + between."""
    within: float
    """Mean of 1 - cos over pairs of domain tokens."""
    between: float
    """Mean of 1 - cos over pairs of a domain token and a general one."""
    domain_tokens: int
    general_tokens: int
    tensor: str
    """Name of the tensor whose rows were compared."""
    tied: bool
    """Whether the tensor also holds the input embeddings."""
    measured: float | None = None
    """The model's figure in `scores`, such as its perplexity."""


@dataclass(frozen=True)
class UsedTokens:
    """The two token sets for models that share a tokenizer."""

    models: tuple[str, ...]
    domain: tuple[int, ...]
    general: tuple[int, ...]
    domain_text: tuple[str, ...] | None = None
    """Text of each token; None if ids came from files, so that no tokenizer was loaded."""
    general_text: tuple[str, ...] | None = None


def _row(one: ModelGap) -> tuple[str, ...]:
    gaps = (figure(value, ".4f") for value in (one.gap, one.within, one.between))
    return (one.model, *gaps, f"{one.domain_tokens} / {one.general_tokens}", figure(one.measured))


@dataclass(frozen=True, repr=False)
class Ranking(Shown):
    """Models ranked by gap, the largest first."""

    models: tuple[ModelGap, ...]
    correlation: CorrelationEstimate | None = None
    """Correlation of the gap with the measured figures: near -1 if a large gap goes with a low perplexity."""
    regret: float | None = None
    """Share (0 or more) by which the first model's figure is worse than the best; None for negative figures."""
    higher_is_better: bool = False
    """Whether higher measured figures are better."""
    notes: tuple[str, ...] = ()
    """Sentences on the limits of this ranking."""
    tokens: tuple[UsedTokens, ...] = ()
    """Token sets of each tokenizer; a single one if ids came from files."""

    def _facts(self) -> Iterator[str]:
        yield f"{len(self.models)} models by dispersion gap"
        for one in self.models:
            yield f"{one.model}: gap {figure(one.gap, '.4f')}, measured {figure(one.measured)}"

    def _table(self) -> Table:
        heads = ("model", "gap", "within", "between", "tokens", "measured")
        return Table("Models by dispersion gap, within + between", heads, tuple(map(_row, self.models)))


def rank_models(
    models: Sequence[str | Path],
    tokens: TokenSource,
    *,
    scores: Mapping[str, float] | None = None,
    higher_is_better: bool = False,
) -> Ranking:
    """Rank folders or hub names by the dispersion gap.

    :param scores: measured figures to compare with, lower being better.
    :param higher_is_better: higher measured figures are better, as for accuracies.
    :raises InputError: a model lacks a token or a figure.
    :raises ModelError: a model lacks safetensors, a known output matrix or, unless `tokens` are ids, a tokenizer.
    """
    names = model_names(models)
    figures = {} if scores is None else match_scores(names, scores)
    matrices = [find_output_matrix(name) for name in names]
    used = _used_tokens(names, tokens)
    sets = [next(one for one in used if name in one.models) for name in names]
    gaps = [_gap(matrix, own, figures.get(matrix.model)) for matrix, own in zip(matrices, sets, strict=True)]
    gaps.sort(key=lambda one: -one.gap)
    notes = (*_same_rows(gaps), *_different_tokens(matrices, used))
    if scores is None:
        return Ranking(tuple(gaps), notes=notes, tokens=used)
    ranked = [figures[one.model] for one in gaps]
    return Ranking(
        models=tuple(gaps),
        correlation=correlate([one.gap for one in gaps], ranked),
        regret=_regret(ranked, higher_is_better),
        higher_is_better=higher_is_better,
        notes=notes,
        tokens=used,
    )


def model_names(models: Sequence[str | Path]) -> tuple[str, ...]:
    """Return the distinct names of models: `a/final` and `a/final/` are the same.

    :raises InputError: no models.
    """
    if not models:
        raise InputError("no model was given; name one or more folders or models of the hub")
    found = (os.path.normpath(name) if Path(name).is_dir() else str(name) for name in models)
    return tuple(dict.fromkeys(found))


def dispersion_gap(domain_ND: Float64, general_ND: Float64) -> tuple[float, float]:
    """Return `within` of the first set and `between` of the two, from rows of any norm; their sum is the gap."""
    domain_D, general_D = (unit_rows(rows_ND).sum(axis=0) for rows_ND in (domain_ND, general_ND))
    count = len(domain_ND)
    between = 1 - float(domain_D @ general_D) / (count * len(general_ND))
    return float(from_sum(domain_D, count)), between


# The parts of a ranking


def _used_tokens(models: Sequence[str], source: TokenSource) -> tuple[UsedTokens, ...]:
    """Token sets of each distinct tokenizer."""
    if not source.needs_tokenizer:
        sets = choose_tokens(source, None)
        return (UsedTokens(tuple(models), sets.domain, sets.general),)
    from knnlm.model.loading import (
        load_tokenizer,
    )  # imports transformers, which takes seconds and is not needed for files of ids

    tokenizers: dict[str, Vocabulary] = {}
    owners: dict[str, list[str]] = {}
    for model in models:
        tokenizer = load_tokenizer(model)
        digest = digest_tokenizer(tokenizer)
        tokenizers.setdefault(digest, tokenizer)
        owners.setdefault(digest, []).append(model)
    return tuple(_with_text(owners[digest], source, tokenizer) for digest, tokenizer in tokenizers.items())


def _with_text(models: Sequence[str], source: TokenSource, tokenizer: Vocabulary) -> UsedTokens:
    sets = choose_tokens(source, tokenizer)
    domain, general = (tuple(tokenizer.decode([token]) for token in ids) for ids in (sets.domain, sets.general))
    return UsedTokens(tuple(models), sets.domain, sets.general, domain, general)


def _regret(ranked: Sequence[float], higher_is_better: bool) -> float | None:
    low, high = min(ranked), max(ranked)
    if higher_is_better:
        return 1 - ranked[0] / high if low >= 0 and high > 0 else None
    return ranked[0] / low - 1 if low > 0 else None


def _gap(matrix: OutputMatrix, sets: UsedTokens, measured: float | None) -> ModelGap:
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
    """Sentences on models with equal gaps, such as a model and one whose adapter does not change the output matrix."""
    alike: dict[tuple[float, float], list[str]] = {}
    for one in gaps:
        alike.setdefault((one.within, one.between), []).append(one.model)
    return [
        f"{', '.join(models)} have the same rows: their training left the output matrix alone, and the gap sees no more"
        for models in alike.values()
        if len(models) > 1
    ]


def _different_tokens(matrices: Sequence[OutputMatrix], used: Sequence[UsedTokens]) -> list[str]:
    if len({(one.domain, one.general) for one in used}) > 1:
        return ["the models have different tokenizers: their gaps are of different tokens"]
    heights = sorted({matrix.shape[0] for matrix in matrices})
    if len(heights) > 1:
        sizes = " and ".join(map(str, heights))
        return [f"the models have {sizes} tokens: an id may not mean the same token in all of them"]
    return []

"""Results of runs, as frozen dataclasses; nothing here computes, loads or prints.

Perplexities are per token, intervals are 95 %, relative changes are fractions (-0.25 is 25 % lower). The evaluation
text has two halves: the tuning part, on which k, temperature and lambda are fitted, and the reporting part, on which
perplexity is measured (the whole text if nothing is fitted).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

from knnlm.shown import UNKNOWN, Shown, Table, brief, change, figure


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class ScoreKind:
    """How a label-free score is named and described wherever it is shown."""

    name: str
    """Its field of `LayerScore`."""
    title: str
    """Heading of its column."""
    digits: int
    """Decimals shown."""
    meaning: str
    """One sentence, with its source."""

    @property
    def short(self) -> str:
        """The name without its prefix: `within` for `dispersion_within`."""
        return self.name.removeprefix("dispersion_")


def _score(title: str, digits: int, meaning: str) -> Mapping[str, object]:
    """Metadata that makes a field of `LayerScore` one of `SCORES`."""
    return {"title": title, "digits": digits, "meaning": meaning}


@dataclass(frozen=True, repr=False)
class LayerScore(Shown):
    """The label-free scores of one layer; each interval belongs to the score before it.

    A new score is a field here, with NaN as its default for files of older versions, and a function of the same name in
    `knnlm/scores/NAME.py`.
    """

    layer: str
    dispersion: float = field(
        metadata=_score("dispersion", 4, "mean of 1 - cosine over all pairs of keys (arXiv 2506.24106)")
    )
    interval: Interval
    dispersion_within: float = field(
        metadata=_score("within", 4, "mean dispersion inside segments (released code of arXiv 2506.24106)")
    )
    dispersion_segments: float = field(
        metadata=_score("segments", 4, "dispersion between the last vectors of segments (text of arXiv 2506.24106)")
    )
    dispersion_standardized: float = field(
        metadata=_score("standardised", 4, "dispersion of standardised dimensions (Timkey & van Schijndel 2021)")
    )
    effective_rank: float = field(
        metadata=_score("eff. rank", 1, "exp of the entropy of the normalised singular values (Roy & Vetterli 2007)")
    )
    probe: float = field(
        metadata=_score("probe", 3, "share of nearest keys from other documents with the same next token")
    )
    probe_interval: Interval
    pilot: float = field(
        default=math.nan,
        metadata=_score("pilot", 2, "perplexity of a small kNN-LM inside a sample of the text"),
    )
    participation_ratio: float = field(
        default=math.nan,
        metadata=_score("part. ratio", 1, "effective number of directions of variance (Gao et al. 2017)"),
    )
    intrinsic_dimension: float = field(
        default=math.nan,
        metadata=_score("intr. dim.", 1, "TwoNN: from the distances to the two nearest keys (Facco et al. 2017)"),
    )

    def _facts(self) -> Iterator[str]:
        yield self.layer
        yield ", ".join(f"{kind.title} {figure(getattr(self, kind.name), f'.{kind.digits}f')}" for kind in SCORES)


SCORES = tuple(ScoreKind(one.name, **one.metadata) for one in fields(LayerScore) if one.metadata)
"""All label-free scores, in display order."""


@dataclass(frozen=True, repr=False)
class Choice(Shown):
    """The layer that is indexed, and why."""

    layer: str
    select: str
    """How the layer was chosen: `auto`, `dispersion`, `probe`, `pilot`, or `named`."""
    candidates: tuple[str, ...]
    reason: str
    """One sentence."""
    disagreement: str | None = None
    """One sentence, if dispersion alone chose and the pilot of another layer is better beyond their paired interval."""

    def _facts(self) -> Iterator[str]:
        yield f"{self.layer}, by {self.select}, of {len(self.candidates)}: {brief(self.candidates)}"
        yield self.reason
        if self.disagreement:
            yield self.disagreement


@dataclass(frozen=True, repr=False)
class ScoreResult(Shown):
    """Scores of the layers that were looked at, on a text or a sample of it, and the choice."""

    layers: tuple[LayerScore, ...]
    choice: Choice
    tokens: int
    segments: int
    documents: int
    stopped_early: bool
    settings: Mapping[str, object]
    versions: Mapping[str, str]

    def _facts(self) -> Iterator[str]:
        yield f"{len(self.layers)} layers, on {self.tokens:,} tokens of {self.documents:,} documents"
        for one in self.layers:
            if one.layer == self.choice.layer:
                yield f"chosen: {one.layer}, dispersion {figure(one.dispersion, '.4f')}"
        yield self.choice.reason

    def _table(self) -> Table:
        title = f"Label-free scores, on {self.tokens:,} tokens of {self.documents:,} documents"
        return _score_table(title, "layer", self.layers, self.choice.layer)


@dataclass(frozen=True, repr=False)
class VectorScores(Shown):
    """Scores of vectors from files; nothing is chosen among them."""

    layers: tuple[LayerScore, ...]
    """One for each file, named after it."""
    rows: int
    """Rows of all files together."""
    vectors: int
    settings: Mapping[str, object]
    versions: Mapping[str, str]

    def _facts(self) -> Iterator[str]:
        yield f"{self.vectors:,} vectors in {self.rows:,} rows of {len(self.layers)} files"
        for one in self.layers:
            yield f"{one.layer}: dispersion {figure(one.dispersion, '.4f')}"

    def _table(self) -> Table:
        return _score_table(f"{self.vectors:,} vectors in {self.rows:,} rows", "file", self.layers)


def _score_table(title: str, name: str, layers: tuple[LayerScore, ...], chosen: str | None = None) -> Table:
    rows = ((f"{one.layer} ◀ chosen" if one.layer == chosen else one.layer, *_score_cells(one)) for one in layers)
    return Table(title, (name, *(kind.title for kind in SCORES)), tuple(rows))


def _score_cells(one: LayerScore) -> Iterator[str]:
    return (figure(getattr(one, kind.name), f".{kind.digits}f") for kind in SCORES)


@dataclass(frozen=True)
class Perplexity:
    """One distribution's perplexity on the reporting part of the evaluation text."""

    perplexity: float
    bits_per_byte: float
    word_perplexity: float
    tokens: int
    interval: Interval = Interval(math.nan, math.nan)
    """Interval of `perplexity`, by a jackknife over documents or runs of tokens; known for the plain LM only."""


@dataclass(frozen=True)
class ByQuery:
    """The kNN-LM of a layer with a lambda by query and by the text so far, compared with the fixed lambda."""

    perplexity: float
    change: float
    """Perplexity relative to that with the fixed lambda, minus 1; NaN, like its interval, if one is infinite."""
    interval: Interval
    offset: float
    """Offset of the gate, like its slopes `distance` and `different`: see `knnlm.knn.mixing.Gate`."""
    distance: float
    different: float


@dataclass(frozen=True, repr=False)
class LayerResult(Shown):
    """The kNN-LM whose keys come from one layer."""

    layer: str
    perplexity: float
    interval: Interval
    """Interval of `change`, by a paired jackknife over documents or runs of tokens."""
    change: float
    """Perplexity relative to the plain LM's, minus 1; NaN, like its interval, if one of the two is infinite."""
    versus_best: float
    """Perplexity relative to the best layer's, minus 1; 0 for the best layer; NaN as for `change`."""
    versus_best_interval: Interval
    k: int
    lam: float
    temperature: float
    """In units of the layer's distances (squared for l2)."""
    bits_per_byte: float
    word_perplexity: float
    lambda_curve: tuple[tuple[float, float], ...]
    """(lambda, perplexity on the reporting part) at the fitted k and temperature."""
    score: LayerScore | None = None
    by_query: ByQuery | None = None
    """None if lambda was given, or in files of older versions."""
    weights: tuple[float, ...] = ()
    """What the neighbours from each of several datastores count for, in the order of these; empty for one."""

    def _facts(self) -> Iterator[str]:
        yield f"{self.layer}: perplexity {figure(self.perplexity)}, {change(self.change)} against the LM"
        yield f"k {self.k}, λ {figure(self.lam, '.3f')}, T {figure(self.temperature)}"
        if self.by_query:
            yield f"λ by query: perplexity {figure(self.by_query.perplexity)}"


@dataclass(frozen=True)
class Regret:
    """Regret of the choice: the selected layer's perplexity relative to the best layer's, minus 1.

    Two estimates bracket it, as which layer is best is itself estimated.
    """

    value: float
    """Lower estimate, cross-fitted: the best layer is picked on one part and compared on the other, both ways."""
    interval: Interval
    """Interval of `value`."""
    against_hindsight: float
    """Upper estimate, never below 0: the best layer is picked in hindsight, on the tokens that are compared."""


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of a score with perplexity over layers; negative: high scores, low perplexity."""

    score: str
    spearman: float
    layers: int
    among: str = "all"
    """`all` layers examined, or the `candidates`."""


@dataclass(frozen=True)
class NeighborText:
    """A neighbour with its text."""

    before: str
    token: str
    """The neighbour's value: the token that followed."""
    source: str
    distance: float
    weight: float
    """Its share of p_kNN."""


@dataclass(frozen=True, repr=False)
class TokenExample(Shown):
    """A token of the evaluation text whose probability retrieval raised or lowered most."""

    before: str
    token: str
    after: str
    lm_probability: float
    knn_probability: float
    mixed_probability: float
    neighbors: tuple[NeighborText, ...]

    def _facts(self) -> Iterator[str]:
        yield f"{self.token!r} after {self.before[-60:]!r}"
        yield f"p_LM {figure(self.lm_probability)}, p_kNN {figure(self.knn_probability)}"
        yield f"mixture {figure(self.mixed_probability)}, {len(self.neighbors)} neighbours"


@dataclass(frozen=True)
class IndexReport:
    """The index of one layer, with its recall measured against exact search."""

    layer: str
    spec: str
    """`exact` or a FAISS factory string."""
    recall: float
    recall_k: int
    size_bytes: int
    perplexity: float | None = None
    """Perplexity with the index in place of exact search, at the same k, lambda and temperature."""


@dataclass(frozen=True, repr=False)
class EvalResult(Shown):
    """Perplexity of the plain LM and of the kNN-LM for every layer."""

    lm: Perplexity
    layers: tuple[LayerResult, ...]
    best: str
    """The layer with the lowest perplexity; empty if all are infinite, or alike as with λ = 0."""
    selected: str | None = None
    choice: Choice | None = None
    examined: tuple[LayerScore, ...] = ()
    """Scores of all layers that the choice was made among; `layers` may be only those worth a full evaluation."""
    regret: Regret | None = None
    """None if no layer was chosen, there is no other to compare it with, or perplexity is infinite."""
    correlations: tuple[Correlation, ...] = ()
    helped: tuple[TokenExample, ...] = ()
    hurt: tuple[TokenExample, ...] = ()
    index: IndexReport | None = None
    keys: int = 0
    tuning_tokens: int = 0
    warnings: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def _facts(self) -> Iterator[str]:
        yield f"LM: perplexity {figure(self.lm.perplexity)} on {self.lm.tokens:,} tokens"
        for one in self.layers:
            if marks := self._marks(one.layer):
                against = f"{change(one.change)} against the LM"
                yield f"{marks}: {one.layer}, perplexity {figure(one.perplexity)}, {against}"
        yield f"{len(self.layers)} layers, {self.keys:,} keys"
        if self.index:
            yield f"index of {self.index.layer}: {self.index.spec}, recall {figure(self.index.recall, '.4f')}"
        if self.warnings:
            yield f"{len(self.warnings)} warnings, the first: {self.warnings[0]}"

    def _marks(self, layer: str) -> str:
        return ", ".join(mark for mark, name in (("chosen", self.selected), ("best", self.best)) if name == layer)

    def _table(self) -> Table:
        title = f"Perplexity on {self.lm.tokens:,} tokens; the plain LM: {figure(self.lm.perplexity, '.3f')}"
        heads = ("layer", "dispersion", "perplexity", "against LM", "k", "λ", "T")
        return Table(title, heads, tuple(tuple(self._cells(one)) for one in self.layers))

    def _cells(self, one: LayerResult) -> Iterator[str]:
        marks = self._marks(one.layer)
        yield f"{one.layer} ◀ {marks}" if marks else one.layer
        yield figure(one.score.dispersion, ".4f") if one.score else UNKNOWN
        yield figure(one.perplexity, ".3f")
        yield change(one.change)
        yield f"{one.k}"
        yield figure(one.lam, ".3f")
        yield figure(one.temperature)

"""What a run found, as frozen values; nothing here computes, loads or prints.

Perplexities are per token (base e inside, as usual), intervals are 95 %, relative changes are fractions (-0.25 is
25 % lower).
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
    """What people are told of a label-free score, wherever it is shown."""

    name: str
    """Its field of `LayerScore`."""
    title: str
    """At the head of a column."""
    digits: int
    """Decimals that are worth showing."""
    meaning: str
    """One sentence, with its source."""

    @property
    def short(self) -> str:
        """What people may call it too: `within` for `dispersion_within`."""
        return self.name.removeprefix("dispersion_")


def _score(title: str, digits: int, meaning: str) -> Mapping[str, object]:
    """Makes a field of `LayerScore` one of `SCORES`."""
    return {"title": title, "digits": digits, "meaning": meaning}


@dataclass(frozen=True, repr=False)
class LayerScore(Shown):
    """The label-free scores of one layer; an interval is that of the score before it.

    A new score is a field here and the function of its name in `knnlm/scores/NAME.py`. It is NaN where an older version
    wrote the file.
    """

    layer: str
    dispersion: float = field(
        metadata=_score("dispersion", 4, "mean of 1 - cosine over all pairs of keys (arXiv 2506.24106)")
    )
    interval: Interval
    dispersion_within: float = field(
        metadata=_score("within", 4, "dispersion inside a segment, averaged (released code of arXiv 2506.24106)")
    )
    dispersion_segments: float = field(
        metadata=_score("segments", 4, "dispersion between the last vectors of segments (text of arXiv 2506.24106)")
    )
    dispersion_standardized: float = field(
        metadata=_score("standardised", 4, "dispersion, no rogue dimension decides (Timkey & van Schijndel 2021)")
    )
    effective_rank: float = field(
        metadata=_score("eff. rank", 1, "exp of the entropy of the normalised singular values (Roy & Vetterli 2007)")
    )
    probe: float = field(
        metadata=_score("probe", 3, "share of nearest keys from other documents with the same next token")
    )
    probe_interval: Interval
    participation_ratio: float = field(
        default=math.nan,
        metadata=_score("part. ratio", 1, "how many directions carry the variance (Gao et al. 2017)"),
    )
    intrinsic_dimension: float = field(
        default=math.nan,
        metadata=_score("intr. dim.", 1, "TwoNN: from the distances to the two nearest keys (Facco et al. 2017)"),
    )

    def _facts(self) -> Iterator[str]:
        yield self.layer
        yield ", ".join(f"{kind.title} {figure(getattr(self, kind.name), f'.{kind.digits}f')}" for kind in SCORES)


SCORES = tuple(ScoreKind(one.name, **one.metadata) for one in fields(LayerScore) if one.metadata)
"""All label-free scores, in the order in which they are shown."""


@dataclass(frozen=True, repr=False)
class Choice(Shown):
    """The layer that is indexed, and why."""

    layer: str
    select: str
    """What chose: `dispersion`, `probe`, or `named`."""
    candidates: tuple[str, ...]
    reason: str
    """One sentence for people."""
    disagreement: str | None = None
    """One sentence where the probe puts another layer above the chosen one by more than their difference's interval."""

    def _facts(self) -> Iterator[str]:
        yield f"{self.layer}, by {self.select}, of {len(self.candidates)}: {brief(self.candidates)}"
        yield self.reason
        if self.disagreement:
            yield self.disagreement


@dataclass(frozen=True, repr=False)
class ScoreResult(Shown):
    """All layers' scores on a sample of text, and the choice."""

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
    """Scores of files of vectors that come from elsewhere; nothing is chosen among them."""

    layers: tuple[LayerScore, ...]
    """One for each file, which it is named after."""
    rows: int
    """Of all files."""
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


@dataclass(frozen=True)
class ByQuery:
    """The kNN-LM of a layer with a lambda of its own for each query, beside the fixed lambda."""

    perplexity: float
    change: float
    """Perplexity relative to that with the fixed lambda, minus 1; NaN, as its interval, where one is infinite."""
    interval: Interval
    offset: float
    """With `distance` and `different`: what `knnlm.knn.mixing.Gate` adds to the logit of the fixed lambda."""
    distance: float
    different: float


@dataclass(frozen=True, repr=False)
class LayerResult(Shown):
    """The kNN-LM whose keys come from one layer."""

    layer: str
    perplexity: float
    interval: Interval
    """Of `change`, by a paired jackknife over documents or runs of tokens."""
    change: float
    """Perplexity relative to the plain LM's, minus 1; NaN, as its interval, where one of the two is infinite."""
    versus_best: float
    """Perplexity relative to the best layer's, minus 1; 0 for the best; NaN, as its interval, as for `change`."""
    versus_best_interval: Interval
    k: int
    lam: float
    temperature: float
    """Absolute, in the layer's distances (squared for l2)."""
    bits_per_byte: float
    word_perplexity: float
    lambda_curve: tuple[tuple[float, float], ...]
    """(lambda, perplexity on the reporting part) at the fitted k and temperature."""
    score: LayerScore | None = None
    by_query: ByQuery | None = None
    """None where lambda was given, or an older version wrote the file."""

    def _facts(self) -> Iterator[str]:
        yield f"{self.layer}: perplexity {figure(self.perplexity)}, {change(self.change)} against the LM"
        yield f"k {self.k}, λ {figure(self.lam, '.3f')}, T {figure(self.temperature)}"
        if self.by_query:
            yield f"λ by query: perplexity {figure(self.by_query.perplexity)}"


@dataclass(frozen=True)
class Regret:
    """Perplexity of the selected layer over that of the best layer, minus 1: between two ends."""

    value: float
    """Against the layer best on one part, on the other part, then with swapped roles: the lower end, as noise picks."""
    interval: Interval
    """Of `value`."""
    against_hindsight: float
    """Against the layer best on those very tokens, which flatters it: the upper end, never below 0."""


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of a score with perplexity over layers; below 0, a high score goes with a low one."""

    score: str
    spearman: float
    layers: int
    among: str = "all"
    """`all` layers looked at, or the `candidates`."""


@dataclass(frozen=True)
class NeighborText:
    """A neighbour with the text that it came from."""

    before: str
    token: str
    """The neighbour's value: the token that followed."""
    source: str
    distance: float
    weight: float
    """Its share of p_kNN."""


@dataclass(frozen=True, repr=False)
class TokenExample(Shown):
    """A token of the evaluation text that retrieval helped or hurt much."""

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
    """The index of one layer, measured against exact search after it was built."""

    layer: str
    spec: str
    """`exact` or a FAISS factory string."""
    recall: float
    recall_k: int
    size_bytes: int
    perplexity: float | None = None
    """With the index instead of exact search, same k, lambda and temperature."""


@dataclass(frozen=True, repr=False)
class EvalResult(Shown):
    """Perplexity of the plain LM and of the kNN-LM for every layer."""

    lm: Perplexity
    layers: tuple[LayerResult, ...]
    best: str
    """Lowest perplexity on the tuning part; empty where all layers' are infinite."""
    selected: str | None = None
    choice: Choice | None = None
    regret: Regret | None = None
    """None without a choice, without another layer to compare it with, or with infinite perplexity."""
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

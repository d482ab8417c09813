"""What a run found, as frozen values; nothing here computes, loads or prints.

Perplexities are per token (base e inside, as usual), intervals are 95 %, relative changes are fractions (-0.25 is
25 % lower).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields


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


@dataclass(frozen=True)
class LayerScore:
    """The label-free scores of one layer; an interval is that of the score before it.

    A new score is a field here and a function in `knnlm.scores.layer_scorer.FUNCTIONS`. It is NaN where an older
    version wrote the file.
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


SCORES = tuple(ScoreKind(one.name, **one.metadata) for one in fields(LayerScore) if one.metadata)
"""All label-free scores, in the order in which they are shown."""


@dataclass(frozen=True)
class Choice:
    """The layer that is indexed, and why."""

    layer: str
    select: str
    """What chose: `dispersion`, `probe`, or `named`."""
    candidates: tuple[str, ...]
    reason: str
    """One sentence for people."""
    disagreement: str | None = None
    """One sentence where the probe puts another layer above the chosen one by more than their difference's interval."""


@dataclass(frozen=True)
class ScoreResult:
    """All layers' scores on a sample of text, and the choice."""

    layers: tuple[LayerScore, ...]
    choice: Choice
    tokens: int
    segments: int
    documents: int
    stopped_early: bool
    settings: Mapping[str, object]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class VectorScores:
    """Scores of files of vectors that come from elsewhere; nothing is chosen among them."""

    layers: tuple[LayerScore, ...]
    """One for each file, which it is named after."""
    rows: int
    """Of all files."""
    vectors: int
    settings: Mapping[str, object]
    versions: Mapping[str, str]


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


@dataclass(frozen=True)
class LayerResult:
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


@dataclass(frozen=True)
class TokenExample:
    """A token of the evaluation text that retrieval helped or hurt much."""

    before: str
    token: str
    after: str
    lm_probability: float
    knn_probability: float
    mixed_probability: float
    neighbors: tuple[NeighborText, ...]


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


@dataclass(frozen=True)
class EvalResult:
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

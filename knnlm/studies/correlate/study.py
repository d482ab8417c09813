"""Correlation of dispersion with perplexity over segments, single and grouped, as in the code of arXiv 2506.24106.

    study = study_correlation(lm, ["wiki.txt"])[0]
    print(study.layers[-1].ungrouped.spearman, study.layers[-1].grouped.spearman)

`RELEASED` lists the steps of the authors' code (github.com/yanhong-lbh/rep_dispersion), `OURS` those of this project.

Legend: S segments, G groups, M segments in a group, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnlm.config import check_seed
from knnlm.errors import InputError
from knnlm.extraction.segment_values import SegmentValues, measure_segments
from knnlm.layer_names import depth, select_layers, split
from knnlm.model.lm import LanguageModel
from knnlm.progress import Advance, Progress, Silent
from knnlm.results import SCORES, ScoreKind
from knnlm.scores.dispersion import dispersion
from knnlm.scores.layer_scorer import SEGMENT_FUNCTIONS
from knnlm.shown import Shown, Table, figure
from knnlm.statistics import CorrelationEstimate, correlate
from knnlm.studies.correlate.clusters import (
    ClusterDistances,
    ContextSums,
    check_kmeans,
    kmeans_distances,
    shared_continuations,
)
from knnlm.text.clusters import text_clusters
from knnlm.text.corpus import Document, read_documents, tokenize
from knnlm.text.segments import Segment, check_context, cut_segments, sample_segments

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

GROUP_SIZE, GRID = 100, 100
CLUSTER_KINDS = ("ngram", "kmeans")
SEGMENT_SCORES: dict[str, ScoreKind] = {
    name: kind for kind in SCORES if kind.name in SEGMENT_FUNCTIONS for name in (kind.short, kind.name)
}
"""Scores by the names that `score` accepts."""
# The correlation of two points is always 1 or -1.
FEWEST_GROUPS = 3
# Points in the scatter chart; correlations use all segments.
SCATTER_POINTS = 2000
# The square of exp of more overflows float64; only a broken model has such a loss.
_LARGEST_LOSS = 300.0

RELEASED = (
    "segments are 512 tokens, do not overlap and lie in one document; at most 100,000, drawn at random",
    "a segment's perplexity is exp of its mean loss over the tokens that have a predecessor in it; its final-token "
    "perplexity is 1 / p of the last token",
    "dispersion is within the segment, over all its tokens (`within`), at `hidden_states`: `*.block_output` and, for "
    "the last, `final_norm`",
    "grouped: segments sorted by perplexity, cut into groups of 100, an incomplete last one dropped; of the groups, "
    "those whose mean perplexity is nearest to 100 evenly spaced values; each is a point, mean perplexity against mean "
    "dispersion",
)
OURS = (
    "a rest shorter than a segment is left out (the released code keeps it in collections of documents)",
    "which segments are drawn: the seed is another",
    "no group is cut as an outlier unless `max_perplexity` says so (the released code cuts at 25, an example to be "
    "adjusted)",
    "the correlations themselves, of perplexity and not of its logarithm, and their intervals: the released code draws "
    "points only. Ungrouped intervals leave out whole documents (runs of 8,192 tokens where documents are few); "
    "grouped ones take groups as independent, which they are not quite",
    "`across`: dispersion between the last vectors of a group's segments, against the group's mean perplexity",
    "other context lengths: segments of that length, all other steps alike",
)


@dataclass(frozen=True, kw_only=True)
class CorrelateConfig:
    """Settings of the study.

    :raises InputError: a value out of range, or an unknown name.
    """

    context: int = 512
    """Tokens in a segment."""
    contexts: tuple[int, ...] = ()
    """Further segment lengths, each studied in a pass of its own."""
    layers: str = "*.block_output,final_norm"
    score: str = "within"
    """Score of a segment: one of `SEGMENT_FUNCTIONS`, with or without `dispersion_`."""
    max_segments: int = 100_000
    join: bool = False
    """Join all documents into one with spaces, as the released code does with WikiText's rows."""
    text_field: str = "text"
    group_size: int | None = None
    """Segments in a group; None: 100, without a grouped correlation if that makes fewer than 3 groups."""
    max_perplexity: float | None = None
    """Groups with this mean perplexity or more are left out as outliers."""
    clusters: tuple[str, ...] = ()
    """Kinds of clusters of contexts: `ngram` (the same next n tokens), `kmeans` (nearest vectors), or both."""
    ngram: int = 10
    cluster_size: int = 100
    """Contexts in a cluster: the minimum for `ngram`, the average for `kmeans`."""
    seed: int = 0

    def __post_init__(self) -> None:
        for length in (self.context, *self.contexts):
            if length < 2:
                raise InputError(f"`context` is {length}, but a segment needs at least 2 tokens, one to predict")
        given = {"max_segments": self.max_segments, "group_size": self.group_size, "ngram": self.ngram}
        for name, value in (given | {"max_perplexity": self.max_perplexity}).items():
            if value is not None and not value > 0:
                raise InputError(f"`{name}` is {value}, but must be above 0")
        if self.cluster_size < 2:
            raise InputError(f"`cluster_size` is {self.cluster_size}, but distances within a cluster need at least 2")
        if unknown := set(self.clusters) - set(CLUSTER_KINDS):
            raise InputError(f"`clusters` is {', '.join(sorted(unknown))!r}, but takes {' or '.join(CLUSTER_KINDS)}")
        if self.score not in SEGMENT_SCORES:
            names = ", ".join(dict.fromkeys(kind.short for kind in SEGMENT_SCORES.values()))
            raise InputError(f"`score` is {self.score!r}, but a segment has {names}")
        check_seed(self.seed)


@dataclass(frozen=True)
class LayerCorrelation:
    """Correlations of one layer's score with perplexity; NaN for fewer than three points."""

    layer: str
    depth: float
    """Relative depth: 0 is the first block's input, 1 the last block's output."""
    within: float
    """Mean over segments of the dispersion within a segment."""
    score: float
    """Mean over segments of the correlated score: `within`, unless the settings name another."""
    ungrouped: CorrelationEstimate
    """Correlation over segments of their perplexity with the score."""
    grouped: CorrelationEstimate
    across: CorrelationEstimate
    """Correlation over groups of mean perplexity with the dispersion between their segments' last vectors."""
    final_ungrouped: CorrelationEstimate
    """Correlation over segments of final-token perplexity with the score."""
    final_grouped: CorrelationEstimate


@dataclass(frozen=True)
class LayerClusters:
    """Distances within and between clusters of one kind, at one layer."""

    layer: str
    depth: float
    kind: str
    distances: ClusterDistances


@dataclass(frozen=True)
class Scatter:
    """Points of the scatter chart: perplexity and score at the deepest layer, for segments and groups."""

    layer: str
    segments: tuple[tuple[float, float], ...]
    """At most 2,000 segments, spread evenly over the text."""
    groups: tuple[tuple[float, float], ...]


def _cells(one: LayerCorrelation) -> Iterator[str]:
    yield one.layer
    yield figure(one.score)
    for estimate in (one.ungrouped, one.grouped, one.across):
        yield figure(estimate.pearson, "+.2f")


@dataclass(frozen=True, repr=False)
class Study(Shown):
    """Results for one model on one text at one segment length."""

    model: str
    score: str
    """Name of the correlated score, as in `knnlm.results.SCORES`."""
    context: int
    segments: int
    documents: int
    """Number of documents with at least one segment."""
    text_clusters: int
    """Number of clusters (documents or runs of text) that the jackknife intervals leave out in turn."""
    perplexity: float
    """exp of the mean loss over all segments."""
    group_size: int
    groups: int
    """Number of groups kept."""
    layers: tuple[LayerCorrelation, ...]
    scatter: Scatter
    clusters: tuple[LayerClusters, ...] = ()
    notes: tuple[str, ...] = ()

    def _facts(self) -> Iterator[str]:
        yield f"{self.model}: perplexity {figure(self.perplexity)}"
        yield f"{self.segments:,} segments of {self.context} tokens, {self.documents:,} documents"
        yield f"{len(self.layers)} layers, {self.groups} groups of {self.group_size}, score {self.score}"
        if self.layers:
            last = self.layers[-1]
            yield f"{last.layer}: Pearson {figure(last.ungrouped.pearson, '+.2f')} without groups"
        yield from self.notes

    def _table(self) -> Table:
        title = f"{self.model}: {self.score} with perplexity, {self.segments:,} segments of {self.context} tokens"
        heads = ("layer", self.score, "ungrouped r", "grouped r", "across r")
        return Table(title, heads, tuple(tuple(_cells(one)) for one in self.layers))


def study_correlation(
    lm: LanguageModel,
    text: Sequence[str | Path],
    *,
    config: CorrelateConfig | None = None,
    progress: Progress | None = None,
) -> tuple[Study, ...]:
    """Correlate dispersion with perplexity at `config.context`, then at each of `config.contexts`.

    Clusters are measured at `config.context` only. Each length takes one forward pass for all layers. Memory holds the
    segments' tokens and a few numbers for each segment and layer; the segments' last vectors are in a temporary file.
    :raises InputError: segments are longer than the model's limit, or the text has too few for what is asked.
    :raises LayerError: no layer matches `config.layers`.
    """
    config = config or CorrelateConfig()
    layers = check_model(lm.name, lm.layer_names, lm.context_limit, config)
    lengths = dict.fromkeys((config.context, *config.contexts))
    # All before the first pass, so that a length without segments is reported at once.
    segments = [_read_segments(lm, text, length, config) for length in lengths]
    return tuple(_study(lm, one, layers, config, progress or Silent()) for one in segments)


def check_model(
    name: str, layer_names: Sequence[str], context_limit: int | None, config: CorrelateConfig
) -> tuple[str, ...]:
    """Return the layers to study; raises as `study_correlation`, before any text is read."""
    for length in (config.context, *config.contexts):
        field = "context" if length == config.context else "contexts"
        check_context(length, name, context_limit, field=field)
    return select_layers(config.layers, layer_names)


def make_groups(
    perplexity_S: Float64, size: int, *, grid: int = GRID, max_perplexity: float | None = None
) -> list[Int64]:
    """Return the groups of segments used as points, [M] each, by ascending perplexity (`RELEASED`)."""
    count = len(perplexity_S) // size
    if not count:
        return []
    groups_GM = np.argsort(perplexity_S, kind="stable")[: count * size].reshape(count, size)
    means_G = perplexity_S[groups_GM].mean(axis=1)
    wanted = np.linspace(means_G[0], means_G[-1], grid)
    nearest = np.unique(np.abs(means_G[:, None] - wanted).argmin(axis=0))
    return [groups_GM[group] for group in nearest if max_perplexity is None or means_G[group] < max_perplexity]


def _study(
    lm: LanguageModel, segments: Sequence[Segment], layers: Sequence[str], config: CorrelateConfig, progress: Progress
) -> Study:
    length = len(segments[0].tokens_T)
    kinds = config.clusters if length == config.context else ()
    sums = _context_sums(lm, segments, layers, config) if "ngram" in kinds else None
    if "kmeans" in kinds:
        check_kmeans(len(segments), config.cluster_size)
    with progress.stage(f"{lm.name}, {length} tokens", "segments") as advance:
        values = _measure(lm, segments, layers, sums, SEGMENT_SCORES[config.score].name, advance)
    return _summarize(lm, segments, values, sums, "kmeans" in kinds, config)


def _measure(
    lm: LanguageModel,
    segments: Sequence[Segment],
    layers: Sequence[str],
    sums: ContextSums | None,
    score: str,
    advance: Advance,
) -> SegmentValues:
    function = None if score == "dispersion_within" else SEGMENT_FUNCTIONS[score]
    look = sums.add if sums else None
    values = measure_segments(lm, segments, layers, look=look, function=function, advance=advance)
    for layer, score_S in values.scores.items():
        if unknown := int(np.isnan(score_S).sum()):
            raise InputError(
                f"`score={score!r}` is unknown in {unknown} of {len(score_S)} segments at {layer}, where vectors are "
                "copies of one another; leave the layer out with `layers`"
            )
    return values


def _read_segments(
    lm: LanguageModel, text: Sequence[str | Path], length: int, config: CorrelateConfig
) -> list[Segment]:
    documents = read_documents(text, text_field=config.text_field)
    if config.join:
        documents = iter([Document(" ".join(one.text for one in documents), "the joined text", 1)])
    remedy = "more text" if config.join else "longer documents (`join=True`)"
    cut = cut_segments(tokenize(documents, lm.encode), length)
    segments = sample_segments(cut, config.max_segments, seed=config.seed, remedy=remedy)
    size = config.group_size
    if size is not None and len(segments) < FEWEST_GROUPS * size:
        raise InputError(
            f"{len(segments)} segments make {len(segments) // size} group(s) of {size}, but a correlation needs "
            f"{FEWEST_GROUPS}; take a smaller `group_size` or `context`, or more text"
        )
    return segments


def _context_sums(
    lm: LanguageModel, segments: Sequence[Segment], layers: Sequence[str], config: CorrelateConfig
) -> ContextSums:
    tokens_ST = np.stack([segment.tokens_T for segment in segments])
    contexts = shared_continuations(tokens_ST, config.ngram, config.cluster_size)
    return ContextSums(contexts, {layer: lm.dims[layer] for layer in layers})


def _summarize(
    lm: LanguageModel,
    segments: Sequence[Segment],
    values: SegmentValues,
    sums: ContextSums | None,
    kmeans: bool,
    config: CorrelateConfig,
) -> Study:
    size, clusters_S = config.group_size or GROUP_SIZE, text_clusters(segments)
    perplexity, final = (
        _Side(losses, size, config.max_perplexity, clusters_S) for losses in (values.loss_S, values.final_loss_S)
    )
    num_blocks = 1 + max((split(name)[0] or 0) for name in lm.layer_names)
    layers = [_layer(layer, depth(layer, num_blocks), perplexity, final, values) for layer in values.within]
    clusters = [
        LayerClusters(one.layer, one.depth, kind, found)
        for one in layers
        for kind, found in _cluster_distances(one.layer, values, sums, kmeans, config)
    ]
    return Study(
        model=lm.name,
        score=SEGMENT_SCORES[config.score].name,
        context=len(segments[0].tokens_T),
        segments=len(segments),
        documents=len({segment.document for segment in segments}),
        text_clusters=len(np.unique(clusters_S)),
        perplexity=float(_perplexity(values.loss_S.mean())),
        group_size=size,
        groups=len(perplexity.groups),
        layers=tuple(layers),
        scatter=_scatter(layers[-1].layer, perplexity, values.scores[layers[-1].layer]),
        clusters=tuple(clusters),
        notes=_notes(perplexity, len(segments), size),
    )


def _perplexity(loss: Float64 | np.float64) -> Float64 | np.float64:
    return np.exp(np.minimum(loss, _LARGEST_LOSS))


class _Side:
    """One kind of perplexity of all segments, and the groups that it gives."""

    def __init__(self, loss_S: Float64, size: int, max_perplexity: float | None, clusters_S: Int64) -> None:
        self.perplexity_S = np.asarray(_perplexity(loss_S))
        self.groups = make_groups(self.perplexity_S, size, max_perplexity=max_perplexity)
        self.perplexity_G = np.array([self.perplexity_S[group].mean() for group in self.groups])
        self._clusters = clusters_S.tolist()

    def ungrouped(self, score_S: Float64) -> CorrelationEstimate:
        return correlate(self.perplexity_S, score_S, clusters=self._clusters)

    def grouped(self, score_S: Float64) -> CorrelationEstimate:
        return correlate(self.perplexity_G, self.means(score_S))

    def across(self, last_SD: NDArray[np.float32]) -> CorrelationEstimate:
        if any(len(group) < 2 for group in self.groups):
            return correlate([], [])
        return correlate(self.perplexity_G, [dispersion(np.asarray(last_SD[group])) for group in self.groups])

    def means(self, score_S: Float64) -> list[float]:
        return [float(score_S[group].mean()) for group in self.groups]


def _layer(layer: str, place: float, perplexity: _Side, final: _Side, values: SegmentValues) -> LayerCorrelation:
    score_S = values.scores[layer]
    return LayerCorrelation(
        layer=layer,
        depth=place,
        within=float(values.within[layer].mean()),
        score=float(score_S.mean()),
        ungrouped=perplexity.ungrouped(score_S),
        grouped=perplexity.grouped(score_S),
        across=perplexity.across(values.last[layer]),
        final_ungrouped=final.ungrouped(score_S),
        final_grouped=final.grouped(score_S),
    )


def _cluster_distances(
    layer: str, values: SegmentValues, sums: ContextSums | None, kmeans: bool, config: CorrelateConfig
) -> list[tuple[str, ClusterDistances]]:
    found = [("ngram", sums.distances(layer))] if sums else []
    if kmeans:
        found.append(("kmeans", kmeans_distances(values.last[layer], config.cluster_size, seed=config.seed)))
    return found


def _scatter(layer: str, perplexity: _Side, score_S: Float64) -> Scatter:
    step = -(-len(score_S) // SCATTER_POINTS)
    segments = zip(perplexity.perplexity_S[::step].tolist(), score_S[::step].tolist(), strict=True)
    groups = zip(perplexity.perplexity_G.tolist(), perplexity.means(score_S), strict=True)
    return Scatter(layer, tuple(segments), tuple(groups))


def _notes(perplexity: _Side, segments: int, size: int) -> tuple[str, ...]:
    count = len(perplexity.groups)
    if count >= FEWEST_GROUPS:
        return ()
    return (
        f"{segments} segments leave {count} group(s) of {size}, too few for a grouped correlation: "
        f"take `group_size={max(1, segments // 10)}`, more text, or a larger `max_perplexity`",
    )

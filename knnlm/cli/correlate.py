"""The verb `correlate`: does dispersion correlate with perplexity?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import options
from knnlm.cli.groups import Place
from knnlm.cli.screen import Screen
from knnlm.cli.shared import load
from knnlm.results import SCORES

if TYPE_CHECKING:
    from rich.table import Table

    from knnlm.model.lm import LanguageModel
    from knnlm.studies.correlate.study import CorrelateConfig, Study

Models = Annotated[
    list[str],
    typer.Option("--model", help="Hugging Face id or folder of a decoder-only causal LM; may be repeated."),
    Place(),
]
Context = Annotated[int | None, typer.Option("--context", help="Tokens of a segment; default 512.")]
Contexts = Annotated[
    str | None, typer.Option("--contexts", help="Further segment lengths to study, such as 16,64,128.")
]
Layers = Annotated[
    str | None, typer.Option("--layers", help="Layers: all, *.ffn_input, …; default *.block_output,final_norm.")
]
Score = Annotated[
    str,
    typer.Option(
        "--score",
        help="Score of a segment: within, standardized, effective_rank, participation_ratio or intrinsic_dimension.",
    ),
]
Clusters = Annotated[
    str | None,
    typer.Option(
        "--clusters",
        help="Clusters of contexts: ngram (the same next tokens), kmeans (nearest vectors), or ngram,kmeans.",
    ),
]
Ngram = Annotated[int, typer.Option("--ngram", help="Number of next tokens shared by the contexts of a cluster.")]
ClusterSize = Annotated[
    int, typer.Option("--cluster-size", help="Contexts in a cluster: the minimum for ngram, the average for kmeans.")
]
Random = Annotated[bool, typer.Option("--random", help="Also study the first model with random weights, as a control.")]
MaxSegments = Annotated[
    int, typer.Option("--max-segments", help="Maximum number of segments; drawn at random if the text has more.")
]
Join = Annotated[bool, typer.Option("--join", help="Join all documents into one, with spaces: for WikiText's rows.")]
GroupSize = Annotated[int | None, typer.Option("--group-size", help="Segments in a group; default 100.")]
MaxPerplexity = Annotated[
    float | None, typer.Option("--max-perplexity", help="Leave out groups with this mean perplexity or more.")
]
Report = Annotated[Path | None, typer.Option("--report", help="Folder for correlate.json and correlate.html.")]


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """Options that become the settings of the study; None keeps the default."""

    context: Context = None
    contexts: Contexts = None
    layers: Layers = None
    score: Score = "within"
    clusters: Clusters = None
    ngram: Ngram = 10
    cluster_size: ClusterSize = 100
    random: Random = False
    max_segments: MaxSegments = 100_000
    join: Join = False
    group_size: GroupSize = None
    max_perplexity: MaxPerplexity = None

    def config(self, *, text_field: str, seed: int) -> CorrelateConfig:
        """The settings, checked."""
        from knnlm.studies.correlate.study import CorrelateConfig

        usual = CorrelateConfig()
        return CorrelateConfig(
            context=usual.context if self.context is None else self.context,
            contexts=tuple(_number(piece) for piece in self.contexts.split(",")) if self.contexts is not None else (),
            layers=usual.layers if self.layers is None else self.layers,
            score=self.score,
            clusters=tuple(piece.strip() for piece in self.clusters.split(",")) if self.clusters is not None else (),
            ngram=self.ngram,
            cluster_size=self.cluster_size,
            max_segments=self.max_segments,
            join=self.join,
            group_size=usual.group_size if self.group_size is None else self.group_size,
            max_perplexity=self.max_perplexity,
            text_field=text_field,
            seed=seed,
        )


def correlate(
    *,
    model: Models,
    text: options.Text,
    given: SegmentOptions,
    report: Report = None,
    text_field: options.TextField = "text",
    compute: options.ComputeOptions,
    seed: options.Seed = 0,
    output: options.Output,
    trust_remote_code: options.Trust = False,
) -> None:
    """Correlate dispersion with perplexity over segments of a text, singly and in groups, for each layer.

    Example: knnlm correlate --model gpt2 --text wiki.txt --random
    """
    config = given.config(text_field=text_field, seed=seed)
    from knnlm.studies.correlate.document import correlate_document
    from knnlm.version import versions

    screen = output.screen()
    _check(model, text, config, report, trust_remote_code)
    models = _models(model, given.random, seed, compute, trust_remote_code, screen)
    studies = [study for lm in models for study in _studies(lm, text, config, screen)]
    used = {"models": list(model), "text": list(text), "random": given.random, "dtype": compute.dtype}
    document = correlate_document(studies, settings=asdict(config) | used, versions=versions())
    for study in studies:
        _show(study, screen)
    screen.result(document)
    if report is not None:
        from knnlm.studies.correlate.page import write_correlate

        screen.say(f"Report: {write_correlate(document, report)}")


def _number(piece: str) -> int:
    if not piece.strip().isdecimal():
        raise typer.BadParameter(f"{piece.strip()!r} is no number of tokens; write 16,64,128", param_hint="--contexts")
    return int(piece)


def _check(
    models: Sequence[str], text: Sequence[str], config: CorrelateConfig, report: Path | None, trust: bool
) -> None:
    """Check before any work that the models and the text can be used, and the report written."""
    from knnlm.model.loading import read_outline
    from knnlm.places import check_report_folder
    from knnlm.studies.correlate.study import check_model
    from knnlm.text.corpus import text_bytes

    if report is not None:
        check_report_folder(report)
    text_bytes(text)
    for name in models:
        outline = read_outline(name, trust_remote_code=trust)
        check_model(name, outline.layer_names, outline.context_limit, config)


def _models(
    names: Sequence[str], random: bool, seed: int, compute: options.ComputeOptions, trust: bool, screen: Screen
) -> Iterator[LanguageModel]:
    """Load the models one at a time, so that memory holds one; the random one comes last."""
    from knnlm.model.loading import random_model

    for name in names:
        yield load(name, compute, trust, screen)
    if random:
        dtype, device = compute.dtype, compute.device
        yield random_model(names[0], seed=seed, dtype=dtype, device=device, trust_remote_code=trust)


def _studies(lm: LanguageModel, text: Sequence[str], config: CorrelateConfig, screen: Screen) -> tuple[Study, ...]:
    from knnlm.studies.correlate.study import study_correlation

    return study_correlation(lm, text, config=config, progress=screen)


def _show(study: Study, screen: Screen) -> None:
    screen.say(_table(study))
    if study.clusters:
        screen.say(_cluster_table(study))
    for note in study.notes:
        screen.say(f"Note: {note}")


def _cluster_table(study: Study) -> Table:
    from knnlm.cli.tables import compact_table

    heads = ("layer", "clusters by", "within", "between", "clusters", "contexts")
    table = compact_table(heads, title=f"{study.model}: mean cosine distance of contexts", left=heads[:2])
    for one in study.clusters:
        found = one.distances
        distances = (f"{found.within:.4f}", f"{found.between:.4f}")
        table.add_row(one.layer, one.kind, *distances, f"{found.clusters:,}", f"{found.contexts:,}")
    return table


def _table(study: Study) -> Table:
    from knnlm.cli.tables import compact_table

    title = (
        f"{study.model}: {study.segments:,} segments of {study.context} tokens, perplexity {study.perplexity:.2f}, "
        f"{study.groups} groups of {study.group_size}"
    )
    kind = next(kind for kind in SCORES if kind.name == study.score)
    heads = ("layer", kind.title, "Pearson", "Spearman", "95 %", "grouped", "95 %", "across", "final token")
    table = compact_table(heads, title=title)
    for one in study.layers:
        low, high = one.ungrouped.spearman_interval.low, one.ungrouped.spearman_interval.high
        least, most = one.grouped.spearman_interval.low, one.grouped.spearman_interval.high
        table.add_row(
            *(one.layer, f"{one.score:.{kind.digits}f}", f"{one.ungrouped.pearson:+.2f}"),
            *(f"{one.ungrouped.spearman:+.2f}", f"{low:+.2f} … {high:+.2f}"),
            *(f"{one.grouped.spearman:+.2f}", f"{least:+.2f} … {most:+.2f}"),
            *(f"{one.across.spearman:+.2f}", f"{one.final_ungrouped.spearman:+.2f}"),
        )
    table.caption = (
        f"Of perplexity with the score of segments ({kind.meaning}); grouped, across and final token are Spearman's."
    )
    return table

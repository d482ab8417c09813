"""The verb `rank-models`: ranks checkpoints by their output matrices without loading the models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import options
from knnlm.cli.groups import Place
from knnlm.report.numbers import MISSING

if TYPE_CHECKING:
    from rich.table import Table

    from knnlm.studies.rank_models.ranking import Ranking
    from knnlm.studies.rank_models.token_sets import TokenSource


Models = Annotated[
    list[str], typer.Argument(help="Folders or Hugging Face ids of causal LMs with safetensors."), Place()
]
Domain = Annotated[str | None, typer.Option("--domain", help="Built-in domain tokens: mathematics or code.")]
DomainTokens = Annotated[
    Path | None, typer.Option("--domain-tokens", help="File with the domain's tokens, one id a line.")
]
DomainText = Annotated[
    str | None,
    typer.Option("--domain-text", help="Text of the domain, in the forms of --text; needs --general-text."),
    Place(),
]
GeneralTokens = Annotated[
    Path | None,
    typer.Option("--general-tokens", help="File with everyday tokens, one id a line; default: built-in words."),
]
GeneralText = Annotated[
    str | None, typer.Option("--general-text", help="Everyday text, whose most frequent tokens are taken."), Place()
]
Scores = Annotated[
    Path | None, typer.Option("--scores", help="JSON or CSV with a measured figure for each model, lower being better.")
]
HigherIsBetter = Annotated[
    bool, typer.Option("--higher-is-better", help="Higher figures in --scores are better, as for accuracies.")
]
Report = Annotated[Path | None, typer.Option("--report", help="Folder for rank-models.json and rank-models.html.")]


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """Sources of the domain's and the everyday tokens."""

    domain: Domain = None
    domain_tokens: DomainTokens = None
    domain_text: DomainText = None
    general_tokens: GeneralTokens = None
    general_text: GeneralText = None

    def source(self, *, text_field: str) -> TokenSource:
        """The settings, checked."""
        from knnlm.studies.rank_models.token_sets import TokenSource

        return TokenSource(
            domain=self.domain,
            domain_tokens=self.domain_tokens,
            domain_text=self.domain_text,
            general_tokens=self.general_tokens,
            general_text=self.general_text,
            text_field=text_field,
        )


def rank_models(
    *,
    models: Models,
    given: TokenOptions,
    scores: Scores = None,
    higher_is_better: HigherIsBetter = False,
    report: Report = None,
    text_field: options.TextField = "text",
    output: options.Output,
) -> None:
    """Rank checkpoints for a domain by the dispersion gap of rows of their output matrices, largest first.

    Example: knnlm rank-models base tuned-a tuned-b --domain code
    """
    from knnlm.studies.rank_models.document import ranking_document
    from knnlm.studies.rank_models.figures import read_scores
    from knnlm.studies.rank_models.page import regret_words, write_rank_models
    from knnlm.studies.rank_models.ranking import model_names
    from knnlm.studies.rank_models.ranking import rank_models as rank
    from knnlm.version import versions

    tokens = given.source(text_field=text_field)
    _check(scores, higher_is_better, report)
    names = model_names(models)
    figures = None if scores is None else read_scores(scores, names)
    ranking = rank(names, tokens, scores=figures, higher_is_better=higher_is_better)
    settings = asdict(tokens) | {"models": names, "scores": scores, "higher_is_better": higher_is_better}
    document = ranking_document(ranking, settings=settings, versions=versions())
    screen = output.screen()
    screen.say(_table(ranking))
    for line in (*_sources(tokens), *_findings(ranking)):
        screen.say(line)
    if ranking.regret is not None:
        screen.say(regret_words(document))
    screen.result(document)
    if report is not None:
        screen.say(f"Report: {write_rank_models(document, report)}")


def _check(scores: Path | None, higher_is_better: bool, report: Path | None) -> None:
    from knnlm.errors import InputError
    from knnlm.places import check_report_folder

    if higher_is_better and scores is None:
        raise InputError("--higher-is-better is of --scores, which are missing")
    if report is not None:
        check_report_folder(report)


def _table(ranking: Ranking) -> Table:
    from rich.table import Table

    table = Table(title="Models by dispersion gap, within + between")
    for name in ("model", "gap", "within", "between", "tokens", "measured"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for one in ranking.models:
        measured = MISSING if one.measured is None else f"{one.measured:.4g}"
        counts = f"{one.domain_tokens} / {one.general_tokens}"
        table.add_row(one.model, f"{one.gap:.4f}", f"{one.within:.4f}", f"{one.between:.4f}", counts, measured)
    return table


def _sources(tokens: TokenSource) -> Iterator[str]:
    domain, general = tokens.words
    yield f"The gap is of arXiv 2506.24106. Domain tokens: {domain}. Everyday tokens: {general}."
    if tokens.domain is not None or (tokens.general_tokens is None and tokens.general_text is None):
        yield "The paper's token lists are not published: built-in ones are this project's."
    yield "It is for finished models tuned from one base: along a training from scratch it ranked in reverse."


def _findings(ranking: Ranking) -> Iterator[str]:
    found = ranking.correlation
    if found is not None and math.isfinite(found.spearman):
        for name, value, interval in (
            ("Spearman", found.spearman, found.spearman_interval),
            ("Pearson", found.pearson, found.pearson_interval),
        ):
            reach = f"95 % interval {interval.low:+.2f} … {interval.high:+.2f}"
            yield f"{name} of the gap with what was measured: {value:+.3f} ({reach}, {found.count} models)."
        kind, due = ("high", "+1") if ranking.higher_is_better else ("low", "-1")
        yield f"Where {kind} figures are good, a gap that ranks well has a correlation near {due}."
    for note in ranking.notes:
        yield f"Note: {note}."

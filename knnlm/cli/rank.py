"""The verb that ranks checkpoints by their output matrix; it builds no model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knnlm.cli import options
from knnlm.screen import Screen

if TYPE_CHECKING:
    from rich.table import Table

    from knnlm.checkpoints.ranking import Ranking


def rank_models(
    models: Annotated[list[str], typer.Argument(help="Folders or Hugging Face ids of causal LMs, with safetensors.")],
    domain: Annotated[str | None, typer.Option("--domain", help="A built-in domain: mathematics or code.")] = None,
    domain_tokens: Annotated[
        Path | None, typer.Option("--domain-tokens", help="Or the domain's tokens, one id a line.")
    ] = None,
    domain_text: Annotated[
        str | None, typer.Option("--domain-text", help="Or text of the domain, like --text; needs --general-text.")
    ] = None,
    general_tokens: Annotated[
        Path | None, typer.Option("--general-tokens", help="Everyday tokens, one id a line; built in when not given.")
    ] = None,
    general_text: Annotated[
        str | None, typer.Option("--general-text", help="Everyday text: its most frequent tokens are taken.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="JSON or CSV: model and measured figure, low is good.")
    ] = None,
    text_field: options.TextField = "text",
    json: options.Json = False,
) -> None:
    """Which checkpoint suits a domain best, from rows of its output matrix alone; the largest gap first.

    Example: knnlm rank-models base tuned-a tuned-b --domain code
    """
    from knnlm.checkpoints.ranking import rank_models as rank
    from knnlm.checkpoints.ranking import read_scores
    from knnlm.checkpoints.token_sets import TokenSource

    tokens = TokenSource(
        domain=domain,
        domain_tokens=domain_tokens,
        domain_text=domain_text,
        general_tokens=general_tokens,
        general_text=general_text,
        text_field=text_field,
    )
    ranking = rank(models, tokens, scores=None if scores is None else read_scores(scores))
    screen = Screen(json)
    screen.say(_table(ranking))
    for line in _lines(ranking):
        screen.say(line)
    screen.result(_document(ranking))


def _table(ranking: Ranking) -> Table:
    from rich.table import Table

    table = Table(title="Models by dispersion gap, within + between")
    for name in ("model", "gap", "within", "between", "tokens", "measured"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for one in ranking.models:
        measured = "–" if one.measured is None else f"{one.measured:.4g}"
        counts = f"{one.domain_tokens} / {one.general_tokens}"
        table.add_row(one.model, f"{one.gap:.4f}", f"{one.within:.4f}", f"{one.between:.4f}", counts, measured)
    return table


def _lines(ranking: Ranking) -> Iterator[str]:
    yield "The gap is of arXiv 2506.24106. Its token lists are not published: the built-in ones are this project's."
    yield "It is for finished models tuned from one base: along a training from scratch it ranked in reverse."
    found = ranking.correlation
    if found is not None and math.isfinite(found.spearman):
        for name, value, interval in (
            ("Spearman", found.spearman, found.spearman_interval),
            ("Pearson", found.pearson, found.pearson_interval),
        ):
            reach = f"95 % interval {interval.low:+.2f} … {interval.high:+.2f}"
            yield f"{name} of the gap with what was measured: {value:+.3f} ({reach}, {found.count} models)."
        yield "Where low figures are good, a gap that ranks well has a correlation near -1."
    if ranking.regret is not None:
        yield f"The first model's figure is {ranking.regret:+.1%} from the lowest."
    for note in ranking.notes:
        yield f"Note: {note}."


def _document(ranking: Ranking) -> dict[str, Any]:
    """As plain JSON: NaN is null, an interval `[low, high]`; what --scores tells is null without them."""
    told: dict[str, Any] = dict.fromkeys(("spearman", "spearman_interval", "pearson", "pearson_interval"))
    found = ranking.correlation
    if found is not None and math.isfinite(found.spearman):
        told = {name: getattr(found, name) for name in told}
        told |= {name: list(asdict(value).values()) for name, value in told.items() if name.endswith("interval")}
    models = [asdict(one) for one in ranking.models]
    return {"models": models, **told, "regret": ranking.regret, "notes": list(ranking.notes)}

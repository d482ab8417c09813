"""The verb `explain`: why the kNN-LM gave each token of a text its probability."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import options
from knnlm.cli.shared import load_own, read_standard_input, setting_document, with_lambda

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from knnlm.inference.cite import Citation, Citations
    from knnlm.inference.explain import ExplainedToken, Explanation

Given = Annotated[str | None, typer.Option("--text", help="Text to explain; default: standard input.")]
Cite = Annotated[bool, typer.Option("--cite", help="Also the documents behind the text.")]
HEADS = ("token", "p_LM", "p_kNN", "λ", "p_mixed", "change", "nearest neighbour → its token")
CITED_HEADS = ("document", "no.", "share", "worth", "verbatim", "longest run of the text that stands in it")
CITED = 10
"""Documents in the table."""
SNIPPET = 56
"""Characters of a neighbour's context in the table."""


def explain(
    *,
    stores: options.StoreOptions,
    text: Given = None,
    cite: Cite = False,
    retrieving: options.RetrievalOptions,
    model: options.OtherModel = None,
    compute: options.ComputeOptions,
    output: options.Output,
    trust_remote_code: options.Trust = False,
) -> None:
    """Explain each token of a text: its probability under LM, neighbours and mixture, and its nearest neighbour.

    Example: knnlm explain nursing.knn --text "The patient was given oxygen."
    """
    from knnlm.inference.explain import Explainer

    opened = stores.open()
    retrieval = retrieving.open(opened)
    screen = output.screen()
    given = text if text is not None else read_standard_input("--text", screen)
    lm = load_own(opened, model, compute, trust_remote_code, screen)
    explainer = Explainer(lm, retrieval)
    explanation = explainer.explain(given)
    screen.say(_table(explanation, sources=len(stores.store) > 1))
    screen.say(_summary(explanation))
    citations = explainer.model().cite(given) if cite else None
    if citations is not None:
        screen.say(_cited_table(citations.whole))
        screen.say(_cited_summary(citations))
    known = {**stores.told(), "model": lm.name, "text": given, **setting_document(retrieval)}
    screen.result(known | _document(explanation) | ({} if citations is None else _cited_document(citations)))


def _document(explanation: Explanation) -> dict[str, object]:
    return {
        "lm_perplexity": explanation.lm_perplexity,
        "mixed_perplexity": explanation.mixed_perplexity,
        "beginning": explanation.beginning,
        "tokens": [with_lambda(one) for one in explanation.tokens],
    }


def _cited_document(citations: Citations) -> dict[str, object]:
    """The whole text's citation with all documents, and each token's."""
    from knnlm.documents import plain

    return {"citation": plain(citations.whole), "token_citations": plain(citations.tokens)}


def _cited_table(citation: Citation) -> Table:
    from rich.text import Text

    from knnlm.cli.tables import compact_table
    from knnlm.report.examples import flow_start, visible
    from knnlm.report.numbers import probability

    table = compact_table(CITED_HEADS, left=(CITED_HEADS[0], CITED_HEADS[-1]))
    for one in citation.documents[:CITED]:
        worth, run = f"{one.gain / math.log(2):+.1f} bits", f"{one.overlap} tokens"
        cells = (visible(one.document), f"{one.number}", probability(one.share), worth, run)
        table.add_row(*map(Text, cells), Text(flow_start(one.verbatim, SNIPPET)))
    return table


def _cited_summary(citations: Citations) -> str:
    whole = citations.whole
    more = f" and {len(whole.documents) - CITED} more documents" if len(whole.documents) > CITED else ""
    return (
        f"The model alone has {whole.lm_share:.0%} of the probability of the {len(citations)} tokens; these{more} have "
        "the rest. Worth: how much likelier the text is than without the document's keys."
    )


def _table(explanation: Explanation, *, sources: bool) -> Table:
    """The tokens, each with its nearest neighbour; with `sources`, this one's datastore and source are named."""
    from knnlm.cli.tables import compact_table

    setting = explanation.setting
    moved = "" if setting.gate is None else ", moved by token and by the text so far"
    title = f"{explanation.layer}, k {setting.k}, T {setting.temperature:.4g}, λ {setting.lam:.3f}{moved}"
    table = compact_table(HEADS, title=title, left=(HEADS[0], HEADS[-1]))
    for one in explanation.tokens:
        table.add_row(*_cells(one, sources=sources))
    return table


def _cells(one: ExplainedToken, *, sources: bool = False) -> Iterator[Text]:
    """Cells as rich's Text, so that square brackets in a corpus are not read as markup."""
    from rich.text import Text

    from knnlm.report.examples import flow_end, visible
    from knnlm.report.numbers import MISSING, probability

    yield Text(visible(one.text))
    yield from map(Text, map(probability, (one.lm_probability, one.knn_probability)))
    yield Text(f"{one.lam:.3f}")
    yield Text(probability(one.mixed_probability))
    yield Text(MISSING if one.change is None else f"{one.change:+.1f} bits")
    nearest = one.neighbors[0].source if one.neighbors else None
    if nearest is None:
        yield Text(MISSING)
        return
    named = f"{visible(nearest.document)}: " if sources else ""
    yield Text(f"{named}{flow_end(nearest.before, SNIPPET)} → {visible(nearest.token)}")


def _summary(explanation: Explanation) -> str:
    plain, mixed = (
        "∞" if value is None else f"{value:.2f}" for value in (explanation.lm_perplexity, explanation.mixed_perplexity)
    )
    trust = (
        f" Trust in the memory at its end: {explanation.tokens[-1].trust:.3f}." if explanation.setting.by_text else ""
    )
    return f"Perplexity of the {len(explanation.tokens)} tokens: {plain}, with the memory {mixed}.{trust}"

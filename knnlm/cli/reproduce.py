"""The verb `reproduce`: published perplexities, measured again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from knnlm.cli import options
from knnlm.cli.groups import Place
from knnlm.cli.shared import load, with_lambda
from knnlm.report.numbers import MISSING

if TYPE_CHECKING:
    from rich.table import Table

    from knnlm.studies.reproduce.study import Reproduction

What = Annotated[Literal["wikitext103"], typer.Argument(help="What was published: wikitext103.")]
Size = Annotated[str, typer.Option("--model", help="distilgpt2, gpt2, gpt2-medium, gpt2-large or gpt2-xl."), Place()]
HubFolder = Annotated[
    Path | None, typer.Option("--hub", help="Folder with the models and the text, in place of the hub."), Place()
]
StoreOut = Annotated[
    Path | None, typer.Option("--out", help="Datastore to make, or to use again, for the kNN-LM's figures."), Place()
]
HEADS = ("", "perplexity", "published", "k", "λ", "T")


def reproduce(
    *,
    what: What,
    model: Size = "gpt2",
    out: StoreOut = None,
    hub: HubFolder = None,
    compute: options.ComputeOptions,
    output: options.Output,
) -> None:
    """Measure published perplexities again: the plain LM's and, with --out, the kNN-LM's.

    Example: knnlm reproduce wikitext103 --model gpt2
    """
    from knnlm.studies.reproduce.published import Hub, published

    known, place, screen = published(model), Hub(hub), output.screen()
    test = place.text("test")
    from knnlm.studies.reproduce.study import reproduce_memory, reproduce_plain

    lm = load(place.model(model), compute, False, screen)
    plain = reproduce_plain(lm, test, published=known.plain, progress=screen)
    memory = None
    if out is not None and known.tuned is not None:
        texts = (place.text("train"), place.text("validation"))
        tuned = load(place.model(known.tuned), compute, False, screen)
        figures = (known.tuned_plain, known.memory)
        memory = reproduce_memory(tuned, *texts, out, published=figures, progress=screen)
    screen.say(_table(plain, "test"))
    if memory:
        screen.say(_table(memory, "validation"))
    elif out is not None:
        screen.note(f"no fine-tuned {model} was published; only the plain LM was measured")
    if memory and known.memory_of_users:
        screen.say(f"Users of knn-transformers got {known.memory_of_users} instead of {known.memory:.2f}.")
    screen.result({"what": what, "model": model, "plain": _document(plain), "memory": _document(memory)})


def _table(done: Reproduction, split: str) -> Table:
    from knnlm.cli.tables import compact_table

    keys = "" if done.keys is None else f", {done.keys:,} keys"
    title = f"WikiText-103, {split}: perplexity on {done.tokens:,} tokens{keys}"
    table = compact_table(HEADS, title=title, left=HEADS[:1])
    for one in done.rows:
        agrees = {True: " ✓", False: " ✗", None: ""}[one.agrees]
        table.add_row(
            one.name,
            f"{one.perplexity:.3f}",
            MISSING if one.published is None else f"{one.published:.2f}{agrees}",
            MISSING if one.k is None else f"{one.k}",
            MISSING if one.lam is None else f"{one.lam:.3f}",
            MISSING if one.temperature is None else f"{one.temperature:.4g}",
        )
    return table


def _document(done: Reproduction | None) -> dict[str, object] | None:
    if done is None:
        return None
    rows = [with_lambda(one) | {"agrees": one.agrees} for one in done.rows]
    return {"tokens": done.tokens, "keys": done.keys, "rows": rows}

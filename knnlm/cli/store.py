"""The verbs `info` and `verify`, and the description of a datastore that `build` ends with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer

from knnlm.cli import options
from knnlm.cli.screen import Screen
from knnlm.report.numbers import MISSING

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("layer", "dim", "type", "size", "index", "recall", "k", "λ", "T")
LEFT = ("layer", "type", "index")


def info(*, store: options.Store, output: options.Output) -> None:
    """Describe a datastore: model, layers, keys, size, indexes, chosen layer.

    Example: knnlm info nursing.knn
    """
    from knnlm.store.datastore import Datastore

    show_store(Datastore.open(store).describe(), output.screen())


def verify(*, store: options.Store, output: options.Output) -> None:
    """Verify a datastore: the size and checksum of every file, and every index.

    Example: knnlm verify nursing.knn
    """
    from knnlm.knn.indexing import verify_store

    screen = output.screen()
    problems = verify_store(store, screen)
    screen.result({"store": str(store), "whole": not problems, "problems": problems})
    for problem in problems:
        screen.say(problem)
    if problems:
        raise typer.Exit(2)
    screen.say(f"{store} is whole")


def show_store(description: Mapping[str, Any], screen: Screen) -> None:
    """Show the result of `Datastore.describe`: the layers as a table, the rest as lines.

    `recall` is recall@k of the layer's index; k, λ and T are the values fitted by the last `run`.
    """
    for line in _head_lines(description):
        screen.say(line)
    screen.say(_layer_table(description))
    for line in _end_lines(description):
        screen.say(line)
    screen.result(description)


def _head_lines(store: Mapping[str, Any]) -> Iterator[str]:
    from rich.filesize import decimal

    yield f"{store['folder']}: {decimal(store['bytes'])}"
    yield f"Model: {store['model']}"
    yield f"Keys of each layer: {store['keys']:,} (documents: {store['documents']:,}, sources: {store['sources']:,})"
    if store["parts"] > 1 or store["removed"]:
        yield f"Parts: {store['parts']:,}; generation {store['generation']:,}; removed rows: {store['removed']:,}"
    yield f"Windows: {store['context']:,} tokens, of which {store['stride']:,} are new"


def _layer_table(store: Mapping[str, Any]) -> Table:
    from knnlm.cli.tables import compact_table

    table = compact_table(COLUMNS, left=LEFT)
    for layer in store["layers"]:
        table.add_row(*_layer_cells(store, layer))
    return table


def _layer_cells(store: Mapping[str, Any], layer: str) -> Iterator[str]:
    from rich.filesize import decimal

    keys, choice = store["layers"][layer], store["choice"]
    index, fitted = store["indexes"].get(layer), (store["fitted"] or {}).get(layer)
    yield f"{layer} ◀ chosen" if choice and choice["layer"] == layer else layer
    yield f"{keys['dim']}"
    yield keys["dtype"] if keys["scale"] == 1 else f"{keys['dtype']} x {keys['scale']:g}"
    yield decimal(keys["bytes"])
    yield f"{index['spec']} ({index['metric']})" if index else MISSING
    yield f"{index['recall']:.4f} @{index['k']}" if index else MISSING
    yield f"{fitted['k']}" if fitted else MISSING
    yield f"{fitted['lambda']:.3f}" if fitted else MISSING
    yield f"{fitted['temperature']:.4g}" if fitted else MISSING


def _end_lines(store: Mapping[str, Any]) -> Iterator[str]:
    if choice := store["choice"]:
        yield f"Chosen: {choice['reason']}."
        if choice.get("disagreement"):
            yield f"Note: {choice['disagreement']}."
    yield from store["stale"]
    if any(fitted.get("gate") for fitted in (store["fitted"] or {}).values()):
        yield "λ by query: text is generated with one that each query and the text so far move around the λ above."
    yield f"Made with: {', '.join(f'{name} {version}' for name, version in store['versions'].items())}"

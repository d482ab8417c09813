"""The verbs that change a datastore: add, remove, compact, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knnlm.cli import options
from knnlm.cli.shared import check_texts, load_own
from knnlm.cli.store import show_store

Documents = Annotated[
    list[str] | None, typer.Option("--document", help="Document SOURCE:N, as `explain` and neighbours name it.")
]
Sources = Annotated[list[str] | None, typer.Option("--source", help="Source with all its documents, by base name.")]
Purge = Annotated[bool, typer.Option("--purge", help="Leave no byte of them: rewrite parts, train indexes anew.")]
Stores = Annotated[list[Path], typer.Argument(help="Folders of datastores.")]


def add(
    *,
    store: options.Store,
    text: options.Text,
    max_tokens: options.MaxTokens = None,
    rows: options.RowOptions,
    passes: options.PassOptions,
    model: options.OtherModel = None,
    output: options.Output,
    trust_remote_code: options.Trust = False,
) -> None:
    """Add documents to a datastore: its model reads them, its indexes take them in.

    Example: knnlm add nursing.knn --text new.jsonl
    """
    from knnlm.config import Settings
    from knnlm.store.datastore import Datastore

    windows = options.WindowOptions()
    settings = Settings(text=options.text_config(windows, rows, passes, max_tokens=max_tokens))
    opened = Datastore.open(store)
    check_texts(text, text_field=rows.text_field)
    screen = output.screen()
    lm = load_own(opened, model, passes.compute, trust_remote_code, screen)
    from knnlm.pipeline import add as add_documents

    show_store(add_documents(lm, opened, text, settings=settings, progress=screen).describe(), screen)


def remove(
    *,
    store: options.Store,
    document: Documents = None,
    source: Sources = None,
    purge: Purge = False,
    output: options.Output,
) -> None:
    """Remove documents from a datastore: no search finds them any more.

    Example: knnlm remove nursing.knn --document notes.jsonl:17
    """
    from knnlm.pipeline import remove as remove_documents

    wanted = [*map(_document, document or ()), *(source or ())]
    if not wanted:
        raise typer.BadParameter("nothing is named", param_hint="--document, --source")
    screen = output.screen()
    show_store(remove_documents(store, wanted, purge=purge, progress=screen).describe(), screen)


def compact(*, store: options.Store, output: options.Output) -> None:
    """Join the small parts of a datastore, and leave out removed rows: searches find the same.

    Example: knnlm compact nursing.knn
    """
    from knnlm.pipeline import compact as compact_parts

    screen = output.screen()
    show_store(compact_parts(store, progress=screen).describe(), screen)


def merge(*, stores: Stores, out: options.Out, output: options.Output, overwrite: options.Overwrite = False) -> None:
    """Make one datastore of several that have one frame (`build --frame`).

    Example: knnlm merge a.knn b.knn --out both.knn
    """
    from knnlm.pipeline import merge as merge_stores
    from knnlm.places import check_new_folder

    check_new_folder(out, overwrite=overwrite, inputs=stores)
    screen = output.screen()
    show_store(merge_stores(stores, out, overwrite=overwrite, progress=screen).describe(), screen)


def _document(name: str) -> str | tuple[str, int]:
    """The document SOURCE:N; without a number, the whole source."""
    source, colon, number = name.rpartition(":")
    return (source, int(number)) if colon and number.isdecimal() else name

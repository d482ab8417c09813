"""The verb `push`: a datastore to the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from knnlm.cli import options

Target = Annotated[str, typer.Argument(help="Name on the hub: hf:USER/NAME.")]
License = Annotated[
    str | None, typer.Option("--license", help="Licence of the text, as the hub names it: cc-by-4.0, mit, other …")
]
Private = Annotated[bool, typer.Option("--private", help="If there is none of that name yet, make it private.")]


def push(
    *,
    store: options.Store,
    target: Target,
    license: License = None,
    private: Private = False,
    output: options.Output,
) -> None:
    """Send a datastore to the Hugging Face hub, with a card; given again, it goes on where it was stopped.

    Example: knnlm push nursing.knn hf:ann/nursing --license cc-by-4.0
    """
    from knnlm.sharing.push import push as push_store

    screen = output.screen()
    name = push_store(store, target, license=license, private=private, progress=screen)
    screen.result({"store": str(store), "name": name})
    screen.say(f"Sent: {name}")

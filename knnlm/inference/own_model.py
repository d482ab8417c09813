"""The model that a datastore was made with, found again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knnlm.errors import ModelError
from knnlm.store.joint import AnyStore


@contextmanager
def own_model(store: AnyStore, given: str | Path | None = None, *, field: str = "model") -> Iterator[str]:
    """Yield the name of the model to load in the block: the given one, else the one that the datastore remembers.

    :param field: where the caller takes another model.
    :raises ModelError: the block's; if the model was not given, it names the datastore too, and the field.
    """
    if given:
        yield str(given)
        return
    try:
        yield store.first.model
    except ModelError as error:
        raise ModelError(
            f"{error}; {store.first.folder} was made with this model: if it is elsewhere now, give it as `{field}`"
        ) from error

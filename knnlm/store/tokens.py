"""Ranges of a datastore's tokens, which its checksums cannot tell."""

from __future__ import annotations

from knnlm.errors import DatastoreCorrupt
from knnlm.store.datastore import Datastore
from knnlm.store.joint import AnyStore


def check_tokens(store: AnyStore, vocabulary: int | None = None) -> None:
    """Check that a datastore's tokens are ones that there are: others would end a search or a text with an exception.

    Reads the values and the documents, which both `eval` and text generation need anyway.

    :param vocabulary: number of the model's tokens; None: only that no token is negative.
    :raises DatastoreCorrupt: a token is out of range, or a file has changed.
    """
    for one in store.stores:
        _check_tokens(one, vocabulary)


def _check_tokens(store: Datastore, vocabulary: int | None) -> None:
    for name, tokens in (("documents", store.documents[:, 1]), ("values", store.values)):
        low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            wrong, known = (low, "") if low < 0 else (high, f" of the model's {vocabulary}")
            raise DatastoreCorrupt(
                f"{store.folder}: its {name} hold {wrong}, which is no token{known}; build the datastore again"
            )

"""Where a datastore's model is: an id on the hub, or a path relative to the datastore, so that both move together."""

from __future__ import annotations

import os
from pathlib import Path


def relative_place(name: str, folder: Path) -> str:
    """Return a model's name as a datastore in `folder` keeps it: a path relative to the folder, or an id unchanged."""
    path = Path(name)
    if not path.exists():
        return name
    # Links to the model are kept: the file that a link of the hub's cache leads to has another name.
    place = os.path.relpath(path.parent.resolve() / path.name, folder.resolve())
    return place if place.split("/")[0] == os.pardir else f"./{place}"


def absolute_place(place: str, folder: Path) -> str:
    """Return the name to load the model of a datastore in `folder` by. Undoes `relative_place`."""
    if place.split("/")[0] not in (os.curdir, os.pardir):
        return place
    return os.path.normpath(folder.resolve() / place)

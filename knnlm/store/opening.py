"""Opening the files of a datastore: each is mapped, or its error kept for whoever needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from index.errors import CorruptIndex
from index.mapped import OpenFolder, Stamp
from index.saved import SavedIndex
from knnlm.errors import DatastoreCorrupt, DatastoreError
from knnlm.store.manifest import Manifest, read_manifest
from knnlm.store.npy import map_npy
from knnlm.store.part import PartFile


class MappedFile(NamedTuple):
    """A mapped file."""

    array: NDArray[Any]
    stamp: Stamp


def map_file(opened: OpenFolder, one: PartFile) -> MappedFile | DatastoreCorrupt:
    """Return a file, or what is wrong with it."""
    try:
        return MappedFile(*map_npy(opened, one.file, one.dtype, one.shape))
    except DatastoreCorrupt as error:
        return error


def is_changed(opened: OpenFolder, manifest: Manifest) -> bool:
    """Return whether there is another datastore, or another generation of it, by now."""
    if opened.is_replaced:
        return True
    try:
        return read_manifest(opened) != manifest
    except DatastoreError:
        return False


def open_saved_index(folder: Path) -> SavedIndex | CorruptIndex:
    """Return a saved index, or what is wrong with it."""
    try:
        return SavedIndex.open(folder)
    except CorruptIndex as error:
        return error

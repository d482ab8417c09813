"""Sending a datastore to the Hugging Face hub, after checks."""

from __future__ import annotations

import re
from pathlib import Path

from knnlm.errors import DatastoreCorrupt, DatastoreError, InputError
from knnlm.knn.indexing import verify_store
from knnlm.locks import BEING_WRITTEN, LOCK
from knnlm.places import DATASTORE, REPORTS, UNFINISHED, files_of, read_work
from knnlm.progress import Progress, Silent
from knnlm.sharing.card import datastore_card, model_folder
from knnlm.sharing.upload import check_license, check_target, upload
from knnlm.store.datastore import Datastore, as_datastore

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# The report shows pieces of other text; its figures are in the card.
_NOT_SENT = {LOCK, BEING_WRITTEN, UNFINISHED, *REPORTS}


def push(
    store: str | Path | Datastore,
    target: str,
    *,
    license: str | None = None,
    private: bool = False,
    progress: Progress | None = None,
) -> str:
    """Send a datastore to the Hugging Face hub, with a card; return its name there with the commit.

    Every byte is verified before the first is sent. A push that was stopped goes on where it was when it is given
    again; files that are there already are not sent again.

    :param target: `hf:USER/NAME`, a data set of the hub, made if there is none.
    :param license: of the text, as the hub names it, such as `cc-by-4.0`: whoever has the datastore can read the text.
    :param private: if there is none of that name yet, make it private.
    :raises InputError: no licence, another form of target, or no token of the hub.
    :raises DatastoreError: the datastore is unfinished, or the hub refuses.
    :raises DatastoreCorrupt: the datastore is damaged; names the file.
    :raises DatastoreExists: another data set has that name.
    """
    hub, progress = check_target(target), progress or Silent()
    text_license = _checked(license)
    folder = as_datastore(store).folder
    manifest, opened = (folder / DATASTORE).read_bytes(), Datastore.open(folder)
    _check_whole(folder, progress)
    names = {name for name in files_of(folder, DATASTORE) or () if (folder / name).is_file()} - _NOT_SENT
    size = sum((folder / name).stat().st_size for name in names)
    card = datastore_card(opened, hub.repo, text_license, size)
    check_license(text_license, card, hub)
    if model := model_folder(opened):
        progress.note(f"The model was loaded from {model}, which others do not have: they have to name the model.")
    return upload(folder, names, manifest, card, hub, private=private)


def _checked(license: str | None) -> str:
    advice = "name it as the hub does, such as cc-by-4.0, mit or other"
    if license is None:
        raise InputError(f"`license` of the text is missing, which others can read back from the datastore; {advice}")
    if _LICENSE.fullmatch(license) is None:
        raise InputError(f"`license` is {license!r}, which is no name of a licence; {advice}")
    return license


def _check_whole(folder: Path, progress: Progress) -> None:
    if read_work(folder) is not None:
        raise DatastoreError(f"{folder} is unfinished; give the command that makes it again, then push it")
    problems = verify_store(folder, progress)
    if problems:
        raise DatastoreCorrupt(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))

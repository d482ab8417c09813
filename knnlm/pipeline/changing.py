"""Documents added to a datastore and removed from it, small parts joined, datastores merged; indexes follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from knnlm.config import Settings
from knnlm.errors import DatastoreError, InputError
from knnlm.files import new_folder
from knnlm.knn.renewing import renew_indexes
from knnlm.model.lm import LanguageModel
from knnlm.pipeline.job import Job, Paths
from knnlm.pipeline.plan import estimate_tokens
from knnlm.pipeline.steps import EXTRACTING, read_through, windows_like
from knnlm.places import UNFINISHED, mark_unfinished, work_of
from knnlm.progress import Progress, Silent
from knnlm.store import changes
from knnlm.store.appender import DatastoreAppender
from knnlm.store.changes import Named
from knnlm.store.datastore import Datastore, as_datastore
from knnlm.store.part_writer import TextHasChanged


def add(
    lm: LanguageModel,
    store: str | Path | Datastore,
    text: Paths,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Datastore:
    """Add documents to a datastore, bring its indexes up to date, and return it with them.

    Layers, windows, centres and the type of the keys are the datastore's; of the settings, only how text is read
    counts. Nobody sees a document before all are there. The same call goes on after a kill; if all documents are there
    already, as after a kill that came late, nothing is added and a note says so.

    :raises DatastoreMismatch: the datastore was made with another model; the message says what differs.
    :raises InputError: other windows than the datastore's, or no document has two tokens.
    :raises DatastoreError: another process is changing the datastore, or the disk is full.
    """
    store, settings = as_datastore(store), settings or Settings()
    store.check_model(lm.fingerprint)
    text_config = windows_like(store, settings.text)
    if (text_config.context, text_config.stride) != (store.manifest.context, store.manifest.stride):
        raise InputError(
            f"`context` and `stride` are those of the datastore, {store.manifest.context} and {store.manifest.stride}; "
            "leave them out"
        )
    job = Job(lm, replace(settings, text=text_config), progress or Silent())
    _append(job, store, text, work_of("add", lm.name, text, settings))
    renew_indexes(Datastore.open(store.folder), job.progress)
    return Datastore.open(store.folder)


def _append(job: Job, store: Datastore, text: Paths, work: str) -> None:
    """Make the parts, and commit them in one step."""
    total = estimate_tokens(job.lm, text, job.settings.text)
    with store.writing(work) as newest:
        mark_unfinished(newest.folder, work, layers=newest.layers)
        try:
            with DatastoreAppender(newest) as writer:
                read_through(job, job.documents(text), newest.layers, total, stage=EXTRACTING, writer=writer)
                if not writer.commit(once=True):
                    job.progress.note(f"nothing was added: {newest.folder} has all these documents already")
        except TextHasChanged:
            (newest.folder / UNFINISHED).unlink(missing_ok=True)
            raise DatastoreError(
                "the text has changed since a killed process read it; give the same again, which begins anew"
            ) from None


def remove(
    store: str | Path | Datastore,
    documents: Iterable[Named],
    *,
    purge: bool = False,
    progress: Progress | None = None,
) -> Datastore:
    """Remove documents from a datastore, and return it without them.

    Their rows stay in the files, unseen, until `compact`. Recall of the indexes is measured again.

    :param documents: the name of a source stands for all its documents; (name, number) for one.
    :param purge: rewrite the parts concerned, so that no file holds text, tokens or keys of removed documents; indexes
        are trained anew, and reports removed.
    :raises InputError: a document that is not there, or nothing would be left; nothing is changed.
    :raises DatastoreError: another process is changing the datastore, or the disk is full.
    """
    store, progress, wanted = as_datastore(store), progress or Silent(), list(documents)
    try:
        changed = changes.remove(store, wanted, purge=purge)
    except InputError:
        # They may be gone by the same call, which was killed before it came to the indexes.
        newest = Datastore.open(store.folder)
        if purge or changes.has_removed(newest, wanted):
            renew_indexes(newest, progress)
        raise
    renew_indexes(changed, progress)
    return Datastore.open(store.folder)


def compact(store: str | Path | Datastore, *, progress: Progress | None = None) -> Datastore:
    """Make one part of several small ones, leave out removed rows, and return the datastore; searches find the same.

    :raises DatastoreError: another process is changing the datastore, or the disk is full.
    :raises DatastoreCorrupt: a file that would be copied is damaged.
    """
    changed = changes.compact(as_datastore(store))
    renew_indexes(changed, progress or Silent())
    return Datastore.open(changed.folder)


def merge(
    stores: Sequence[str | Path | Datastore],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Datastore:
    """Make one datastore of several that have one frame (`build` with `frame`), in this order.

    Scores and fitted settings are those of the first; the layers that it has indexed are indexed.
    :raises DatastoreMismatch: the frames differ; names what differs.
    :raises DatastoreExists: `out` exists and must not be replaced.
    """
    opened, progress = [as_datastore(store) for store in stores], progress or Silent()
    with new_folder(out, overwrite=overwrite, inputs=[store.folder for store in opened]) as folder:
        renew_indexes(changes.merge(opened, folder), progress)
    return Datastore.open(out)

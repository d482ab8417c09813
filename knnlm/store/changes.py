"""Changes of a datastore's parts: documents removed, small parts made one, datastores merged. No model is needed.

Each change is one new generation: new parts are written beside the old ones, then the manifest takes its place, then
what it no longer lists is removed. Whoever has an older generation open keeps it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnlm.config import PART_ROWS
from knnlm.errors import DatastoreMismatch, InputError
from knnlm.files import write_json
from knnlm.places import PARTS, REPORTS
from knnlm.store.datastore import Datastore
from knnlm.store.document_table import PartDocuments, row_runs, rows_that_count
from knnlm.store.manifest import NAME, PartEntry, centre_file, unbuilt_indexes
from knnlm.store.model_place import relative_place
from knnlm.store.part import part_number
from knnlm.store.part_writer import LayerFrame, PartWriter

# A source, or a document of one: its name, and the document's number in it.
Named = str | tuple[str, int]


def remove(store: Datastore, documents: Iterable[Named], *, purge: bool = False) -> Datastore:
    """Remove documents, and return the datastore without them. Their rows stay in the files, unseen.

    :param documents: a name of a source stands for all its documents; (name, number) for one.
    :param purge: rewrite the parts concerned, so that no file holds text, tokens or keys of removed documents, those
        removed before included. Indexes and reports, which hold some too, are removed.
    :raises InputError: a document that is not there, or nothing would be left; nothing is changed.
    :raises DatastoreError: another process is changing the datastore, or the disk is full.
    """
    wanted = list(documents)
    with store.writing() as newest:
        entries = _without(newest, wanted, also_removed=purge)
        if purge:
            _purge(newest, entries)
        else:
            newest.commit_parts(entries, built=_still_built(newest, entries))
    return Datastore.open(store.folder)


def has_removed(store: Datastore, documents: Collection[Named]) -> bool:
    """Whether one of the documents, named as in `remove`, was removed, and its rows are still in the files."""
    for one in store.part_documents:
        gone = np.setdiff1d(np.arange(len(one.rows)), one.kept())
        if any(_is_wanted(pair, documents) for pair in _pairs(one, gone)):
            return True
    return False


def compact(store: Datastore, *, part_rows: int = PART_ROWS) -> Datastore:
    """Make one part of several small ones, leave out removed rows, and return the datastore; searches find the same.

    :param part_rows: keys up to which parts are joined.
    :raises DatastoreError: as `remove`. :raises DatastoreCorrupt: a file that would be copied is damaged.
    """
    with store.writing() as newest:
        groups = list(_groups(newest.manifest.parts, part_rows))
        if any(_is_rewritten(group) for group in groups):
            newest.commit_parts([_joined(newest, group) for group in groups if any(part.live for part in group)])
    return Datastore.open(store.folder)


def merge(stores: Sequence[Datastore], folder: Path) -> Datastore:
    """Put the parts of datastores with one frame into an empty folder, linked or copied, in this order.

    Scores and fitted settings are those of the first; its indexes are still to be built.
    :raises InputError: fewer than two datastores.
    :raises DatastoreMismatch: their frames differ; names what differs.
    """
    if len(stores) < 2:
        raise InputError("merging takes at least two datastores; give another")
    first = stores[0]
    for other in stores[1:]:
        _check_same_frame(first, other)
    entries: list[PartEntry] = []
    for store in stores:
        for part in store.manifest.parts:
            name = f"{len(entries):05d}-{part.name.split('-', 1)[1]}"
            _copy(store.folder / PARTS / part.name, folder / PARTS / name)
            entries.append(replace(part, name=name))
    for layer in first.layers:
        _copy(first.folder / centre_file(layer), folder / centre_file(layer))
    count = sum(part.live for part in entries)
    named = {**first.manifest.fingerprint, "model": relative_place(first.model, folder)}
    merged = replace(
        first.manifest,
        fingerprint=named,
        parts=tuple(entries),
        count=count,
        generation=1,
        corpus="",
        built=first.manifest.built_keys,
        indexes=unbuilt_indexes(first.manifest),
    )
    write_json(folder / NAME, merged.to_json())
    return Datastore.open(folder)


def _without(store: Datastore, wanted: Sequence[Named], *, also_removed: bool) -> list[PartEntry]:
    """The parts with these documents removed; some of them may be removed already if `also_removed`."""
    missing, entries = {*wanted}, []
    for one in store.part_documents:
        known = np.arange(len(one.rows)) if also_removed else one.kept()
        pairs = _pairs(one, known)
        gone = np.array([_is_wanted(pair, wanted) for pair in pairs], bool)
        missing -= {*(source for (source, _), out in zip(pairs, gone, strict=True) if out), *pairs}
        entries.append(_removing(one, known[gone]))
    if missing:
        name = sorted(missing, key=str)[0]
        what = f"source {name}" if isinstance(name, str) else f"document {name[1]} of {name[0]}"
        raise InputError(f"{store.folder} has no {what}; its sources are {', '.join(store.sources[:8])}")
    if not any(entry.live for entry in entries):
        raise InputError(f"nothing would be left of {store.folder}; remove its folder instead")
    return entries


def _pairs(one: PartDocuments, numbers_N: NDArray[np.int64]) -> list[tuple[str, int]]:
    """The source of each of these documents, and its number in it."""
    return [(one.part.sources[source], number) for source, number in one.rows[numbers_N, 2:4].tolist()]


def _is_wanted(pair: tuple[str, int], wanted: Collection[Named]) -> bool:
    return pair in wanted or pair[0] in wanted


def _removing(one: PartDocuments, numbers_N: NDArray[np.int64]) -> PartEntry:
    """A part's entry with further documents removed."""
    if not len(numbers_N):
        return one.entry
    is_gone_N = np.ones(len(one.rows) + 2, bool)
    is_gone_N[[0, -1]] = False
    is_gone_N[1 + one.kept()] = False
    is_gone_N[1 + numbers_N] = True
    edges = np.flatnonzero(np.diff(is_gone_N)).reshape(-1, 2)
    removed = tuple((int(first), int(last)) for first, last in edges)
    live = sum(last - first for first, last in row_runs(one.rows, removed, one.entry.rows))
    return replace(one.entry, removed=removed, live=live)


def _still_built(store: Datastore, entries: Sequence[PartEntry]) -> int:
    """Keys left of those that the frame was made with, after these removals."""
    live, built = store.live_rows, store.manifest.built_keys
    if not built:
        return 0
    end = built if live is None else int(live.stored(np.array([built - 1]))[0]) + 1
    left = [replace(one, entry=entry) for one, entry in zip(store.part_documents, entries, strict=True)]
    return int(rows_that_count(left).live(np.array([end]))[0])


def _purge(store: Datastore, entries: Sequence[PartEntry]) -> None:
    """Rewrite every part that has removed documents, and remove what else may hold them."""
    kept = [_joined(store, [entry]) for entry in entries if entry.live]
    # Reports first: once the documents are gone, the same command is refused, and would leave the reports.
    for name in REPORTS:
        (store.folder / name).unlink(missing_ok=True)
    store.commit_parts(kept, keep_indexes=False, built=_still_built(store, entries))


def _groups(parts: Sequence[PartEntry], part_rows: int) -> Iterator[list[PartEntry]]:
    """Neighbouring parts that make one part of at most `part_rows` keys; others alone."""
    group: list[PartEntry] = []
    for part in parts:
        if group and sum(one.live for one in group) + part.live > part_rows:
            yield group
            group = []
        group.append(part)
    yield group


def _is_rewritten(group: Sequence[PartEntry]) -> bool:
    return len(group) > 1 or bool(group[0].removed)


def _joined(store: Datastore, group: Sequence[PartEntry]) -> PartEntry:
    """One part with the documents of several that are not removed, in the same bytes."""
    if not _is_rewritten(group):
        return group[0]
    frames = {name: LayerFrame(name, one.dim, np.dtype(one.dtype)) for name, one in store.manifest.layers.items()}
    writer = PartWriter(store.folder, part_number(group[0].name), frames)
    try:
        for entry in group:
            _append(store, entry, writer)
        return writer.finish(store.manifest.frame)
    finally:
        writer.abort()


def _append(store: Datastore, entry: PartEntry, writer: PartWriter) -> None:
    """Append the documents of a part that are not removed; its files are checked first."""
    documents = replace(next(one for one in store.part_documents if one.entry.name == entry.name), entry=entry)
    values, keys = store.part_arrays(entry.name)
    ends = documents.ends()
    for number in documents.kept().tolist():
        first, token, source, place, start = documents.rows[number].tolist()
        writer.documents.add_or_continue(writer.rows, token, documents.part.sources[source], place, start)
        writer.append_values(values[first : ends[number]])
    for layer, rows_ND in keys.items():
        for first, last in documents.runs():
            writer.append_stored(layer, rows_ND[first:last])


def _check_same_frame(first: Datastore, other: Datastore) -> None:
    """Refuse to merge datastores whose vectors are not comparable as they are stored."""
    ours, theirs = first.manifest, other.manifest
    first.check_model(theirs.fingerprint)
    differing = [name for name in ("context", "stride", "layers") if getattr(ours, name) != getattr(theirs, name)]
    if differing or ours.frame != theirs.frame:
        what = ", ".join("layers, centres or scales" if name == "layers" else f"`{name}`" for name in differing)
        raise DatastoreMismatch(
            f"{first.folder} and {other.folder} differ in {what or 'their frame'}, so that their keys cannot be "
            "compared; build the second with the `frame` of the first"
        )


def _copy(source: Path, target: Path) -> None:
    """A second name for files that never change; a copy where the file system has no links, or it is another one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_or_copy)
    else:
        _link_or_copy(source, target)


def _link_or_copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)

"""Output paths: what knnlm made and may replace, and what is refused before any work.

A folder's files are knnlm's if its manifest lists them: `datastore.json` lists arrays and layers, `train.json` all
files of a model. A folder with any other file is kept as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from index.manifest import CENTRE_FILE, INDEX_FILE, LISTS_FILE
from index.manifest import MANIFEST as INDEX_MANIFEST
from knnlm.errors import DatastoreExists, InputError
from knnlm.json_text import loads
from knnlm.locks import BEING_WRITTEN, LOCK, holds_lock, is_at_work, take_lock
from knnlm.regular import open_regular

DATASTORE, TRAINED = "datastore.json", "train.json"
FORMATS = {DATASTORE: "knnlm-datastore", TRAINED: "knnlm-train"}
REPORTS = ("report.json", "report.html")
REPORT_FORMAT = "knnlm-report"
SCORES = ("score", "vectors")
HUB_PREFIX = "hf:"
"""Begins the name of a text or datastore on the Hugging Face hub."""
UNFINISHED = "unfinished.json"
"""Marks a datastore that is being made, or that is whole but for an index or report; names the work it is part of."""
UNFINISHED_FORMAT = "knnlm-unfinished"
FRAME, PARTS, PART = "frame", "parts", "part.json"
PART_NAME = r"[0-9]{5,}-[0-9a-f]{8}"
PART_FILES = (PART, "values.npy", "documents.npy")
INDEX_FILES = (INDEX_MANIFEST, INDEX_FILE, CENTRE_FILE, LISTS_FILE)
# The temporary name of a file or folder that a dead process was writing.
BEFORE_ITS_RENAME = re.compile(r"(^|/)\.([^/]+)\.partial-[0-9a-f]{8}(?=/|$)")
# A manifest takes some kB; a larger file is no manifest.
MANIFEST_BYTES = 1 << 28
SHOWN = 3


def refuse_existing(path: str | Path, *, overwrite: bool = False, manifest: str = DATASTORE, work: str = "") -> None:
    """Refuse an output path that is not free; with `overwrite`, only one with content that is not knnlm's.

    :param manifest: the manifest a folder must have to be replaced: a model never replaces a datastore, nor a datastore
        a model.
    :param work: as from `work_of`; an unfinished folder of the same work may always be replaced.
    :raises DatastoreExists: names the path, what it holds, and what to do.
    """
    target = Path(path).resolve()
    if is_free(target):
        return
    if not target.is_dir():
        raise DatastoreExists(f"{path} is a file; choose another `out`")
    if target.is_mount():
        raise DatastoreExists(f"{path} is a mount point, which cannot be replaced; choose a folder inside it as `out`")
    ours = files_of(target, manifest)
    others = foreign(target, ours or ())
    unfinished = bool(work) and read_work(target) == work
    if not (overwrite or unfinished):
        advice = ", or add `overwrite=True`" if ours is not None and not others else ""
        raise DatastoreExists(f"{path} exists and is not empty; choose another `out`{advice}")
    held = f"holds {', '.join(others[:SHOWN])}"
    if ours is None:
        kind = "datastore" if manifest == DATASTORE else "model that knnlm trained"
        raise DatastoreExists(
            f"{path} is no {kind} and is kept despite `overwrite=True`: it {held}; choose another `out`"
        )
    if others:
        raise DatastoreExists(f"{path} {held}, which knnlm did not make; move that, or choose another `out`")


def is_free(target: Path) -> bool:
    """Return whether there is nothing, or an empty folder."""
    return not target.exists() or (target.is_dir() and not target.is_mount() and not any(target.iterdir()))


def is_ours(folder: Path, manifest: str = DATASTORE) -> bool:
    """Return whether knnlm made all the content of the folder; only then may it be replaced."""
    ours = files_of(folder, manifest)
    return ours is not None and not foreign(folder, ours)


def files_of(folder: Path, manifest: str) -> frozenset[str] | None:
    """Return the files that a folder's manifest lists, with `/`; None if it has no such manifest or a damaged one."""
    document = read_object(folder / manifest)
    if document is None or document.get("format") != FORMATS[manifest]:
        return None
    try:
        names = set(_store_files(folder, document) if manifest == DATASTORE else document["files"])
    except (KeyError, TypeError, AttributeError):
        return None
    if (read_object(folder / REPORTS[0]) or {}).get("format") == REPORT_FORMAT and manifest == DATASTORE:
        names |= {*REPORTS}
    if read_work(folder) is not None:
        names |= {UNFINISHED}
    return frozenset({manifest, LOCK, BEING_WRITTEN} | {name for name in names if isinstance(name, str)})


def foreign(folder: Path, ours: frozenset[str] | tuple[()]) -> list[str]:
    """Return what a folder holds besides these files, hidden names last; a subfolder without any as one entry."""
    folders = {str(parent) for name in ours for parent in PurePosixPath(name).parents}
    found: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda one: (one.name.startswith("."), one.name)):
        name = BEFORE_ITS_RENAME.sub(r"\1\2", entry.name)
        if entry.is_dir(follow_symlinks=False) and name in folders:
            below = frozenset(one.removeprefix(f"{name}/") for one in ours if one.startswith(f"{name}/"))
            found += [f"{entry.name}/{other}" for other in foreign(Path(entry), below)]
        elif name not in ours or not entry.is_file(follow_symlinks=False):
            found.append(entry.name)
    return found


def remove_ours(folder: Path, manifest: str) -> None:
    """Remove the files that the manifest lists, the manifest last, and the folders left empty."""
    ours = files_of(folder, manifest) or frozenset()
    # The lock file after all others: without it a folder that a stop left behind would count as a user's.
    last = (folder / manifest, folder / LOCK)
    for parent, _, names in os.walk(folder, topdown=False):
        for path in (Path(parent, name) for name in names):
            if path not in last and BEFORE_ITS_RENAME.sub(r"\1\2", path.relative_to(folder).as_posix()) in ours:
                path.unlink()
        if Path(parent) == folder:
            for path in last:
                path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: it holds files of others
            os.rmdir(parent)


def remove_files(folder: Path, names: Sequence[str]) -> None:
    """Remove these files of a folder, and the folder if it holds nothing else. They need not exist."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not there, or not empty: it holds files of others
        folder.rmdir()


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is none."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MANIFEST_BYTES:
                return None
            document = loads(file.read().decode("utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def work_of(verb: str, model: str, *given: object) -> str:
    """Return a hash that identifies a piece of work, the same for the same command. Arguments count by their repr."""
    plain = [
        [str(one) for one in as_list(each)] if isinstance(each, str | Path | list | tuple) else each for each in given
    ]
    return hashlib.sha256(repr((verb, model, plain)).encode()).hexdigest()


def as_list(texts: Sequence[str | Path] | str | Path | None) -> list[str | Path]:
    """Return texts, one path or several, as a list."""
    return [] if texts is None else [texts] if isinstance(texts, str | Path) else list(texts)


def mark_unfinished(
    folder: Path, work: str, *, whole: bool = True, layers: Sequence[str] = (), scores: object = None
) -> None:
    """Mark a folder under construction, so that the same work goes on with what is there already.

    :param whole: it is a complete datastore, to be kept if later steps fail.
    :param layers: the layers that are stored.
    :param scores: their scores and the choice, in JSON; None: not known yet.
    """
    missing = "an index, fitted settings or a report" if whole else "further keys"
    document = {"format": UNFINISHED_FORMAT, "work": work, "whole": whole, "what": f"{missing} were to come"}
    text = json.dumps(document | {"layers": [*layers], "scores": scores}, indent=2) + "\n"
    temporary = folder / f".{UNFINISHED}.partial-{secrets.token_hex(4)}"
    with temporary.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / UNFINISHED)


def read_unfinished(folder: Path) -> dict[str, Any] | None:
    """Return what `mark_unfinished` wrote; None for any other folder."""
    document = read_object(folder / UNFINISHED)
    return document if document is not None and document.get("format") == UNFINISHED_FORMAT else None


def read_work(folder: Path) -> str | None:
    """Return the work that an unfinished datastore is part of; None for any other folder."""
    document = read_unfinished(folder)
    return None if document is None else str(document.get("work"))


def is_whole(folder: Path) -> bool:
    """Return whether an unfinished datastore has all its keys and values."""
    return (read_unfinished(folder) or {}).get("whole") is True


def has_parts(folder: Path) -> bool:
    """Return whether an unfinished datastore has parts with which the same work can go on."""
    return read_unfinished(folder) is not None and (folder / DATASTORE).is_file()


def take_up(place: Path, work: str) -> int | None:
    """Return the lock of what a dead run of the same work has left, to go on with it; None if there is no such thing.

    :param work: empty: never.
    """
    left = not place.is_symlink() and holds_lock(place) and _belongs_to(place, work)
    return take_lock(place) if left else None


def _belongs_to(folder: Path, work: str) -> bool:
    """Whether a folder is an unfinished datastore of this work; those of older versions never are."""
    document = read_unfinished(folder)
    return bool(work) and document is not None and document.get("work") == work and "layers" in document


def link_unfinished(target: Path, place: Path, work: str) -> None:
    """Go on with an unfinished datastore of the same work, which stays where it is: its files get second names."""
    if not _belongs_to(target, work):
        return
    try:
        for name in sorted((files_of(target, DATASTORE) or frozenset()) - {LOCK}):
            if (target / name).is_file():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(target / name, place / name, follow_symlinks=False)
    except OSError:  # a file system without links: all is made anew
        for name in (UNFINISHED, DATASTORE):
            (place / name).unlink(missing_ok=True)


def working_folder(target: Path) -> Path:
    """Return where the folder for `target` is built: one name for all runs, which only one of them can have."""
    return target.parent / f".{target.name}.partial"  # `with_name` refuses the root


def at_work(target: Path) -> DatastoreExists:
    """Return the error of a second run for the same place."""
    place = working_folder(target)
    return DatastoreExists(f"another run is writing {target} (in {place}); wait for it, or choose another `out`")


# Checks before any work


def refuse_inputs(path: str | Path, inputs: Sequence[str | Path], field: str = "out") -> None:
    """Refuse an output path that is, holds or lies in an input: the model, a text. Links are followed.

    :param inputs: files and folders; others, such as names on the hub, are ignored.
    :raises DatastoreExists: names both.
    """
    target = Path(path).resolve()
    if target.is_mount():  # refused in any case
        return
    for given in inputs:
        for read in _places(Path(given)):
            relation = _relation(target, read)
            if relation:
                raise DatastoreExists(f"`{field}` {path} {relation} {given}, which is read; choose another `{field}`")


def check_new_folder(
    path: str | Path,
    *,
    overwrite: bool = False,
    inputs: Sequence[str | Path] = (),
    manifest: str = DATASTORE,
    work: str = "",
) -> None:
    """Check before any work that a folder can be made here. Parameters as in `refuse_existing`, `refuse_inputs`.

    :raises DatastoreExists: the path is not free, or writing there would destroy an input.
    :raises InputError: the place cannot be written.
    """
    refuse_inputs(path, inputs)
    target = Path(path).resolve()
    if is_at_work(working_folder(target)):
        raise at_work(target)
    refuse_existing(path, overwrite=overwrite, manifest=manifest, work=work)
    _check_writable(Path(path), "out")


def check_new_file(
    path: str | Path, *, field: str = "out", overwrite: bool = False, inputs: Sequence[str | Path] = ()
) -> None:
    """Check before any work that a file can be written.

    :raises InputError: it exists already or cannot be written; names the field.
    :raises DatastoreExists: as `refuse_inputs`.
    """
    file = Path(path)
    if file.is_dir():
        raise InputError(f"`{field}` {file} is a folder; name a file in it")
    if file.is_symlink() and not file.exists():
        raise InputError(f"`{field}` {file} is a link to nothing, and would be replaced; choose another `{field}`")
    if file.exists() and not file.is_file():
        raise InputError(f"`{field}` {file} is no regular file, and would be replaced by one; choose another `{field}`")
    refuse_inputs(path, inputs, field)
    if file.exists() and not overwrite:
        raise InputError(f"`{field}` {file} exists; choose another `{field}`, or add `overwrite=True`")
    _check_writable(file, field)


def check_scores_file(path: str | Path, *, overwrite: bool, inputs: Sequence[str | Path] = ()) -> None:
    """Check a file for scores as `check_new_file` does.

    :raises InputError: as there, or `overwrite` would replace a file that holds no scores.
    """
    check_new_file(path, overwrite=overwrite, inputs=inputs)
    document = read_object(Path(path)) or {}
    if Path(path).exists() and not (document.get("format") == REPORT_FORMAT and document.get("kind") in SCORES):
        raise InputError(f"`out` {path} holds no scores of knnlm and is not replaced; choose another `out`")


def check_report_folder(path: str | Path) -> None:
    """Raise InputError, before any work, if the folder is not empty or cannot be written."""
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"`report` {folder} exists and is not an empty folder; choose another `report`")
    _check_writable(folder, "report")


def _check_writable(path: Path, field: str) -> None:
    there = next(parent for parent in path.resolve().parents if parent.exists())
    if not there.is_dir():
        raise InputError(f"`{field}` {path} cannot be made: {there} is a file; choose another `{field}`")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"`{field}` {path} cannot be made: {there} cannot be written; choose another `{field}`")


def _store_files(folder: Path, document: Mapping[str, Any]) -> Iterator[str]:
    layers = list(document["layers"])
    yield from (f"index/{place}/{name}" for place in _index_folders(folder, layers) for name in INDEX_FILES)
    if document.get("version") == 1:
        yield from _files_of_version_1(document)
        return
    yield from (f"{FRAME}/{layer}.npy" for layer in layers)
    # Those of a killed process too, which no manifest lists.
    for name in {*(one["name"] for one in document["parts"]), *_names_of_parts(folder)}:
        yield from (f"{PARTS}/{name}/{file}" for file in (*PART_FILES, *(f"keys/{layer}.npy" for layer in layers)))


def _index_folders(folder: Path, layers: Sequence[str]) -> Iterator[str]:
    """A layer's index is in a folder of its name, and after changes in one with the generation behind that."""
    yield from layers
    if (folder / "index").is_dir():
        names = (BEFORE_ITS_RENAME.sub(r"\1\2", path.name) for path in (folder / "index").iterdir())
        yield from (name for name in names if re.sub(r"~[0-9]+$", "", name) in layers)


def _names_of_parts(folder: Path) -> Iterator[str]:
    if (folder / PARTS).is_dir():
        names = (BEFORE_ITS_RENAME.sub(r"\1\2", path.name) for path in (folder / PARTS).iterdir())
        yield from (name for name in names if re.fullmatch(PART_NAME, name))


def _files_of_version_1(document: Mapping[str, Any]) -> Iterator[str]:
    """Files of a datastore that is no longer read, but may be replaced."""
    yield document["documents"]["file"]
    yield from (one["file"] for one in document["values"])
    for entry in document["layers"].values():
        yield entry["centre"]["file"]
        yield from (one["file"] for one in entry["shards"])


def _places(given: Path) -> Iterator[Path]:
    """The resolved path, and the targets of all links below it."""
    try:
        if not given.exists():
            return
    except OSError:  # not a path, such as a name that is too long
        return
    yield given.resolve()
    if given.is_dir():
        for parent, folders, names in os.walk(given):
            yield from (
                Path(parent, name).resolve()
                for name in (*folders, *names)
                if os.path.islink(os.path.join(parent, name))
            )


def _relation(target: Path, read: Path) -> str:
    if target == read or (target.exists() and read.exists() and target.samefile(read)):
        return "is"
    if target in read.parents:
        return "holds"
    return "lies in" if read in target.parents else ""

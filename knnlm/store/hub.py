"""Datastores on the Hugging Face hub, named `hf:USER/NAME` or `hf:USER/NAME@REVISION`: fetched and checked once.

On the hub a datastore is a data set: the files of its folder, and a card. They are fetched into the hub's own cache,
where revisions share the files that they have in common, and are read there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from index.errors import CorruptIndex
from index.saved import SavedIndex
from knnlm.errors import DatastoreCorrupt, DatastoreError, InputError, KNNLMError, first_line
from knnlm.places import DATASTORE, HUB_PREFIX
from knnlm.store.manifest import Manifest, read_manifest

REPO_TYPE = "dataset"
HUB_STORE = re.compile(rf"{HUB_PREFIX}(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
# A revision in the hub's cache, as huggingface_hub names it.
_CACHED = re.compile(r"/datasets--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


class Readable(Protocol):
    """The part of an opened datastore that a check of its files needs."""

    @property
    def manifest(self) -> Manifest:
        """The content of datastore.json."""

    def verify(self) -> tuple[str, ...]:
        """One line for each problem of a file."""

    def saved_index(self, layer: str) -> SavedIndex:
        """The layer's index; raises CorruptIndex."""


@dataclass(frozen=True)
class HubStore:
    """The parts of a name `hf:USER/NAME[@REVISION]`."""

    name: str
    repo: str
    revision: str | None
    """A branch, tag or commit; None: the newest."""


def parse_hub_store(name: str) -> HubStore:
    """Return the parts of `hf:USER/NAME[@REVISION]`. Raises InputError for another form."""
    match = HUB_STORE.fullmatch(name)
    if match is None:
        raise InputError(f"{name!r} is no datastore on the hub; write hf:USER/NAME or hf:USER/NAME@REVISION")
    return HubStore(name, match["repo"], match["revision"])


def on_disk(store: str | Path, look: Callable[[Path], Readable]) -> Path:
    """Return the folder of a datastore, fetched first if it is named `hf:USER/NAME[@REVISION]`.

    All checksums are compared before a fetched datastore is used for the first time; files that are damaged are fetched
    once more. Without a network, what was fetched before is used.

    :param look: opens a folder as `Datastore.look`.
    :raises InputError: a name that is none of the hub's.
    :raises DatastoreError: there is no such datastore, or it cannot be fetched.
    :raises DatastoreCorrupt: it is damaged on the hub.
    """
    if not str(store).startswith(HUB_PREFIX):
        return Path(store)
    hub = parse_hub_store(str(store))
    with told_of(hub.name):
        folder = _fetch(hub)
    mark = _mark_of(hub.repo, folder.name)
    if not _is_newest(mark, folder):
        _check(hub, folder, look)
        mark.touch()
    return folder


def hub_name(folder: Path) -> str | None:
    """Return `hf:USER/NAME@COMMIT` for a folder in the hub's cache; None for any other."""
    found = _CACHED.search(folder.resolve().as_posix())
    return found and f"{HUB_PREFIX}{found['repo'].replace('--', '/', 1)}@{found['commit'][:8]}"


def refuse_cached(folder: Path) -> None:
    """Refuse to change a datastore in the hub's cache, which stands for what is on the hub.

    :raises DatastoreError: names it, and what to do.
    """
    name = hub_name(folder)
    if name is not None:
        raise DatastoreError(f"{name} is a copy of what is on the hub, and is not changed; copy it (docs/share.md)")


@contextmanager
def told_of(name: str) -> Iterator[None]:
    """Raise errors of the hub's client as one line that names the datastore."""
    from huggingface_hub import errors  # half a second

    try:
        yield
    except KNNLMError:
        raise
    except errors.RepositoryNotFoundError as error:
        advice = "check the name, and log in (hf auth login) if it is private"
        raise DatastoreError(f"{name} is not on the hub, or not for everybody; {advice}") from error
    except errors.RevisionNotFoundError as error:
        raise DatastoreError(f"{name} is no revision on the hub; take a branch, tag or commit of it") from error
    except errors.LocalEntryNotFoundError as error:
        fact = f"{name} is not on this machine, and the hub was not reached"
        raise DatastoreError(f"{fact}; connect, or give a folder") from error
    except errors.EntryNotFoundError as error:
        fact = f"{name} is no datastore, or not all of it was sent: it has no {DATASTORE}"
        raise DatastoreError(f"{fact}; choose another, or push it again") from error
    except Exception as error:
        cause = f" ({first_line(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
        raise DatastoreError(f"{name}: the hub's client says: {first_line(error)}{cause}") from error


def _fetch(hub: HubStore) -> Path:
    """The folder in the hub's cache with all files of one commit, also if the revision moves on meanwhile."""
    from huggingface_hub import hf_hub_download, snapshot_download

    manifest = Path(hf_hub_download(hub.repo, DATASTORE, repo_type=REPO_TYPE, revision=hub.revision))
    with suppress(DatastoreCorrupt):  # which is checked, and fetched once more, with all others
        read_manifest(manifest.parent)
    return Path(snapshot_download(hub.repo, repo_type=REPO_TYPE, revision=manifest.parent.name))


def _check(hub: HubStore, folder: Path, look: Callable[[Path], Readable]) -> None:
    """Check all files, and once more after those with another content than on the hub were fetched anew."""
    if not _problems(folder, look):
        return
    with told_of(hub.name):
        _fetch_damaged(hub, folder)
    for problem in _problems(folder, look):
        fact = problem.partition(";")[0]
        raise DatastoreCorrupt(f"{hub.name} is damaged: {fact}; try again, or take another revision")


def _problems(folder: Path, look: Callable[[Path], Readable]) -> list[str]:
    try:
        store = look(folder)
    except DatastoreCorrupt as error:
        return [str(error)]
    problems = list(store.verify())
    for layer in store.manifest.built_indexes:
        try:
            store.saved_index(layer).check_files()
        except CorruptIndex as error:
            problems.append(str(error))
    return problems


def _fetch_damaged(hub: HubStore, folder: Path) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    found = HfApi().verify_repo_checksums(hub.repo, repo_type=REPO_TYPE, revision=folder.name)
    for name in (*(one["path"] for one in found.mismatches), *found.missing_paths):
        hf_hub_download(hub.repo, name, repo_type=REPO_TYPE, revision=folder.name, force_download=True)


def _mark_of(repo: str, commit: str) -> Path:
    """A file beside the hub's cache that is as old as the last check of a fetched commit."""
    from huggingface_hub import cached_assets_path

    return cached_assets_path("knnlm", namespace=repo, subfolder="checked") / commit


def _is_newest(mark: Path, folder: Path) -> bool:
    """Whether no file was fetched after the mark was made."""
    return mark.exists() and all(path.stat().st_mtime_ns <= mark.stat().st_mtime_ns for path in folder.rglob("*"))

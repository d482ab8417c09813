"""Sending a datastore to the Hugging Face hub: part by part, the manifest last.

Files under new names become visible with their part, which harms no reader: the manifest on the hub does not list them.
What replaces or removes a file there waits for the last commit, which is the manifest's. Until then the hub has the old
datastore, or none. A push that was stopped and is given again sends what is not there yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from knnlm.errors import DatastoreError, DatastoreExists, InputError
from knnlm.places import DATASTORE, HUB_PREFIX, SHOWN, files_of
from knnlm.store.hub import REPO_TYPE, HubStore, parse_hub_store, told_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

CARD = "README.md"
HUBS_OWN = (CARD, ".gitattributes")
# The hub takes some 100 commits an hour, and gives up on one with thousands of files.
PART_FILES, PART_BYTES = 100, 1 << 32
RESUMED = "what was sent stays on the hub: the same push goes on from there"


@dataclass(frozen=True)
class _There:
    """What the hub has."""

    commit: str
    files: Mapping[str, str | None]
    """SHA-256 of each file; None for small text, of which the hub's client itself finds what has not changed."""
    listed: frozenset[str]
    """Files of the datastore that it has."""

    def has(self, one: CommitOperationAdd) -> bool:
        known = self.files.get(one.path_in_repo)
        return known is not None and known == one.upload_info.sha256.hex()


def check_target(name: str) -> HubStore:
    """Return the parts of the name under which a datastore is to be sent, before any work.

    :raises InputError: it has another form or a revision, or there is no token of the hub.
    """
    from huggingface_hub import get_token  # half a second

    hub = parse_hub_store(name)
    if hub.revision is not None:
        raise InputError(f"{name} names a revision, but the newest is sent; write {HUB_PREFIX}{hub.repo}")
    if get_token() is None:
        raise InputError(
            "there is no token of the hub; log in (hf auth login), or set HF_TOKEN, with the right to write"
        )
    return hub


def check_license(license: str, card: str, target: HubStore) -> None:
    """Ask the hub whether it takes a card with this licence.

    :raises InputError: it does not.
    """
    from huggingface_hub import DatasetCard

    with told_of(target.name):
        try:
            DatasetCard(card).validate()
        except ValueError as error:
            advice = "take a name that it knows, such as cc-by-4.0, or other"
            raise InputError(f"`license` is {license!r}, which the hub does not take; {advice}") from error


def upload(
    folder: Path, names: Collection[str], manifest: bytes, card: str, target: HubStore, *, private: bool = False
) -> str:
    """Send files of a folder and a card; return the name of the commit, `hf:USER/NAME@COMMIT`.

    :param names: files, with `/`; the manifest among them.
    :param manifest: what the manifest held when the files were checked.
    :param private: if there is nothing of that name yet, make it private.
    :raises DatastoreExists: there is something else under that name.
    :raises DatastoreError: the hub refuses, or the folder or what is on the hub was changed meanwhile.
    """
    with told_of(target.name):
        there = _look(target, private=private)
    _refuse_others(target, there, names)
    try:
        with told_of(target.name):
            return _send(folder, names, manifest, card, target, there)
    except BaseException as stopped:
        stopped.add_note(RESUMED)
        raise


def _look(target: HubStore, *, private: bool) -> _There:
    """What is there under that name, which is made if it is new."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.hf_api import RepoFile

    api, repo = HfApi(), target.repo
    api.create_repo(repo, repo_type=REPO_TYPE, private=private or None, exist_ok=True)
    commit = str(api.repo_info(repo, repo_type=REPO_TYPE).sha)
    tree = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=REPO_TYPE)
    files = {one.path: one.lfs.sha256 if one.lfs else None for one in tree if isinstance(one, RepoFile)}
    listed: frozenset[str] | None = None
    if DATASTORE in files:
        manifest = Path(hf_hub_download(repo, DATASTORE, repo_type=REPO_TYPE, revision=commit))
        listed = files_of(manifest.parent, DATASTORE)
    return _There(commit, files, listed or frozenset())


def _refuse_others(target: HubStore, there: _There, names: Collection[str]) -> None:
    """Files beside a datastore are let be; a data set that is none gets none."""
    others = sorted(there.files.keys() - {*HUBS_OWN, *names})
    if others and not there.listed:
        held = ", ".join(others[:SHOWN])
        raise DatastoreExists(f"{target.name} is no datastore, and holds {held}; choose another name, or remove that")


def _send(folder: Path, names: Collection[str], manifest: bytes, card: str, target: HubStore, there: _There) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, head = HfApi(), there.commit
    last: list[CommitOperationAdd | CommitOperationDelete] = []
    for part in _parts([CommitOperationAdd(name, folder / name) for name in sorted({*names} - {DATASTORE})]):
        wanted = [one for one in part if not there.has(one)]
        added = [one for one in wanted if one.path_in_repo not in there.files]
        changed = [one for one in wanted if one.path_in_repo in there.files]
        if added:
            head = _commit(api, target, added, head, f"{len(added)} files of a datastore")
        if changed:
            api.preupload_lfs_files(target.repo, changed, repo_type=REPO_TYPE, free_memory=False)
        last += changed
    last += [CommitOperationAdd(DATASTORE, manifest), CommitOperationAdd(CARD, card.encode())]
    last += [CommitOperationDelete(name) for name in sorted(there.listed & there.files.keys() - {*names})]
    if (folder / DATASTORE).read_bytes() != manifest:
        raise DatastoreError(f"{folder} was changed while it was sent; push it again")
    return f"{HUB_PREFIX}{target.repo}@{_commit(api, target, last, head, 'a datastore')}"


def _commit(
    api: HfApi,
    target: HubStore,
    operations: Sequence[CommitOperationAdd | CommitOperationDelete],
    head: str,
    title: str,
) -> str:
    """Send what of it is not there, and name it in a commit on top of `head`; return the commit."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        done = api.create_commit(target.repo, operations, repo_type=REPO_TYPE, commit_message=title, parent_commit=head)
    except HfHubHTTPError as error:
        if error.response.status_code == 412:  # another commit is on top
            raise DatastoreError(f"{target.name} was changed on the hub meanwhile; push again") from error
        raise
    return str(done.oid)


def _parts(files: Sequence[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    """Files of one commit each: at most so many, and so many bytes unless a single file has more."""
    part: list[CommitOperationAdd] = []
    for one in files:
        if part and (len(part) == PART_FILES or sum(a.upload_info.size for a in [*part, one]) > PART_BYTES):
            yield part
            part = []
        part.append(one)
    yield part

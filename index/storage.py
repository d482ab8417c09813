"""An index on disk: a folder that appears at once and whole, with index.json written last; open it, verify it.

The keys are not in it: they stay in their source, and a fingerprint tells whether it is the same one.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from index.approximate import CENTRE_FILE, INDEX_FILE, ApproximateIndex
from index.base import VectorIndex
from index.errors import CorruptIndex, IndexExists
from index.exact import ExactIndex
from index.faiss_index import VERSION, read_index
from index.metric import Metric
from index.recall import Recall
from index.source import VectorSource

MANIFEST = "index.json"
FORMAT = "vector-index-1"
# Keys whose bytes tell one source from another of the same size, such as another layer of the same text.
FINGERPRINT_ROWS = 64


@dataclass(frozen=True)
class SavedFile:
    """One file of an index."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class IndexManifest:
    """What index.json says."""

    format: str
    spec: str
    """`exact` or a FAISS factory string."""
    metric: str
    dim: int
    count: int
    parameters: Mapping[str, float]
    """As tuned: `nprobe` or `efSearch`, and `overfetch`."""
    recall: Recall | None
    """As measured after the build; None: not measured."""
    keys: str
    """sha256 of some keys spread over the source."""
    files: Mapping[str, SavedFile]
    faiss: str
    """Version that wrote it."""


def save_index(index: VectorIndex, folder: str | Path, *, recall: Recall | None = None) -> IndexManifest:
    """Write an index to a new folder; on any failure, Ctrl-C included, nothing of it is left.

    :raises IndexExists: there is something already.
    :raises OSError: the disk is full or read-only.
    """
    target = Path(folder)
    if target.exists():
        raise IndexExists(f"{target} is there already; choose another folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        manifest = _write_files(index, temporary, recall)
        _write_manifest(manifest, temporary)
        # rename() would silently take the place of an empty folder that came meanwhile; it is as good as none.
        temporary.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def open_index(folder: str | Path, source: VectorSource, *, metric: Metric | None = None) -> VectorIndex:
    """Open a saved index over its keys, with the search parameters that it was tuned to.

    :param metric: refuse an index of another one; None: take the index's.
    :raises CorruptIndex: a file is missing or short, or the index is of other keys; the message names what differs.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _compare(folder, "metric", manifest.metric, str(metric or manifest.metric))
    _compare(folder, "dimension", manifest.dim, source.dim)
    _compare(folder, "number of keys", manifest.count, len(source))
    _compare(folder, "fingerprint of keys", manifest.keys, fingerprint(source))
    _check_sizes(folder, manifest)
    if manifest.spec == "exact":
        return ExactIndex(source, Metric(manifest.metric))
    return _open_approximate(folder, manifest, source)


def verify(folder: str | Path) -> IndexManifest:
    """Read every byte of a saved index and compare its checksums.

    :raises CorruptIndex: names the file that is missing, short or changed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_sizes(folder, manifest)
    for name, saved in manifest.files.items():
        if _sha256(folder / name) != saved.sha256:
            raise CorruptIndex(f"{folder / name} was changed after it was written; build the index again")
    return manifest


def read_manifest(folder: str | Path) -> IndexManifest:
    """What index.json says of a saved index, without loading it.

    :raises CorruptIndex: it is missing or unreadable.
    """
    path = Path(folder) / MANIFEST
    try:
        return _manifest_from(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CorruptIndex(f"{folder} holds no {MANIFEST}, so it is no index or was never finished; build it") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptIndex(f"{path} cannot be read ({error}); build the index again") from None


def fingerprint(source: VectorSource) -> str:
    """sha256 of up to 64 keys spread evenly over the source, as float32."""
    rows = min(len(source), FINGERPRINT_ROWS)
    ids = np.arange(rows, dtype=np.int64) * (max(0, len(source) - 1)) // max(1, rows - 1)
    return hashlib.sha256(source.take(ids).astype("<f4").tobytes()).hexdigest()


def _write_files(index: VectorIndex, folder: Path, recall: Recall | None) -> IndexManifest:
    names = index.save(folder)
    for name in names:
        _sync(folder / name)
    return IndexManifest(
        format=FORMAT,
        spec=index.spec,
        metric=index.metric.value,
        dim=index.dim,
        count=len(index),
        parameters=dict(index.parameters),
        recall=recall,
        keys=fingerprint(index.source),
        files={name: SavedFile((folder / name).stat().st_size, _sha256(folder / name)) for name in names},
        faiss=VERSION,
    )


def _write_manifest(manifest: IndexManifest, folder: Path) -> None:
    text = json.dumps(asdict(manifest), indent=2, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _manifest_from(fields: dict[str, Any]) -> IndexManifest:
    if fields["format"] != FORMAT:
        raise ValueError(f"its format is {fields['format']!r}, but this version reads {FORMAT!r}")
    recall = fields["recall"]
    files = {name: SavedFile(**saved) for name, saved in fields["files"].items()}
    if any(Path(name).name != name for name in files):
        raise ValueError("it names a file outside its folder")
    Metric(fields["metric"])
    return IndexManifest(**(fields | {"recall": Recall(**recall) if recall else None, "files": files}))


def _open_approximate(folder: Path, manifest: IndexManifest, source: VectorSource) -> ApproximateIndex:
    native = read_index(folder / INDEX_FILE)
    _compare(folder / INDEX_FILE, "dimension", native.dim, manifest.dim)
    _compare(folder / INDEX_FILE, "number of keys", len(native), manifest.count)
    _compare(folder / INDEX_FILE, "metric", native.metric.value, manifest.metric)
    parameters = dict(manifest.parameters)
    overfetch = parameters.pop("overfetch")
    for name, value in parameters.items():
        native.set_effort(name, int(value))
    return ApproximateIndex(
        source,
        Metric(manifest.metric),
        spec=manifest.spec,
        native=native,
        centre_D=_read_centre(folder / CENTRE_FILE, manifest.dim),
        overfetch=overfetch,
    )


def _read_centre(path: Path, dim: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    try:
        centre_D: np.ndarray[tuple[int], np.dtype[np.float32]] = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise CorruptIndex(f"{path} is no array ({error}); build the index again") from None
    _compare(path, "shape", (centre_D.dtype.str, *centre_D.shape), ("<f4", dim))
    return centre_D


def _compare(path: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise CorruptIndex(f"{path}: its {what} is {found}, but {expected} is wanted; build the index again")


def _check_sizes(folder: Path, manifest: IndexManifest) -> None:
    for name, saved in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise CorruptIndex(f"{folder / name} is missing; build the index again") from None
        _compare(folder / name, "size in bytes", size, saved.bytes)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Indexes on disk: folders that are written atomically, with index.json last, and opened and verified.

The keys are not stored: they stay in their source, which a fingerprint identifies.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path

from index.approximate import ApproximateIndex
from index.base import VectorIndex
from index.covered import Cover, CoveredIndex
from index.errors import CorruptIndex, FaissFailed, IndexExists, UnknownSpec
from index.exact import ExactIndex
from index.faiss_index import VERSION, create_index, read_index
from index.manifest import FORMAT, INDEX_FILE, LISTS_FILE, MANIFEST, IndexManifest, Recall, SavedFile
from index.metric import Metric
from index.saved import SavedIndex, fingerprint
from index.source import VectorSource


def save_index(index: VectorIndex, folder: str | Path, *, recall: Recall | None = None) -> IndexManifest:
    """Write an index to a new folder; on any failure, Ctrl-C included, nothing is left.

    :raises IndexExists: the path exists already.
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
        # rename() silently replaces an empty folder that was made meanwhile, which does no harm.
        temporary.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def open_index(saved: str | Path | SavedIndex, source: VectorSource, *, metric: Metric | None = None) -> VectorIndex:
    """Open a saved index over its keys, with its tuned search parameters.

    Checksums are verified before files are loaded: no damaged index is ever searched.

    :param saved: its folder, or the result of `SavedIndex.open`.
    :param metric: refuse an index of another metric; None: accept the index's.
    :raises CorruptIndex: a file is missing, short or changed, or the index is of other keys; names what differs.
    """
    saved = saved if isinstance(saved, SavedIndex) else SavedIndex.open(saved)
    saved.check_source(source, metric)
    saved.check_files()
    if saved.manifest.is_exact:
        return ExactIndex(source, Metric(saved.manifest.metric))
    return _open_approximate(saved, source)


def open_covered(saved: SavedIndex, source: VectorSource, cover: Cover) -> CoveredIndex:
    """Open a saved index over keys that have changed since it was built.

    :param cover: which of its keys are which rows of the source.
    :raises CorruptIndex: a file was changed, or the index is of other keys.
    """
    saved.check_files()
    saved.compare(saved.folder, "dimension", saved.manifest.dim, source.dim)
    saved.compare(saved.folder, "number of keys", saved.manifest.count, cover.indexed)
    return CoveredIndex(source, Metric(saved.manifest.metric), _open_approximate(saved, source), cover)


def verify(folder: str | Path) -> IndexManifest:
    """Read every byte of a saved index and verify its checksums.

    :raises CorruptIndex: names the file that is missing, short or changed.
    """
    saved = SavedIndex.open(folder)
    saved.check_files()
    return saved.manifest


def read_manifest(folder: str | Path) -> IndexManifest:
    """Return the manifest of a saved index, without loading the index.

    :raises CorruptIndex: it is missing, unreadable or changed.
    """
    return SavedIndex.open(folder, with_files=False).manifest


def _write_files(index: VectorIndex, folder: Path, recall: Recall | None) -> IndexManifest:
    names = index.save(folder)
    for name in names:
        _sync(folder / name)
    return IndexManifest(
        format=FORMAT,
        spec=index.spec,
        metric=index.metric.value,
        dim=index.dim,
        count=index.indexed,
        parameters=dict(index.parameters),
        recall=recall,
        keys=fingerprint(index.source),
        files={name: SavedFile((folder / name).stat().st_size, _sha256(folder / name)) for name in names},
        faiss=VERSION,
    )


def _write_manifest(manifest: IndexManifest, folder: Path) -> None:
    text = json.dumps(manifest.to_json(), indent=2, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _open_approximate(saved: SavedIndex, source: VectorSource) -> ApproximateIndex:
    manifest, path = saved.manifest, saved.folder / INDEX_FILE
    native = read_index(saved.files[INDEX_FILE], path)
    saved.compare(path, "dimension", native.dim, manifest.dim)
    saved.compare(path, "number of keys", len(native), manifest.count)
    saved.compare(path, "metric", native.metric.value, manifest.metric)
    parameters = dict(manifest.parameters)
    overfetch = parameters.pop("overfetch")
    try:
        wanted = create_index(manifest.spec, manifest.dim, Metric(manifest.metric))
        saved.compare(path, "kind", native.kind, wanted.kind)
        for name, value in parameters.items():
            native.set_effort(name, int(value))
    except (UnknownSpec, FaissFailed) as error:
        raise CorruptIndex(f"{saved.folder / MANIFEST} does not fit ({error}); build the index again") from None
    native.use_lists(saved.files.get(LISTS_FILE), saved.folder / LISTS_FILE)
    return ApproximateIndex(
        source,
        Metric(manifest.metric),
        spec=manifest.spec,
        native=native,
        centre_D=saved.centre(),
        overfetch=overfetch,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

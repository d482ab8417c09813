"""datastore.json as frozen values, and back: what a datastore holds, counted and checksummed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from knnlm.errors import DatastoreCorrupt, DatastoreError
from knnlm.files import old_folder

NAME = "datastore.json"
FORMAT = "knnlm-datastore"
VERSION = 1
KEY_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Shard:
    """One .npy file: its place in the datastore (with `/`), its rows, the SHA-256 of its data without the header."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class LayerKeys:
    """The keys of one layer: stored = (vector - centre) / scale."""

    dim: int
    dtype: str
    scale: float
    centre: Shard
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What a datastore holds. `values` and every layer's shards have `count` rows each."""

    fingerprint: Mapping[str, str]
    """Of the model: its name, and hashes of its config, weights and tokenizer."""
    layers: Mapping[str, LayerKeys]
    count: int
    values: tuple[Shard, ...]
    documents: Shard
    sources: tuple[str, ...]
    """Names of the texts; the third column of documents.npy counts in here."""
    context: int
    """Tokens of the windows through which the model saw the text, and the new ones of each further window."""
    stride: int
    corpus: str
    """Fingerprint of the text as tokens."""
    scores: Any = None
    """The layers' scores and the choice, as the builder gave them."""
    fitted: Any = None
    """k, lambda and temperature, once an evaluation has fitted them."""
    indexes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """For each indexed layer: metric, spec, measured recall."""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The name or folder that the model was loaded from."""
        return self.fingerprint.get("model", "")

    def index_metric(self, layer: str) -> str:
        """The metric, `l2`, `cosine` or `ip`, for which the layer's index was built.

        :raises DatastoreError: the layer has no finished index.
        """
        if "metric" not in self.indexes.get(layer, {}):
            raise DatastoreError(
                f"the datastore has no finished index of layer {layer}; build it again, or take `index='exact'`"
            )
        return str(self.indexes[layer]["metric"])

    def shards(self) -> tuple[Shard, ...]:
        """Every file of the datastore but the manifest and the indexes."""
        keys = [shard for layer in self.layers.values() for shard in (layer.centre, *layer.shards)]
        return (*self.values, self.documents, *keys)

    def to_json(self) -> dict[str, Any]:
        """As the object of datastore.json."""
        return {"format": FORMAT, "version": VERSION} | asdict(self)


def read_manifest(folder: Path) -> Manifest:
    """Read datastore.json.

    :raises DatastoreError: the folder is no datastore, or was made by a newer knnlm.
    :raises DatastoreCorrupt: the manifest is damaged; says where.
    """
    path = folder / NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DatastoreError(f"{folder} is not a datastore: it has no {NAME}; {_remedy(folder)}") from None
    except (OSError, ValueError) as error:
        raise DatastoreCorrupt(f"{path} cannot be read ({error}); build the datastore again") from None
    return from_json(document, path)


def _remedy(folder: Path) -> str:
    old = old_folder(folder.resolve())
    if (old / NAME).is_file():
        return f"a run that was to replace it was killed, and what was there is in {old}: rename that"
    return "make one with `knnlm.build`"


def from_json(document: object, path: Path) -> Manifest:
    """The manifest that `Manifest.to_json` wrote; `path` is named in errors. Raises as `read_manifest`."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DatastoreError(f"{path} is not the manifest of a datastore; choose another folder")
    version = document.get("version")
    if version != VERSION:
        newer = (
            "was made by a newer knnlm" if isinstance(version, int) and version > VERSION else "is of an unknown format"
        )
        raise DatastoreError(
            f"{path} {newer} (format {version!r}, this one reads {VERSION}); upgrade knnlm, or build it again"
        )
    try:
        manifest = _build(document)
        _check(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DatastoreCorrupt(f"{path} is damaged ({problem}); build the datastore again") from None
    return manifest


def _build(document: Mapping[str, Any]) -> Manifest:
    return Manifest(
        fingerprint={str(key): str(value) for key, value in document["fingerprint"].items()},
        layers={str(name): _layer(layer) for name, layer in document["layers"].items()},
        count=int(document["count"]),
        values=_shards(document["values"]),
        documents=_shard(document["documents"]),
        sources=tuple(str(name) for name in document["sources"]),
        context=int(document["context"]),
        stride=int(document["stride"]),
        corpus=str(document["corpus"]),
        scores=document["scores"],
        fitted=document["fitted"],
        indexes=dict(document["indexes"]),
        versions=dict(document["versions"]),
    )


def _layer(entry: Mapping[str, Any]) -> LayerKeys:
    return LayerKeys(
        int(entry["dim"]), str(entry["dtype"]), float(entry["scale"]), _shard(entry["centre"]), _shards(entry["shards"])
    )


def _shards(entries: Sequence[Mapping[str, Any]]) -> tuple[Shard, ...]:
    return tuple(_shard(entry) for entry in entries)


def _shard(entry: Mapping[str, Any]) -> Shard:
    return Shard(str(entry["file"]), int(entry["rows"]), str(entry["sha256"]))


def _check(manifest: Manifest) -> None:
    """A manifest may come from somebody else: no path may lead out of the folder, and the counts must agree."""
    names = [*manifest.layers, *(shard.file for shard in manifest.shards())]
    for name in names:
        if not name or PurePosixPath(name).is_absolute() or {"..", "."} & set(name.split("/")) or "\\" in name:
            raise ValueError(f"{name!r} is no name inside a datastore")
    for layer, keys in manifest.layers.items():
        if "/" in layer or keys.dtype not in KEY_DTYPES or keys.dim < 1 or not 0 < keys.scale < float("inf"):
            raise ValueError(f"layer {layer!r} of {keys.dtype} [{keys.dim}] with scale {keys.scale}")
        _check_rows(f"the keys of {layer}", keys.shards, manifest.count)
    _check_rows("the values", manifest.values, manifest.count)


def _check_rows(what: str, shards: Sequence[Shard], count: int) -> None:
    rows = sum(shard.rows for shard in shards)
    if rows != count or any(shard.rows < 1 for shard in shards):
        raise ValueError(f"{what} have {rows} rows, the datastore has {count}")

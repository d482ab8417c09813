"""datastore.json as frozen dataclasses: the content of a datastore, with counts and checksums.

The dataclasses define the document and the ranges of its fields; reading, writing and verifying all use these checks.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from index.mapped import OpenFolder
from index.typed import CHECKSUM, Misfit, build, check_seal, demand, is_sha256, parse, sealed, shown
from knnlm.config import METRICS
from knnlm.documents import plain, score_from_document
from knnlm.errors import DatastoreCorrupt, DatastoreError, InputError
from knnlm.files import old_folder
from knnlm.places import DATASTORE, FORMATS, FRAME, PART_NAME
from knnlm.store.part import Shard, read_any_part

NAME = DATASTORE
FORMAT = FORMATS[DATASTORE]
VERSION = 2
KEY_DTYPES = ("float16", "float32")
# Two models with these hashes in common give the same vectors. The name may differ: folders move.
MODEL_PARTS = ("config", "weights", "tokenizer")
# Of a fitted gate: far more than any fit, and without overflow.
LARGEST_LOGIT = 1e6


@dataclass(frozen=True)
class LayerKeys:
    """How the keys of one layer are stored, in all parts: (vector - centre) / scale."""

    dim: int
    dtype: str
    scale: float
    centre: Shard

    def __post_init__(self) -> None:
        demand(self.dtype in KEY_DTYPES, f"dtype is {shown(self.dtype)}, but must be one of {', '.join(KEY_DTYPES)}")
        demand(self.dim >= 1, f"dim is {self.dim}, but must be at least 1")
        demand(self.centre.rows == self.dim, f"the centre has {self.centre.rows} numbers, but dim is {self.dim}")
        demand(_is_scale(self.scale, self.dtype), f"scale is {self.scale}, but must be 1, or of float16 a power of two")


@dataclass(frozen=True)
class PartEntry:
    """A part as the manifest lists it; the rest is in its part.json."""

    name: str
    checksum: str
    """That of its part.json."""
    rows: int
    """Rows that are stored."""
    live: int
    """Rows of documents that are not removed."""
    removed: tuple[tuple[int, int], ...] = ()
    """Runs of removed documents: the first one's number in the part, and the number after the last one's."""

    def __post_init__(self) -> None:
        demand(bool(re.fullmatch(PART_NAME, self.name)), f"{shown(self.name)} is no name of a part")
        demand(is_sha256(self.checksum), f"checksum is {shown(self.checksum)}, which is no SHA-256")
        demand(0 <= self.live <= self.rows, f"live is {self.live} of {self.rows} rows")
        demand(bool(self.removed) or self.live == self.rows, f"live is {self.live} of {self.rows}, none is removed")
        check_runs(self.removed)


@dataclass(frozen=True)
class IndexedPart:
    """A part as it was when an index was built over it."""

    name: str
    rows: int
    """Rows that counted then."""
    removed: tuple[tuple[int, int], ...] = ()
    """Runs of documents that were removed then."""

    def __post_init__(self) -> None:
        demand(bool(re.fullmatch(PART_NAME, self.name)), f"{shown(self.name)} is no name of a part")
        demand(self.rows >= 0, f"rows is {self.rows}, but must be at least 0")
        check_runs(self.removed)


def check_runs(removed: tuple[tuple[int, int], ...]) -> None:
    """Raise Misfit unless runs of removed documents ascend."""
    ends = [0, *itertools.chain.from_iterable(removed)]
    demand(ends == sorted(ends) and all(a < b for a, b in removed), "removed is not in order")


@dataclass(frozen=True)
class IndexEntry:
    """Summary of a layer's index, which has a manifest of its own."""

    metric: str
    spec: str
    recall: float
    k: int
    folder: str = ""
    """Its folder in `index/`; empty: the layer's name."""
    parts: tuple[IndexedPart, ...] | None = None
    """What it was built over, where parts or removals have changed since; None: the rows that count; none: it is still
    to be trained and built."""

    def __post_init__(self) -> None:
        demand(not self.folder or ("/" not in self.folder and _is_inside(self.folder)), "folder is no name")
        demand(self.metric in METRICS, f"metric is {shown(self.metric)}, but must be one of {', '.join(METRICS)}")
        demand(bool(self.spec), "spec is empty")
        demand(0 <= self.recall <= 1, f"recall is {self.recall}, but is a share from 0 to 1")
        demand(self.k >= 1, f"k is {self.k}, but must be at least 1")


@dataclass(frozen=True)
class FittedGate:
    """How lambda depends on the query (knnlm.knn.mixing.Gate)."""

    offset: float
    distance: float
    different: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            demand(
                abs(value) <= LARGEST_LOGIT, f"{name} is {value}, but a logit of lambda is at most {LARGEST_LOGIT:g}"
            )


@dataclass(frozen=True)
class FittedLayer:
    """Settings that an evaluation fitted for a layer."""

    k: int
    temperature: float
    lam: float = field(metadata={"name": "lambda"})
    gate: FittedGate | None = None

    def __post_init__(self) -> None:
        demand(self.k >= 1, f"k is {self.k}, but must be at least 1")
        demand(self.temperature > 0, f"temperature is {self.temperature}, but must be above 0")
        demand(0 <= self.lam <= 1, f"lambda is {self.lam}, but is a weight from 0 to 1")


@dataclass(frozen=True)
class BuiltWith:
    """The settings stored with the scores that are read again."""

    layers: str | None = None
    index: str = "auto"
    metric: str = METRICS[0]

    def __post_init__(self) -> None:
        demand(self.metric in METRICS, f"metric is {shown(self.metric)}, but must be one of {', '.join(METRICS)}")


@dataclass(frozen=True)
class Manifest:
    """The content of a datastore: the frame (fingerprint, layers, context, stride), and the parts made with it."""

    fingerprint: Mapping[str, str]
    """The model's name, and hashes of its config, weights and tokenizer."""
    layers: Mapping[str, LayerKeys]
    count: int
    """Keys of each layer, without removed ones."""
    parts: tuple[PartEntry, ...]
    context: int
    """Tokens of a window."""
    stride: int
    """New tokens in each window after the first."""
    generation: int = 1
    """Rises with every change; 0 while the first parts are made."""
    corpus: str = ""
    """Fingerprint of the text's tokens; empty once documents were added or removed."""
    built: int | None = None
    """Keys that count of those that the frame was made with, which come first; None: all."""
    scores: Any = None
    """The layers' scores and the choice, as `knnlm.documents.score_document` returns them."""
    fitted: Any = None
    """For each layer, k, lambda and temperature once an evaluation has fitted them: `FittedLayer` in JSON."""
    indexes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """For each indexed layer, metric, spec and measured recall at k: `IndexEntry` in JSON."""
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """:raises InputError: a value that no datastore can have."""
        for name in ("fingerprint", "scores", "fitted", "indexes", "versions"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        try:
            _check_counts(self)
            _check_layers(self)
            _check_scores(self.scores)
        except Misfit as error:
            raise InputError(str(error)) from None

    @property
    def model(self) -> str:
        """The name or folder that the model was loaded from."""
        return self.fingerprint.get("model", "")

    def index_metric(self, layer: str) -> str:
        """Return the metric, `l2`, `cosine` or `ip`, for which the layer's index was built.

        :raises DatastoreError: the layer has no finished index.
        """
        if layer not in self.indexes:
            raise DatastoreError(
                f"the datastore has no finished index of layer {layer}; build it again, or take `index='exact'`"
            )
        return str(self.indexes[layer]["metric"])

    @property
    def built_indexes(self) -> tuple[str, ...]:
        """Layers whose index is built; those of the other entries are still to be trained."""
        return tuple(layer for layer, entry in self.indexes.items() if entry.get("parts") != [])

    @property
    def built_keys(self) -> int:
        """Keys that count of those that the frame was made with; later ones come after them."""
        return self.count if self.built is None else self.built

    @property
    def content(self) -> str:
        """Digits of the parts: a datastore that was built anew may have the same frame and generation."""
        return str(sealed({"parts": [part.checksum for part in self.parts]})[CHECKSUM])[:8]

    @property
    def frame(self) -> str:
        """Checksum of what every part is made with: model, layers, windows."""
        return frame_checksum(self.fingerprint, self.layers, self.context, self.stride)

    def index_entry(self, layer: str) -> IndexEntry | None:
        """Return the entry of a layer's index; None if it has none."""
        return build(IndexEntry, self.indexes[layer]) if layer in self.indexes else None

    def to_json(self) -> dict[str, Any]:
        """Return the object of datastore.json, with a checksum of itself."""
        return sealed({"format": FORMAT, "version": VERSION} | asdict(self))


def frame_checksum(fingerprint: Mapping[str, str], layers: Mapping[str, LayerKeys], context: int, stride: int) -> str:
    """Return the checksum of a frame. The model's name does not count: folders move."""
    model = {part: fingerprint.get(part, "") for part in MODEL_PARTS}
    kept = {name: asdict(layer) for name, layer in layers.items()}
    return str(sealed({"model": model, "layers": kept, "context": context, "stride": stride})[CHECKSUM])


def with_parts(
    old: Manifest, parts: Sequence[PartEntry], *, keep_indexes: bool = True, built: int | None = None
) -> Manifest:
    """Return the next generation of a manifest, with other parts.

    Its indexes tell what they were built over; without `keep_indexes` they are to be trained anew. A k beyond the
    number of keys is lowered.
    :param built: as the manifest's, where it changes.
    """
    count = sum(part.live for part in parts)
    then = [asdict(IndexedPart(part.name, part.live, part.removed)) for part in old.parts]
    kept = old.indexes if keep_indexes else unbuilt_indexes(old)
    indexes = {
        layer: {**entry, "k": min(entry["k"], count), "parts": then if entry.get("parts") is None else entry["parts"]}
        for layer, entry in kept.items()
    }
    fitted = old.fitted and {layer: {**one, "k": min(one["k"], count)} for layer, one in old.fitted.items()}
    return replace(
        old,
        parts=tuple(parts),
        count=count,
        generation=old.generation + 1,
        corpus="",
        built=old.built_keys if built is None else built,
        indexes=indexes,
        fitted=fitted,
    )


def unbuilt_indexes(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return a manifest's entries of indexes as those of indexes still to be trained; until then search is exact."""
    return {layer: {**one, "folder": "", "recall": 1.0, "parts": []} for layer, one in manifest.indexes.items()}


def unlisted_entry(folder: OpenFolder, name: str) -> PartEntry:
    """Return the entry of a part that no manifest lists. Raises as `read_part`."""
    part, checksum = read_any_part(folder, name)
    return PartEntry(name, checksum, part.rows, part.rows)


def centre_file(layer: str) -> str:
    """Return the path of a layer's centre in a datastore."""
    return f"{FRAME}/{layer}.npy"


def read_manifest(folder: Path | OpenFolder) -> Manifest:
    """Read datastore.json.

    :raises DatastoreError: the folder is no datastore, or was made by a newer knnlm.
    :raises DatastoreCorrupt: the manifest is damaged; names the place.
    """
    if not isinstance(folder, OpenFolder):
        with open_folder(folder) as opened:
            return read_manifest(opened)
    path = folder.path / NAME
    try:
        document = parse(folder.map(NAME).data.tobytes())
    except FileNotFoundError:
        raise _no_datastore(folder.path) from None
    except (OSError, Misfit) as error:
        raise DatastoreCorrupt(f"{path} cannot be read ({error}); build the datastore again") from None
    return from_json(document, path)


def open_folder(folder: Path) -> OpenFolder:
    """Open a datastore's folder.

    :raises DatastoreError: there is no such folder, or it may not be read.
    """
    try:
        return OpenFolder(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_datastore(folder) from None
    except OSError as error:
        raise DatastoreCorrupt(f"{folder} cannot be read ({error.strerror}); check its permissions") from None


def _remedy(folder: Path) -> str:
    old = old_folder(folder.resolve())
    if (old / NAME).is_file():
        return f"a run that was to replace it was killed, and what was there is in {old}: rename that"
    return "make one with `knnlm.build`"


def from_json(document: object, path: Path) -> Manifest:
    """Return the manifest that `Manifest.to_json` wrote; errors name `path`. Raises as `read_manifest`."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DatastoreError(f"{path} is not the manifest of a datastore; choose another folder")
    version = document.get("version")
    if version != VERSION or isinstance(version, bool):
        raise DatastoreError(_other_version(path, version))
    try:
        check_seal(document)
        return build(Manifest, document)
    except Misfit as error:
        raise DatastoreCorrupt(f"{path} is damaged ({error}); build the datastore again") from None


def _other_version(path: Path, version: object) -> str:
    whole = isinstance(version, int) and not isinstance(version, bool)
    of = f"(format {shown(version)}, this one reads {VERSION})"
    if whole and version == 1:
        return f"{path} was made by an older knnlm {of}; build it again, with `overwrite=True` at the same place"
    newer = "was made by a newer knnlm" if isinstance(version, int) and version > VERSION else "is of an unknown format"
    return f"{path} {newer} {of}; upgrade knnlm, or build it again"


def _no_datastore(folder: Path) -> DatastoreError:
    return DatastoreError(f"{folder} is not a datastore: it has no {NAME}; {_remedy(folder)}")


def _is_inside(name: str) -> bool:
    """Whether a path stays inside the folder: a manifest may come from an untrusted source."""
    return bool(name) and name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _is_scale(scale: float, dtype: str) -> bool:
    return scale == 1 or (dtype == "float16" and 2.0**-126 < scale < 2.0**127 and math.frexp(scale)[0] == 0.5)


def _check_counts(manifest: Manifest) -> None:
    demand(1 <= manifest.stride <= manifest.context, f"context is {manifest.context} and stride {manifest.stride}")
    demand(bool(manifest.layers), "layers is empty")
    for layer in manifest.layers:
        demand("/" not in layer and _is_inside(layer), f"{shown(layer)} is no name inside a datastore")
    live, names = sum(part.live for part in manifest.parts), {part.name for part in manifest.parts}
    demand(live == manifest.count, f"the parts have {live} rows, the datastore has {manifest.count}")
    demand(manifest.count >= 1, f"count is {manifest.count}, but must be at least 1")
    demand(0 <= manifest.built_keys <= manifest.count, f"built is {manifest.built} of {manifest.count} keys")
    demand(manifest.generation >= 0, f"generation is {manifest.generation}, but must be at least 0")
    demand(len(names) == len(manifest.parts), "a part is listed twice")


def _check_layers(manifest: Manifest) -> None:
    """Check the entries of `fitted` and `indexes`, and that their layers are stored."""
    fitted = {} if manifest.fitted is None else manifest.fitted
    models: dict[str, Mapping[str, FittedLayer | IndexEntry]] = {
        "fitted": build(dict[str, FittedLayer], fitted, place="fitted"),
        "indexes": build(dict[str, IndexEntry], manifest.indexes, place="indexes"),
    }
    for name, told in models.items():
        for layer, one in told.items():
            demand(layer in manifest.layers, f"{name} names the layer {shown(layer)}, which is not stored")
            demand(one.k <= manifest.count, f"k of {name}[{shown(layer)}] is {one.k} of {manifest.count} keys")


def _check_scores(scores: object) -> None:
    if scores is not None:
        build(BuiltWith, score_from_document(scores).settings, place="scores.settings")

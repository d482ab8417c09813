"""part.json: what a part of a datastore holds. A part is a folder of files that never change.

parts/00003-5f1c09aa/
part.json               written last: counts and checksums
values.npy              int32 [n]
documents.npy           int64 [documents, 5]
keys/11.ffn_input.npy   float16 or float32 [n, D]
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from index.mapped import OpenFolder
from index.typed import CHECKSUM, Misfit, build, check_seal, demand, is_sha256, parse, sealed, shown
from knnlm.errors import DatastoreCorrupt
from knnlm.places import PART, PART_NAME, PARTS

FORMAT = "knnlm-part"
VALUES, DOCUMENTS = "values.npy", "documents.npy"
# First row; first token, which is no value; number of its source; number in the source; position of the first token.
COLUMNS = 5


@dataclass(frozen=True)
class Shard:
    """One .npy file, whose name its place gives: its rows, and the SHA-256 of its data without the header."""

    rows: int
    sha256: str

    def __post_init__(self) -> None:
        demand(self.rows >= 1, f"rows is {self.rows}, but must be at least 1")
        demand(is_sha256(self.sha256), f"sha256 is {shown(self.sha256)}, which is no SHA-256")


@dataclass(frozen=True)
class Part:
    """The content of a part; `values` and the keys of every layer have as many rows."""

    frame: str
    """Checksum of the frame that the keys were made with."""
    values: Shard
    documents: Shard
    keys: Mapping[str, Shard]
    sources: tuple[str, ...]
    """Names of the texts; the third column of documents.npy counts in them."""

    def __post_init__(self) -> None:
        demand(is_sha256(self.frame), f"frame is {shown(self.frame)}, which is no SHA-256")
        demand(bool(self.sources), "sources is empty")
        for layer, keys in self.keys.items():
            demand(keys.rows == self.rows, f"the keys of {shown(layer)} have {keys.rows} rows, the values {self.rows}")

    @property
    def rows(self) -> int:
        """Rows of its values, and of its keys of each layer."""
        return self.values.rows

    def to_json(self) -> dict[str, Any]:
        """Return the object of part.json, with a checksum of itself."""
        return sealed({"format": FORMAT} | asdict(self))


class PartFile(NamedTuple):
    """A file of a part or of the frame: its path in the datastore, the type of its numbers and the shape of a row."""

    file: str
    shard: Shard
    dtype: str
    row_shape: tuple[int, ...]
    layer: str = ""
    """The layer, of its centre and its keys."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return (self.shard.rows, *self.row_shape)

    @property
    def data_bytes(self) -> int:
        """Bytes of the data, without the header."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def part_files(name: str, part: Part, layers: Mapping[str, tuple[int, str]]) -> Iterator[PartFile]:
    """The files of a part, those of the given layers (dim and dtype of each) last.

    :raises DatastoreCorrupt: a layer is missing in it.
    """
    place = f"{PARTS}/{name}"
    yield PartFile(f"{place}/{DOCUMENTS}", part.documents, "int64", (COLUMNS,))
    yield PartFile(f"{place}/{VALUES}", part.values, "int32", ())
    for layer, (dim, dtype) in layers.items():
        if layer not in part.keys:
            raise DatastoreCorrupt(f"{place} has no keys of layer {layer}; build the datastore again")
        yield PartFile(f"{place}/{keys_file(layer)}", part.keys[layer], dtype, (dim,), layer)


def part_name(number: int, document: Mapping[str, Any]) -> str:
    """Return the name of a part's folder: its number, and the first digits of the checksum of part.json."""
    return f"{number:05d}-{document[CHECKSUM][:8]}"


def part_number(name: str) -> int:
    """Return the number in the name of a part's folder."""
    return int(name.split("-", 1)[0])


def keys_file(layer: str) -> str:
    """Return the name of a layer's keys in the folder of a part."""
    return f"keys/{layer}.npy"


def part_names(folder: Path) -> Iterator[str]:
    """The names in `parts/` that name a part, whether or not a manifest lists them."""
    place = folder / PARTS
    if place.is_dir():
        yield from sorted(path.name for path in place.iterdir() if re.fullmatch(PART_NAME, path.name))


def read_part(folder: OpenFolder, name: str, checksum: str) -> Part:
    """Read the part.json that a manifest lists.

    :param checksum: as the manifest gives it.
    :raises DatastoreCorrupt: it is missing, damaged or another one; names it.
    """
    part, found = read_any_part(folder, name)
    if found != checksum:
        path = folder.path / PARTS / name / PART
        raise DatastoreCorrupt(f"{path} cannot be read (it is another one than the manifest lists); build it again")
    return part


def read_any_part(folder: OpenFolder, name: str) -> tuple[Part, str]:
    """Read a part.json; its checksum is returned too. Raises as `read_part`."""
    place = f"{PARTS}/{name}/{PART}"
    path = folder.path / place
    try:
        document = parse(folder.map(place).data.tobytes())
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise Misfit("it is no part of a datastore")
        check_seal(document)
        return build(Part, document), document[CHECKSUM]
    except FileNotFoundError:
        raise DatastoreCorrupt(f"{path} is missing; build the datastore again") from None
    except (OSError, Misfit) as error:
        raise DatastoreCorrupt(f"{path} cannot be read ({error}); build the datastore again") from None


def remove_unlisted(folder: Path, listed: Collection[str]) -> None:
    """Remove the parts of a datastore that no manifest lists: a process died, or a reader has no more use for them."""
    place = folder / PARTS
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path.name not in listed and re.fullmatch(rf"{PART_NAME}|\.{PART_NAME}\.partial-[0-9a-f]{{8}}", path.name):
            shutil.rmtree(path, ignore_errors=True)

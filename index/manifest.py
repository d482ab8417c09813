"""index.json as frozen dataclasses: the description of a saved index, with sizes and checksums."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from index.errors import TooFewKeys, UnknownSpec
from index.metric import Metric
from index.spec import parse_spec
from index.typed import Document, Misfit, build, check_seal, demand, is_sha256, parse, sealed, shown

MANIFEST = "index.json"
FORMAT = "vector-index-2"
INDEX_FILE, CENTRE_FILE, LISTS_FILE = "index.faiss", "centre.npy", "lists.bin"
# Search parameters of approximate indexes; each also applies through PCA, OPQ, IDMap and refinement.
EFFORTS = ("nprobe", "efSearch")
EXACT = "exact"


@dataclass(frozen=True)
class Recall:
    """A measurement of recall."""

    recall: float
    """Share of the k nearest that were found, 0 to 1. Any key as near as the k-th nearest counts."""
    k: int
    queries: int
    max_distance_error: float
    """The largest (distance found at a rank − exact one) / exact distance of the k-th, without absent neighbours."""
    milliseconds_per_query: float
    """Time of one query when all are searched together, on the measuring machine."""

    def __post_init__(self) -> None:
        demand(0 <= self.recall <= 1, f"recall is {self.recall}, but is a share from 0 to 1")
        demand(self.k >= 1 and self.queries >= 0, f"k is {self.k} and queries {self.queries}, which cannot be")


@dataclass(frozen=True)
class SavedFile:
    """One file of an index."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        demand(self.bytes >= 0, f"bytes is {self.bytes}, but must be at least 0")
        demand(is_sha256(self.sha256), f"sha256 is {shown(self.sha256)}, which is no SHA-256")


@dataclass(frozen=True)
class IndexManifest:
    """The content of index.json, without its checksum of itself."""

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
    """SHA-256 of some keys spread over the source."""
    files: Mapping[str, SavedFile]
    faiss: str
    """Version of FAISS that wrote the index."""

    def __post_init__(self) -> None:
        demand(self.metric in tuple(Metric), f"metric is {shown(self.metric)}, but must be {' or '.join(Metric)}")
        demand(self.dim >= 1 and self.count >= 0, f"dim is {self.dim} and count {self.count}, which cannot be")
        _check_spec(self.spec, self.count)
        demand(is_sha256(self.keys), f"keys is {shown(self.keys)}, which is no SHA-256")
        due, more = ((), ()) if self.is_exact else ((INDEX_FILE, CENTRE_FILE), (LISTS_FILE,))
        fits = set(due) <= set(self.files) <= {*due, *more}
        demand(fits, f"files are {shown(sorted(self.files))}, but must be {list(due)}, and perhaps {list(more)}")
        _check_parameters(self.parameters, self.is_exact)

    @property
    def is_exact(self) -> bool:
        """Whether search is exact, in which case nothing else is saved."""
        return self.spec == EXACT

    def to_json(self) -> Document:
        """Return the object of index.json, with its checksum."""
        return sealed(asdict(self))


def manifest_from(text: bytes) -> IndexManifest:
    """Return the content of an index.json.

    :raises Misfit: it is damaged, or of another format.
    """
    document: Any = parse(text)
    demand(isinstance(document, dict), "it is no object")
    found = document.get("format")
    demand(found == FORMAT, f"its format is {shown(found)}, but this version reads {FORMAT!r}")
    check_seal(document)
    return build(IndexManifest, document)


def _check_spec(spec: str, count: int) -> None:
    """Check a spec before FAISS sees it: some specs crash the process there."""
    demand(spec != "auto", f"spec is {shown(spec)}, which says no index")
    try:
        if spec != EXACT:
            parse_spec(spec).check_count(count)
    except (UnknownSpec, TooFewKeys) as error:
        raise Misfit(str(error)) from None


def _check_parameters(parameters: Mapping[str, float], is_exact: bool) -> None:
    due = set() if is_exact else {"overfetch"}
    demand(
        due <= set(parameters) <= due | set(() if is_exact else EFFORTS),
        f"parameters are {', '.join(map(shown, parameters)) or 'none'}, but must be overfetch and perhaps "
        f"{' or '.join(EFFORTS)}, and none of exact search",
    )
    for name, value in parameters.items():
        if not math.isfinite(value) or value < 1 or (name in EFFORTS and value != int(value)):
            raise Misfit(f"{name} is {value}, but must be at least 1, and whole but for overfetch")

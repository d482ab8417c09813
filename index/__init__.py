"""Vector indexes: exact search and any FAISS index over keys that stay on disk, with exact distances and known recall.

    from index.build import build_index
    from index.source import ArraySource

    index = build_index(ArraySource(keys), "auto")
    neighbors = index.search(queries, k=10)

All public names are here and loaded lazily, on first use: importing the package loads neither NumPy nor FAISS. Nothing
here knows of language models.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from index.approximate import ApproximateIndex
    from index.base import VectorIndex
    from index.build import build_index, check_spec, tune_index
    from index.errors import (
        CorruptIndex,
        DimensionMismatch,
        FaissFailed,
        IndexExists,
        InvalidKeys,
        InvalidQuery,
        NotTrained,
        TooFewKeys,
        UnknownSpec,
        VectorIndexError,
    )
    from index.exact import ExactIndex, exact_distances
    from index.manifest import IndexManifest, Recall
    from index.metric import Metric
    from index.neighbors import Neighbors, merge
    from index.recall import measure_recall
    from index.source import ArraySource, VectorSource
    from index.spec import IndexSpec, choose_spec, parse_spec
    from index.storage import open_index, read_manifest, save_index, verify

_NAMES = {
    "approximate": ("ApproximateIndex",),
    "base": ("VectorIndex",),
    "build": ("build_index", "check_spec", "tune_index"),
    "errors": (
        "CorruptIndex",
        "DimensionMismatch",
        "FaissFailed",
        "IndexExists",
        "InvalidKeys",
        "InvalidQuery",
        "NotTrained",
        "TooFewKeys",
        "UnknownSpec",
        "VectorIndexError",
    ),
    "exact": ("ExactIndex", "exact_distances"),
    "manifest": ("IndexManifest", "Recall"),
    "metric": ("Metric",),
    "neighbors": ("Neighbors", "merge"),
    "recall": ("measure_recall",),
    "source": ("ArraySource", "VectorSource"),
    "spec": ("IndexSpec", "choose_spec", "parse_spec"),
    "storage": ("open_index", "read_manifest", "save_index", "verify"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "ApproximateIndex",
    "ArraySource",
    "CorruptIndex",
    "DimensionMismatch",
    "ExactIndex",
    "FaissFailed",
    "IndexExists",
    "IndexManifest",
    "IndexSpec",
    "InvalidKeys",
    "InvalidQuery",
    "Metric",
    "Neighbors",
    "NotTrained",
    "Recall",
    "TooFewKeys",
    "UnknownSpec",
    "VectorIndex",
    "VectorIndexError",
    "VectorSource",
    "build_index",
    "check_spec",
    "choose_spec",
    "exact_distances",
    "measure_recall",
    "merge",
    "open_index",
    "parse_spec",
    "read_manifest",
    "save_index",
    "tune_index",
    "verify",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # a type checker would otherwise accept every misspelt name

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'index' has no attribute {name!r}")
        value = getattr(import_module(f"index.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value

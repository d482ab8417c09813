"""All errors of a vector index that a caller can fix. Each message is one line: fact, value received, what to do.

VectorIndexError
├── DimensionMismatch   vectors of another dimension or shape than the index has
├── InvalidQuery        a k below 1, a query with NaN or infinity (also a ValueError)
├── InvalidKeys         keys that cannot be indexed: no floats, NaN or infinity (also a ValueError)
├── TooFewKeys          fewer keys than the index needs to be trained
├── NotTrained          keys are added before training
├── UnknownSpec         a spec that FAISS does not accept (also a ValueError)
├── FaissFailed         FAISS refused for another reason, in its own words
├── IndexExists         the folder to save to is there already
└── CorruptIndex        a file is missing, short or changed, or belongs to other keys

Errors of the disk (full, read-only) stay OSError.
"""

from __future__ import annotations


class VectorIndexError(Exception):
    """The base of all errors of this package."""


class DimensionMismatch(VectorIndexError):
    """Vectors of another dimension or shape than the index has."""


class InvalidQuery(VectorIndexError, ValueError):
    """A search with an invalid k, query or recall target."""


class InvalidKeys(VectorIndexError, ValueError):
    """Keys that cannot be indexed."""


class TooFewKeys(VectorIndexError):
    """Fewer keys than the index needs."""


class NotTrained(VectorIndexError):
    """The index has to be trained first."""


class UnknownSpec(VectorIndexError, ValueError):
    """A spec that is neither `auto`, nor `exact`, nor a FAISS factory string for this dimension and metric."""


class FaissFailed(VectorIndexError):
    """FAISS refused; the message is its own."""


class IndexExists(VectorIndexError):
    """The folder is there already."""


class CorruptIndex(VectorIndexError):
    """A saved index is damaged, or belongs to other keys."""

"""The two metrics, and the one convention: distances ascend, smaller is nearer."""

from __future__ import annotations

from enum import StrEnum


class Metric(StrEnum):
    """How far a key is from a query. Cosine is L2 on unit vectors, which the caller makes."""

    L2 = "l2"
    """Squared Euclidean distance."""
    IP = "ip"
    """Minus the inner product."""

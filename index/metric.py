"""The two metrics. For both, a smaller distance is nearer."""

from __future__ import annotations

from enum import StrEnum


class Metric(StrEnum):
    """The distance of a key from a query. Cosine is L2 on unit vectors, which the caller normalises."""

    L2 = "l2"
    """Squared Euclidean distance."""
    IP = "ip"
    """Minus the inner product."""

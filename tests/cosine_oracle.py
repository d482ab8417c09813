"""Mean cosine distances by the definition: one pair after the other, in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np


def distance(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return 1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def mean_distance(vectors) -> float:
    """Over all pairs of rows."""
    pairs = list(itertools.combinations(vectors, 2))
    return math.fsum(distance(a, b) for a, b in pairs) / len(pairs)


def mean_distance_between(first, second) -> float:
    """Over all pairs of a row of one and a row of the other."""
    return math.fsum(distance(a, b) for a in first for b in second) / (len(first) * len(second))

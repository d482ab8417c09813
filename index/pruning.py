"""Exact search without looking at every dimension of every key: a ceiling of the inner product, and what it spares.

Keys of language models vary in few directions. R holds the directions of the keys' variance, the greatest first; of a
vector v, v' are its first M coordinates in R and r(v) is the length of the rest. By Cauchy and Schwarz

    <q, k>  <=  u(q, k) = <q', k'> + r(q) r(k),     so     |q - k|² >= |q|² + |k|² - 2 u(q, k),

and a key whose bound lies above a threshold is not among the nearest. All of it, the threshold of each query included,
is one inner product of M + 3 dimensions that is compared with 0 (`Projection`).

A threshold is a guess: the distance of the r-th nearest of a sample, with r such that k keys lie below it but once in
ten thousand times. A query for which fewer did is searched again, by the full scan: the answer is exact in any case.

Legend: N keys, S sampled keys, Q queries, D dimension, M leading coordinates, E = M + 3, P pairs of a query and a key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.faiss_index import scan_block
from index.metric import Metric
from index.neighbors import nearest

# Sampled: one key in so many, which costs as much of a full scan.
SAMPLE_SHARE = 32
# What prices a way of searching: nanoseconds of one core (AVX-512), of which only the ratios matter: for each pair of
# a query and a key, and for each pair that the bound lets through.
DIMENSION_NS, SCORE_NS, RANK_NS = 0.019, 0.9, 1.0
PAIR_NS, PAIR_DIMENSION_NS = 20.0, 0.1
# A plan that promises less than this is not worth its risk.
MAX_COST = 0.85
# Queries and keys from which a plan is made.
PILOT_QUERIES, PILOT_KEYS = 128, 4096
# Finding R takes some D³ steps: below so many pairs of a query and a key for each pair of dimensions it would show.
PAIRS_PER_ELEMENT = 500
# Queries and keys in one call: some 400 MB where every pair is above its threshold, and keys that stay in cache.
QUERY_ROWS, KEY_ROWS = 4096, 4096
# Lets squares that float32 cannot hold (1e-38) count as ties.
JUST_BELOW_ZERO = -1e-30

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def directions(keys_SD: Floats) -> Floats:
    """R, float32 [D, D]: orthonormal columns, the directions of greatest variance of centred keys first."""
    keys_SD = keys_SD.astype(np.float64)
    return np.ascontiguousarray(np.linalg.eigh(keys_SD.T @ keys_SD)[1][:, ::-1], np.float32)


def is_worth_a_plan(keys: int, queries: int, dim: int) -> bool:
    """Whether a search is long enough for R, the sample and the pilot to be lost in it."""
    return queries >= PILOT_QUERIES and keys * queries >= PAIRS_PER_ELEMENT * dim * dim


def sample_rank(keys: int, sampled: int, count: int) -> int:
    """r: the r-th nearest of the sample has `count` of all keys below it, except once in some ten thousand times.

    The sample holds Poisson(m) of the `count` nearest keys; r is four standard deviations and three more.
    """
    mean = count * sampled / keys
    return min(sampled, math.ceil(mean + 4 * math.sqrt(mean) + 3))


@dataclass(frozen=True)
class Projection:
    """Turns vectors so that `<query_E, key_E> < 0` proves that a key is farther than the query's threshold.

    L2: [2q', 2r(q), -1, threshold - |q|²] and [k', r(k), |k|², 1]; IP: [q', r(q), slack |q|, threshold] and
    [k', r(k), |k|, 1].

    Rounding errs by at most about 4 D 2^-24 of |q| |k| (rotation and product; the errors of a sum of n grow as
    sqrt(n), Higham and Mary 2019, and |k'| adds up M of them). `slack` grants more than that: (1 - slack) of both
    squared norms, as 2 |q| |k| <= |q|² + |k|². And r comes from a difference, so that it is taken too large.
    """

    rotation_DM: Floats
    metric: Metric

    @property
    def slack(self) -> float:
        """Share of the norms by which a bound may be wrong."""
        return 8 * (len(self.rotation_DM) + 64) * 2.0**-24

    def keys(self, keys_ND: Floats) -> Floats:
        """float32 [N, E]."""
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are above no threshold
            lead_NM, rest_N, squares_N = self._split(keys_ND)
            norms_N: Floats = squares_N * np.float32(1 - self.slack) if self.metric is Metric.L2 else np.sqrt(squares_N)
        return _columns(lead_NM, rest_N, norms_N, np.ones_like(rest_N))

    def queries(self, queries_QD: Floats, thresholds_Q: Floats) -> Floats:
        """float32 [Q, E]."""
        lead_QM, rest_Q, squares_Q = self._split(queries_QD)
        if self.metric is Metric.IP:
            return _columns(lead_QM, rest_Q, np.float32(self.slack) * np.sqrt(squares_Q), thresholds_Q)
        offset_Q = thresholds_Q - squares_Q * np.float32(1 - self.slack)
        return _columns(2 * lead_QM, 2 * rest_Q, np.full_like(rest_Q, -1), offset_Q)

    def _split(self, rows_ND: Floats) -> tuple[Floats, Floats, Floats]:
        """v', r(v) and |v|²."""
        lead_NM = rows_ND @ self.rotation_DM
        squares_N = np.einsum("nd,nd->n", rows_ND, rows_ND)
        rest_N = squares_N - np.einsum("nm,nm->n", lead_NM, lead_NM)
        return lead_NM, np.sqrt(np.maximum(rest_N, 0) + self.slack * squares_N), squares_N


def _columns(lead_NM: Floats, *more_N: Floats) -> Floats:
    return np.column_stack([lead_NM, *more_N]).astype(np.float32, copy=False)


@dataclass(frozen=True)
class Plan:
    """A search that promises to be faster than the full scan."""

    projection: Projection
    thresholds_Q: Floats


def make_plan(
    queries_QD: Floats, sample_SD: Floats, rotation_DD: Floats, metric: Metric, *, keys: int, count: int
) -> Plan | None:
    """Thresholds from a spread sample of the keys, and the M that costs least; None where the full scan costs less."""
    rank = sample_rank(keys, len(sample_SD), count)
    pilot_QD = np.ascontiguousarray(queries_QD[:: max(1, len(queries_QD) // PILOT_QUERIES)])
    pilot_SD = sample_SD[:: max(1, len(sample_SD) // PILOT_KEYS)]
    shares = _shares(
        pilot_QD @ rotation_DD, pilot_SD @ rotation_DD, _kth_distance(pilot_QD, sample_SD, rank, metric), metric
    )
    dim, queries = queries_QD.shape[1], len(queries_QD)
    costs = {lead: _cost(lead, share, dim, queries) for lead, share in shares.items()}
    best = min(costs, key=lambda lead: costs[lead], default=0)
    if not best or costs[best] > MAX_COST * (DIMENSION_NS * dim + RANK_NS):
        return None
    projection = Projection(np.ascontiguousarray(rotation_DD[:, :best]), metric)
    return Plan(projection, _kth_distance(queries_QD, sample_SD, rank, metric))


def _shares(queries_QD: Floats, keys_SD: Floats, thresholds_Q: Floats, metric: Metric) -> dict[int, float]:
    """Share of pairs that the bound lets through, for each M; the vectors are turned by R already."""
    dim = queries_QD.shape[1]
    step = max(8, dim // 48)
    ceilings_QS = np.zeros((len(queries_QD), len(keys_SD)), np.float32)
    rest_Q, rest_S = (np.einsum("nd,nd->n", rows, rows) for rows in (queries_QD, keys_SD))
    # A pair passes where u(q, k) is at least this.
    needed_QS = (
        (rest_Q[:, None] + rest_S - thresholds_Q[:, None]) / 2 if metric is Metric.L2 else -thresholds_Q[:, None]
    )
    shares = {}
    for lead in range(step, dim, step):
        part_QM, part_SM = queries_QD[:, lead - step : lead], keys_SD[:, lead - step : lead]
        ceilings_QS += part_QM @ part_SM.T
        rest_Q = rest_Q - np.einsum("nm,nm->n", part_QM, part_QM)
        rest_S = rest_S - np.einsum("nm,nm->n", part_SM, part_SM)
        rests_QS = np.sqrt(np.maximum(rest_Q, 0))[:, None] * np.sqrt(np.maximum(rest_S, 0))
        shares[lead] = float(np.mean(ceilings_QS + rests_QS >= needed_QS))
    return shares


def _cost(lead: int, share: float, dim: int, queries: int) -> float:
    """Nanoseconds for each pair of a query and a key."""
    rotation = DIMENSION_NS * lead * dim / queries
    return DIMENSION_NS * lead + SCORE_NS + rotation + share * (PAIR_NS + PAIR_DIMENSION_NS * dim)


def _kth_distance(queries_QD: Floats, keys_SD: Floats, k: int, metric: Metric) -> Floats:
    distances_QK, _ = scan_block(queries_QD, keys_SD, k, metric)
    return np.asarray(distances_QK.max(axis=1), np.float32)


class Gathered:
    """The nearest keys of each query within its threshold, from blocks of keys."""

    def __init__(self, thresholds_Q: Floats, count: int) -> None:
        self.thresholds_Q = thresholds_Q.copy()
        """Falls to the distance of the count-th nearest so far, where that is nearer."""
        self._count = count
        shape = (len(thresholds_Q), 2 * count + KEY_ROWS)
        self._distances_QW, self._ids_QW = np.empty(shape, np.float32), np.empty(shape, np.int64)
        self._filled_Q = np.zeros(len(thresholds_Q), np.int64)

    def add(self, rows_P: Ids, distances_P: Floats, ids_P: Ids) -> Ids:
        """Pairs of one block of keys, by row; the rows whose threshold fell."""
        new_Q = np.bincount(rows_P, minlength=len(self._filled_Q))
        offsets_Q = self._filled_Q - np.cumsum(new_Q) + new_Q
        places_P = offsets_Q[rows_P] + np.arange(len(rows_P))
        self._distances_QW[rows_P, places_P], self._ids_QW[rows_P, places_P] = distances_P, ids_P
        self._filled_Q += new_Q
        full = np.flatnonzero(self._filled_Q > 2 * self._count)
        self._cut(full)
        self.thresholds_Q[full] = self._distances_QW[full, : self._count].max(axis=1)
        return full

    def ids(self) -> Ids:
        """Ids [Q, C] of the `count` nearest; -1 where there are fewer."""
        self._cut(np.flatnonzero(self._filled_Q > self._count))
        absent_QC = np.arange(self._count) >= self._filled_Q[:, None]
        return np.where(absent_QC, -1, self._ids_QW[:, : self._count])

    def _cut(self, rows: Ids) -> None:
        """Keep the nearest of these rows, each of which has more."""
        width = int(self._filled_Q[rows].max(initial=0))
        unused = np.arange(width) >= self._filled_Q[rows, None]
        kept = nearest(
            np.where(unused, np.float32(np.inf), self._distances_QW[rows, :width]),
            self._ids_QW[rows, :width],
            self._count,
        )
        if len(rows):
            self._distances_QW[rows, : self._count], self._ids_QW[rows, : self._count] = kept
            self._filled_Q[rows] = self._count

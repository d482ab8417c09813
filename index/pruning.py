"""Exact search without a full product of every pair: a ceiling of the inner product in 8-bit numbers.

R holds M <= D orthonormal columns. For a vector v, v' are its coordinates in R and r(v) is the norm of the remainder;
v^ is v' rounded to integer multiples (codes) of a step, and e(v) the norm of v' - v^. By Cauchy and Schwarz

    <q, k>  <=  <q^, k^> + |q^| e(k) + e(q) |k'| + r(q) r(k),     and     |q - k|² = |q|² + |k|² - 2 <q, k>.

As 2xy <= c x² + y²/c, each of the last three terms is at most the sum of a number of the query and one of the key, and
the bound is tight if c is the typical ratio y / x. So a key is not among the nearest unless the integer product of the
codes reaches a floor of the query (from the query's threshold) plus a floor of the key (`Bound`).

R spans the directions of the keys' greatest variance, rotated so that its columns have about equal variance (one step
then suits all coordinates).

A threshold is a guess: the distance of the r-th nearest of a sample, with r such that k keys lie below it except about
once in ten thousand times. A query with fewer is searched again by a full scan, so the result is always exact.

Legend: N keys, S sampled keys, Q queries, D dimension, M coordinates, P pairs of a query and a key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from index.int8 import MOST_OF_KEY, MOST_OF_QUERY, Codes, Matches, Split, floors, split
from index.metric import Metric
from index.neighbors import nearest
from index.scan import scan_block

# One key in this many is sampled, at that share of the cost of a full scan.
SAMPLE_SHARE = 32
# Cost model: nanoseconds on one core (AVX-512, VNNI), of which only the ratios matter. Per pair of a query and a key:
# for each dimension of a float32 product and each coordinate of an 8-bit one; then for ranking and scoring the pair.
DIMENSION_NS, CODE_NS = 0.021, 0.0048
RANK_NS, SCORE_NS = 1.0, 0.45
# Per pair that passes the bound, and per dimension of it.
PAIR_NS, PAIR_DIMENSION_NS = 100.0, 0.1
# Per key and dimension, besides its rotation.
KEY_DIMENSION_NS = 0.6
# A plan must cost at most this share of the full scan.
MAX_COST = 0.85
# Queries and keys from which a plan is made, and the coordinates that are tried, as shares of D.
PILOT_QUERIES, PILOT_KEYS = 128, 2048
LEADS = (0.25, 0.5, 0.75, 1.0)
# With fewer dimensions little can be saved (and torch 2.13 multiplies 8-bit matrices of width 1 wrongly).
LEAST_DIM = 16
# A plan, with sample and pilot, takes some tenths of a second whatever D is: of 61 million pairs the search was slower
# with one (0.6 to 0.9 times as fast, D = 256), of 246 million as fast or faster, of 410 million 1.6 (k = 64).
LEAST_PAIRS = 1 << 28
# Finding R takes some D³ steps, negligible from this many pairs of a query and a key per pair of dimensions on.
PAIRS_PER_ELEMENT = 200
# Queries and keys of one step: some 400 MB if every pair reaches its floors, and keys that stay in cache.
QUERY_ROWS, KEY_ROWS = 4096, 4096
# The codes' range in standard deviations; values outside are clipped, which e(v) accounts for.
DEVIATIONS = 4.5
SAFE_LENGTHS = (1e-12, 1e12)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]


def directions(keys_SD: Floats) -> Floats:
    """Return orthonormal columns, float32 [D, D]: the principal directions of centred keys, largest variance first."""
    keys_SD = keys_SD.astype(np.float64)
    return np.ascontiguousarray(np.linalg.eigh(keys_SD.T @ keys_SD)[1][:, ::-1], np.float32)


def spread(columns_DM: Floats) -> Floats:
    """Return another basis of the same space with about equal variances: random signs, then a DCT-II."""
    size = columns_DM.shape[1]
    signs_M = np.random.default_rng(0).choice([-1.0, 1.0], size)
    frequencies_M, places_M = np.arange(size)[:, None], np.arange(size) + 0.5
    cosines_MM = np.cos(np.pi / size * frequencies_M * places_M) * math.sqrt(2 / size)
    cosines_MM[0] /= math.sqrt(2)
    return np.ascontiguousarray((columns_DM * signs_M) @ cosines_MM, np.float32)


def is_worth_a_plan(keys: int, queries: int, dim: int) -> bool:
    """Return whether a search is long enough for the cost of R, the sample and the pilot to be negligible."""
    enough = keys * queries >= max(LEAST_PAIRS, PAIRS_PER_ELEMENT * dim * dim)
    return enough and dim >= LEAST_DIM and queries >= PILOT_QUERIES


def sample_rank(keys: int, sampled: int, count: int) -> int:
    """Return r: the r-th nearest of the sample has `count` of all keys below it, except about once in 10,000 times.

    The sample holds about Poisson(m) of the `count` nearest keys; r is m plus four standard deviations plus 3.
    """
    mean = count * sampled / keys
    return min(sampled, math.ceil(mean + 4 * math.sqrt(mean) + 3))


@dataclass(frozen=True)
class Bound:
    """Turns vectors into codes with floors; a pair below its floors is farther than the query's threshold.

    Rounding errors are at most about 4 D 2^-24 of |q| |k| (rotation and product; the errors of a sum of n grow as
    sqrt(n), Higham and Mary 2019). `slack` allows more than that for both squared norms, as 2 |q| |k| <= |q|² + |k|².
    """

    rotation_DM: Floats
    metric: Metric
    query_step: float
    key_step: float
    ratios: tuple[float, float, float]
    """c of the three terms."""

    @classmethod
    def fit(cls, queries_QD: Floats, keys_SD: Floats, rotation_DM: Floats, metric: Metric) -> Bound:
        """Return a bound with steps and ratios fitted to these queries and keys."""
        query_step = _fitting_step(queries_QD, rotation_DM, MOST_OF_QUERY)
        key_step = _fitting_step(keys_SD, rotation_DM, MOST_OF_KEY)
        bound = cls(rotation_DM, metric, query_step, key_step, (1.0, 1.0, 1.0))
        query, key = bound._split_queries(queries_QD), bound._split_keys(keys_SD)
        # x of a query, y of a key: x y is closest to (c x² + y² / c) / 2 where c = y / x.
        facing = ((query.rounded_N, key.error_N), (query.error_N, key.lead_N), (bound._rest(query), bound._rest(key)))
        ratios = [math.sqrt((np.median(y) + 1e-30) / (np.median(x) + 1e-30)) for x, y in facing]
        return replace(bound, ratios=(ratios[0], ratios[1], ratios[2]))

    @property
    def slack(self) -> float:
        """Share of the squared norms by which a bound may be wrong."""
        return 8 * (len(self.rotation_DM) + 64) * 2.0**-24

    def keys(self, keys_ND: Floats) -> Codes:
        """Return the keys' codes and floors; NaN and infinity pass every floor."""
        with np.errstate(invalid="ignore", over="ignore"):
            key, (c_1, c_2, c_3) = self._split_keys(keys_ND), self.ratios
            terms_N = key.error_N / c_1 + key.lead_N / c_2 + self._rest(key) / c_3
            offsets_N = self._norm_share * key.whole_N.astype(np.float64) - terms_N
            return Codes(key.numbers_NM, floors(offsets_N / self._unit))

    def queries(self, queries_QD: Floats) -> tuple[NDArray[np.int8], Doubles]:
        """Return codes, int8 [Q, M], and offsets, [Q], for `query_floors`."""
        query, (c_1, c_2, c_3) = self._split_queries(queries_QD), self.ratios
        terms_Q = c_1 * query.rounded_N + c_2 * query.error_N + c_3 * self._rest(query)
        return query.numbers_NM, self._norm_share * query.whole_N.astype(np.float64) - terms_Q

    def query_floors(self, offsets_Q: Doubles, thresholds_Q: Floats) -> NDArray[np.int32]:
        """Return the floors, int32, of queries that search for distances up to the thresholds."""
        weight = 1.0 if self.metric is Metric.L2 else 2.0
        return floors((offsets_Q - weight * thresholds_Q.astype(np.float64)) / self._unit)

    @property
    def _norm_share(self) -> float:
        return (1 if self.metric is Metric.L2 else 0) - self.slack

    @property
    def _unit(self) -> float:
        """Value of one unit of a product of codes, in 2 <q, k>."""
        return 2 * self.query_step * self.key_step

    def _split_queries(self, queries_QD: Floats) -> Split:
        return split(queries_QD, self.rotation_DM, self.query_step, MOST_OF_QUERY)

    def _split_keys(self, keys_ND: Floats) -> Split:
        return split(keys_ND, self.rotation_DM, self.key_step, MOST_OF_KEY)

    def _rest(self, part: Split) -> Floats:
        """r(v)², a difference of two squares, rounded up rather than down."""
        rest_N: Floats = np.maximum(part.whole_N - part.lead_N, 0) + np.float32(self.slack) * part.whole_N
        return rest_N


def _fitting_step(rows_ND: Floats, rotation_DM: Floats, most: int) -> float:
    """The step for coordinates of about equal variance."""
    square = float(np.median(split(rows_ND, rotation_DM, 1.0, most).lead_N))
    return DEVIATIONS * math.sqrt(square / rotation_DM.shape[1]) / most or 1.0


def _is_safe(rows_ND: Floats) -> bool:
    """Whether squares of the usual row, and of far shorter and longer ones, are numbers that float32 can hold."""
    return SAFE_LENGTHS[0] < math.sqrt(float(np.median(np.einsum("nd,nd->n", rows_ND, rows_ND)))) < SAFE_LENGTHS[1]


@dataclass(frozen=True)
class PruningPlan:
    """A search that is expected to be faster than the full scan."""

    bound: Bound
    thresholds_Q: Floats


def make_plan(
    queries_QD: Floats, sample_SD: Floats, rotation_DD: Floats, metric: Metric, *, keys: int, count: int
) -> PruningPlan | None:
    """Return thresholds from a sample of the keys, and the bound of least cost; None if the full scan costs less."""
    pilot_QD = np.ascontiguousarray(queries_QD[:: max(1, len(queries_QD) // PILOT_QUERIES)])
    pilot_SD = np.ascontiguousarray(sample_SD[:: max(1, len(sample_SD) // PILOT_KEYS)])
    if not (_is_safe(pilot_QD) and _is_safe(pilot_SD)):
        return None
    rank, dim = sample_rank(keys, len(sample_SD), count), queries_QD.shape[1]
    thresholds_Q = _kth_distance(pilot_QD, sample_SD, rank, metric)
    leads = [min(dim, 8 * math.ceil(share * dim / 8)) for share in LEADS]
    bounds = [Bound.fit(pilot_QD, pilot_SD, spread(rotation_DD[:, :lead]), metric) for lead in leads]
    costs = [_cost(bound, _share(bound, pilot_QD, pilot_SD, thresholds_Q), len(queries_QD)) for bound in bounds]
    if min(costs) > MAX_COST * (DIMENSION_NS * dim + RANK_NS):
        return None
    return PruningPlan(bounds[int(np.argmin(costs))], _kth_distance(queries_QD, sample_SD, rank, metric))


def _share(bound: Bound, queries_QD: Floats, keys_SD: Floats, thresholds_Q: Floats) -> float:
    """Share of pairs that pass the bound."""
    numbers_QM, offsets_Q = bound.queries(queries_QD)
    queries = Codes(numbers_QM, bound.query_floors(offsets_Q, thresholds_Q))
    rows_P, _ = Matches(queries, len(keys_SD)).pairs(bound.keys(keys_SD))
    return len(rows_P) / (len(queries_QD) * len(keys_SD))


def _cost(bound: Bound, share: float, queries: int) -> float:
    """Nanoseconds for each pair of a query and a key."""
    dim, lead = map(int, bound.rotation_DM.shape)
    of_a_key = DIMENSION_NS * lead * dim + KEY_DIMENSION_NS * (dim + 2 * lead)
    return CODE_NS * lead + SCORE_NS + of_a_key / queries + share * (PAIR_NS + PAIR_DIMENSION_NS * dim)


def _kth_distance(queries_QD: Floats, keys_SD: Floats, k: int, metric: Metric) -> Floats:
    distances_QK, _ = scan_block(queries_QD, keys_SD, k, metric)
    return np.asarray(distances_QK.max(axis=1), np.float32)


class Gathered:
    """Collects the nearest keys of each query within its threshold, from blocks of keys."""

    def __init__(self, thresholds_Q: Floats, count: int) -> None:
        self.thresholds_Q = thresholds_Q.copy()
        """Falls to the distance of the count-th nearest so far, where that is nearer."""
        self._count = count
        shape = (len(thresholds_Q), 2 * count + KEY_ROWS)
        self._distances_QW, self._ids_QW = np.empty(shape, np.float32), np.empty(shape, np.int64)
        self._filled_Q = np.zeros(len(thresholds_Q), np.int64)

    def add(self, rows_P: Ids, distances_P: Floats, ids_P: Ids) -> Ids:
        """Add the pairs of one block of keys, sorted by row; return the rows whose threshold fell."""
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
        """Return ids [Q, C] of the `count` nearest; -1 where there are fewer."""
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

"""Building an index: sample, train, add in chunks, tune. Reads keys in blocks, so memory holds a few of them.

Legend: N keys, D dimension.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.approximate import ApproximateIndex
from index.base import VectorIndex
from index.errors import InvalidKeys, InvalidQuery, TooFewKeys
from index.exact import ExactIndex
from index.faiss_index import create_index
from index.kmeans import cluster_means, nearest_means
from index.metric import Metric
from index.recall import make_trial
from index.source import BLOCK_BYTES, Floats, VectorSource, blocks, centre_of, rows_in, spread_ids
from index.spec import IndexSpec, parse_spec
from index.tune import tune

# Bytes of encoded keys that are in memory before they are written to disk as lists.
RUN_BYTES = 1 << 28
# Memory that building may take by default: a training sample of its full size is a quarter of it.
BUILD_BYTES = 4 << 30
# Stored keys used as queries in tuning; recall over 200 x k neighbours has an error of about one percentage point.
TUNE_QUERIES = 200
# k = 1024 needs many more lists than k = 10 does, so tuning for a small k would not serve a large one.
TUNE_K = 1024

Ids = NDArray[np.int64]
Progress = Callable[[int, int], None]


def build_index(
    source: VectorSource,
    spec: str = "auto",
    *,
    metric: Metric = Metric.L2,
    k: int = TUNE_K,
    recall_target: float | None = 0.95,
    memory_bytes: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    scratch: Path | None = None,
    work_bytes: int = BUILD_BYTES,
) -> VectorIndex:
    """Build the index that a spec describes, and tune it; `index.storage.save_index` saves it.

    :param spec: `auto`, `exact`, or a FAISS factory string.
    :param k: number of neighbours for which `nprobe` or `efSearch` is tuned; clipped to the number of keys.
    :param recall_target: as in `tune_index`; None: do not tune.
    :param memory_bytes: memory for the index that `auto` chooses; None: half of the memory that is free now.
    :param progress: called with (keys added, N), at 0 before training; it may raise to stop.
    :param scratch: folder whose disk holds the inverted lists until they are saved, in temporary files without a name;
        None: that of all temporary files.
    :param work_bytes: memory that building may take. With less, the training sample is smaller where it would not fit
        into a quarter of it; nothing else depends on it.
    :raises UnknownSpec: FAISS does not accept the spec for this dimension and metric.
    :raises InvalidQuery: a recall_target outside (0, 1].
    :raises TooFewKeys: no keys, or fewer than training needs.
    :raises InvalidKeys: NaN or infinity among the keys; the message names the row.
    :raises OSError: the disk is full.
    """
    _check_target(recall_target)
    if not len(source):
        raise TooFewKeys("there are no keys to index")
    tell = progress or _tell_nobody
    resolved = _resolve(spec, source, memory_bytes)
    if resolved.is_exact:
        tell(len(source), len(source))
        return ExactIndex(source, metric)
    index = _start(source, resolved, Metric(metric), seed, tell, work_bytes)
    index.work_bytes = min(index.work_bytes, work_bytes)
    add_keys(index, source, tell, scratch)
    if recall_target is not None:
        tune_index(index, k=k, recall_target=recall_target, seed=seed)
    return index


def tune_index(index: VectorIndex, *, k: int = TUNE_K, recall_target: float = 0.95, seed: int = 0) -> None:
    """Set an approximate index's search effort to the least that reaches a recall, measured on stored keys.

    :param k: number of neighbours to find, clipped to the number of keys.
    :param recall_target: share of them to find; FAISS's default is kept if it suffices.
    :raises InvalidQuery: a recall_target outside (0, 1].
    """
    _check_target(recall_target)
    if isinstance(index, ApproximateIndex) and len(index) > 1:
        rng = np.random.default_rng([seed, 2])
        trial = make_trial(index.source, index.metric, k=k, queries=TUNE_QUERIES, rng=rng, work_bytes=index.work_bytes)
        tune(index, trial, recall_target)


def _check_target(recall_target: float | None) -> None:
    if recall_target is not None and not 0 < recall_target <= 1:
        raise InvalidQuery(f"recall_target is {recall_target}, but is a share above 0 and at most 1")


def check_spec(spec: str, dim: int, metric: Metric = Metric.L2) -> None:
    """Check before any work that FAISS accepts a spec.

    :raises UnknownSpec: with FAISS's message.
    """
    parsed = parse_spec(spec)
    if not (parsed.rule or parsed.is_exact):
        create_index(parsed.text, dim, Metric(metric))


def available_memory() -> int:
    """Return the bytes of memory available without swapping."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _tell_nobody(done: int, total: int) -> None:
    pass


def _resolve(spec: str, source: VectorSource, memory_bytes: int | None) -> IndexSpec:
    parsed = parse_spec(spec)
    if parsed.rule is None:
        return parsed
    return parse_spec(parsed.rule(len(source), source.dim, memory_bytes or available_memory() // 2))


def _start(
    source: VectorSource, spec: IndexSpec, metric: Metric, seed: int, tell: Progress, work_bytes: int
) -> ApproximateIndex:
    """A trained index without keys."""
    native = create_index(spec.text, source.dim, metric)
    points = spec.training_points(len(source), source.dim, work_bytes // 4)
    centre_D = centre_of(source)
    tell(0, len(source))
    if not native.is_trained:
        ids = spread_ids(len(source), points, np.random.default_rng([seed, 0]))
        sample_SD = _finite(source.take(ids), ids)
        sample_SD -= centre_D  # in place: it may be a quarter of the memory
        if native.wants_lists:
            native.give_lists(cluster_means(native.prepared(sample_SD), native.wants_lists, native.metric, seed=seed))
        native.train(sample_SD, seed)
    return ApproximateIndex(source, metric, spec=spec.text, native=native, centre_D=centre_D, overfetch=spec.overfetch)


def add_keys(
    index: ApproximateIndex, keys: VectorSource, progress: Progress | None = None, scratch: Path | None = None
) -> None:
    """Append further keys to a trained index.

    :param scratch: as in `build_index`.
    :raises InvalidKeys: NaN or infinity among them; the message names the row.
    :raises OSError: the disk is full.
    """
    native, tell, in_run = index.native, progress or _tell_nobody, 0
    most, block = native.keys_in(min(RUN_BYTES, index.work_bytes // 4)), min(BLOCK_BYTES, index.work_bytes // 16)
    rows = len(keys) if parse_spec(index.spec).whole_at_once else min(rows_in(block, keys.dim), most or len(keys))
    means_LD = native.list_means
    find_lists = None if means_LD is None else partial(nearest_means, means_CD=means_LD, metric=native.metric)
    for first, keys_ND in blocks(keys, rows):
        if most is not None and in_run + len(keys_ND) > most:
            native.end_run(scratch)
            in_run = 0
        centred_ND = _finite(keys_ND, np.arange(first, first + len(keys_ND))) - index.centre_D
        native.add(centred_ND, find_lists)
        in_run += len(keys_ND)
        tell(first + len(keys_ND), len(keys))
    native.finish(scratch)


def _finite(keys_ND: Floats, ids_N: Ids) -> Floats:
    """The keys, checked: one NaN in training spoils every list, and FAISS does not name the row."""
    finite_N = np.isfinite(keys_ND).all(axis=1)
    if not finite_N.all():
        raise InvalidKeys(
            f"key {int(ids_N[np.argmin(finite_N)])} holds NaN or infinity; mend or leave out such vectors"
        )
    return keys_ND

"""Building: samples, chunks, tuning, and what stops it."""

from __future__ import annotations

import math

import faiss
import numpy as np
import pytest

from index.approximate import ApproximateIndex
from index.build import build_index, tune_index
from index.errors import FaissFailed, InvalidKeys, InvalidQuery, NotTrained, TooFewKeys, UnknownSpec
from index.exact import ExactIndex
from index.faiss_index import FaissIndex, _with_lists_or_codes, create_index
from index.manifest import Recall
from index.metric import Metric
from index.recall import make_trial, run_trial
from index.source import ArraySource, spread_ids
from index.tune import tune
from tests.vector_oracle import clustered, massive


class CountingSource(ArraySource):
    """Remembers how many rows were asked for at a time."""

    def __init__(self, array_ND):
        super().__init__(array_ND)
        self.read_rows, self.taken = [], []

    def read(self, start, stop):
        self.read_rows.append(stop - start)
        return super().read(start, stop)

    def take(self, ids_N):
        self.taken.append(np.array(ids_N))
        return super().take(ids_N)


def test_adds_in_chunks_and_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr("index.build.BLOCK_BYTES", 4 * 8 * 400)
    source, told = CountingSource(clustered(1000, 8)), []
    build_index(source, "IVF8,Flat", k=5, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 1000), (400, 1000), (800, 1000), (1000, 1000)]
    assert source.read_rows[:3] == [400, 400, 200]


def test_training_sample_is_spread_over_the_whole_source(monkeypatch):
    monkeypatch.setattr("index.spec.TRAINING_BYTES", 4 * 8 * 200)
    samples = []
    for seed in (0, 0, 1):
        source = CountingSource(clustered(2000, 8))
        build_index(source, "IVF8,Flat", k=5, seed=seed)
        samples.append(next(ids for ids in source.taken if len(ids) == 200 and ids[-1] != 1990))
    np.testing.assert_array_equal(samples[0], samples[1])
    assert (samples[0] != samples[2]).any()
    # Peers train on the first keys, which are the first documents.
    np.testing.assert_array_equal(samples[0] // 10, np.arange(200))


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (10, 10), (10, 3), (10**12, 1000), (7, 0)])
def test_spread_ids_are_different_and_ascend(count, rows):
    ids = spread_ids(count, rows, np.random.default_rng(0))
    assert len(ids) == rows and (np.diff(ids) > 0).all()
    assert not rows or 0 <= ids[0] <= ids[-1] < count


def untuned(spec, *, metric=Metric.L2, count=3000):
    """An index as FAISS makes it, and the sample to tune it on."""
    source = ArraySource(clustered(count, 16))
    index = build_index(source, spec, metric=metric, k=50, recall_target=1e-9)
    return index, make_trial(source, metric, k=50, queries=100, rng=np.random.default_rng(3))


@pytest.mark.parametrize("spec", ["IVF128,Flat", "PCA12,IVF128,Flat", "HNSW8,Flat", "PCA12,HNSW8", "IDMap,HNSW8"])
def test_effort_is_raised_until_recall_is_reached(spec):
    """Setting .nprobe on a PCA index sets nothing on the inverted file inside it: an old bug of the peers."""
    index, trial = untuned(spec)
    assert isinstance(index, ApproximateIndex) and index.effort
    index.set_effort(1)
    before, effort = run_trial(index, trial).recall, index.effort.value
    reached = tune(index, trial, 0.97)
    assert before < 0.97 <= reached == run_trial(index, trial).recall
    assert index.effort.value > effort


def test_tuning_may_come_after_the_build():
    """For callers that show where they are."""
    source = ArraySource(clustered(2000, 8))
    at_once = build_index(source, "IVF64,PQ2", k=20)
    later = build_index(source, "IVF64,PQ2", k=20, recall_target=None)
    assert later.parameters["nprobe"] == 1 < at_once.parameters["nprobe"]
    tune_index(later, k=20)
    assert later.parameters == at_once.parameters
    tune_index(build_index(source, "exact"))


def test_effort_is_not_raised_further_than_needed():
    index, trial = untuned("IVF128,Flat")
    tune(index, trial, 0.9)
    assert 1 < index.effort.value < 64
    needed = index.effort.value
    index.set_effort(math.ceil(needed / 2))
    assert run_trial(index, trial).recall < 0.9


@pytest.mark.parametrize(
    ("recall_of", "effort", "overfetch"),
    [
        # 36 are needed; 64 reach it, and so do 48 and then 40.
        (lambda effort, overfetch: min(1, effort / 40), 40, 1),
        # Effort brings nothing: it is doubled once and taken back; candidates are doubled until they suffice.
        (lambda effort, overfetch: 0.5 + overfetch / 10, 1, 4),
        # Candidates are taken back too: of 4, 3 suffice.
        (lambda effort, overfetch: 0.6 + overfetch / 10, 1, 3),
        # Both are needed by turns, and effort is not run up to its limit in vain.
        (lambda effort, overfetch: min(effort / 8, overfetch / 4), 8, 4),
    ],
    ids=["taken back", "plateau", "candidates taken back", "both"],
)
def test_dials_are_turned_where_it_helps(monkeypatch, recall_of, effort, overfetch):
    index, trial = untuned("IVF128,Flat", count=300)
    assert index.effort.value == 1

    def pretended(index, trial):
        return Recall(min(1.0, recall_of(index.effort.value, index.overfetch)), 1, 1, 0.0, 0.0)

    monkeypatch.setattr("index.tune.run_trial", pretended)
    assert tune(index, trial, 0.88) >= 0.88
    assert (index.effort.value, index.overfetch) == (effort, overfetch)


@pytest.mark.parametrize("spec", ["PQ2x4", "IVF4,PQ2x4"])
def test_more_candidates_are_taken_where_codes_are_too_coarse(spec):
    index, trial = untuned(spec)
    before = index.overfetch
    assert run_trial(index, trial).recall < 0.97
    assert tune(index, trial, 0.97) >= 0.97
    assert index.overfetch > before


@pytest.mark.parametrize("spec", ["PQ2x4", "IVF4,PQ2x4", "PCA8,IVF4,PQ2x4", "HNSW8,PQ2x4"])
def test_code_words_are_not_ordered_for_a_search_that_is_not_made(spec):
    """FAISS's default, seconds for each quantizer of 8 bits; the same is found either way."""
    keys_ND = clustered(1000, 16)
    ours, theirs = create_index(spec, 16, Metric.L2), FaissIndex(faiss.index_factory(16, spec))
    coded = [_with_lists_or_codes(one._native) for one in (ours, theirs)]
    assert [one.do_polysemous_training for one in coded] == [False, True]
    for one in (ours, theirs):
        one.train(keys_ND, 3)
        one.add(keys_ND)
        one.finish(None)
    codes = [faiss.vector_to_array(one.pq.centroids) for one in coded]
    assert (codes[0] != codes[1]).any()  # it was done in the other
    np.testing.assert_array_equal(np.sort(codes[0]), np.sort(codes[1]))
    for found, expected in zip(ours.search(keys_ND[:50], 5), theirs.search(keys_ND[:50], 5), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_tuning_gives_up_where_nothing_helps():
    index, trial = untuned("LSH", count=1200)
    assert tune(index, trial, 1.0) <= 1.0
    assert index.overfetch <= 4 * 16


@pytest.mark.parametrize("keys_ND", [massive(3000, 16), clustered(3000, 16) + 1000], ids=["massive", "far"])
def test_keys_far_from_the_origin_are_found_without_more_candidates(keys_ND):
    """Training, adding and searching are all by centred vectors, or codes and BLAS would see the distance only."""
    source = ArraySource(keys_ND)
    index = build_index(source, "IVF8,SQ8", k=20)
    trial = make_trial(source, Metric.L2, k=20, queries=100, rng=np.random.default_rng(1))
    assert run_trial(index, trial).recall > 0.93
    assert index.overfetch == 1.1


def test_seed_decides_the_lists():
    def content(seed):
        pieces, native = [], create_index("IVF8,Flat", 8, Metric.L2)
        native.train(clustered(400, 8), seed)
        native.write(pieces.append)
        return b"".join(pieces)

    assert content(1) == content(1) != content(2)


def test_nsg_gets_all_keys_at_once(monkeypatch):
    monkeypatch.setattr("index.build.BLOCK_BYTES", 4 * 8 * 100)
    assert len(build_index(ArraySource(clustered(400, 8)), "NSG8,Flat", k=5)) == 400


def test_auto_is_exact_for_few_keys():
    assert isinstance(build_index(ArraySource(clustered(50, 4)), "auto"), ExactIndex)


def test_auto_is_an_inverted_file_for_many(monkeypatch):
    monkeypatch.setattr("index.spec.EXACT_KEYS", 1000)
    monkeypatch.setattr("index.spec.EXACT_ELEMENTS", 1000)
    index = build_index(ArraySource(clustered(3000, 8)), "auto", k=10, memory_bytes=1 << 30)
    assert index.spec == "IVF32,PQ4x4fs"


@pytest.mark.parametrize("spec", ["exact", "Flat", "IVF1,Flat", "HNSW8,Flat"])
def test_a_single_key(spec):
    found = build_index(ArraySource(np.ones((1, 4), np.float32)), spec).search(np.zeros((2, 4), np.float32), 2)
    assert found.ids_QK.tolist() == [[0, -1]] * 2 and found.distances_QK[:, 0].tolist() == [4, 4]


@pytest.mark.parametrize(
    ("count", "spec", "error", "message"),
    [
        (0, "auto", TooFewKeys, "no keys to index"),
        (100, "IVF128,Flat", TooFewKeys, "at least 128 keys"),
        (100, "IVF4,PQ4", TooFewKeys, "at least 256 keys"),
        (100, "nonsense", UnknownSpec, "FAISS says: could not parse"),
        (100, "NSG16,PQ2x3", FaissFailed, "FAISS says"),
    ],
)
def test_what_cannot_be_built_is_one_line(count, spec, error, message):
    with pytest.raises(error, match=message) as caught:
        build_index(ArraySource(np.zeros((count, 4), np.float32)), spec, k=5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["IVF8,Flat", "Flat"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_keys_that_are_not_finite_are_named(monkeypatch, spec, value):
    monkeypatch.setattr("index.source.CENTRE_ROWS", 2)
    monkeypatch.setattr("index.build.BLOCK_BYTES", 4 * 4 * 30)
    keys_ND = clustered(100, 4)
    keys_ND[77, 2] = value
    with pytest.raises(InvalidKeys, match="key 77 holds NaN or infinity"):
        build_index(ArraySource(keys_ND), spec, k=5)


@pytest.mark.parametrize("target", [0, 1.5, -1])
def test_recall_target_is_a_share(target):
    with pytest.raises(InvalidQuery, match=f"recall_target is {target}"):
        build_index(ArraySource(clustered(10, 4)), recall_target=target)


def test_memory_that_is_not_enough_is_an_error_of_the_index():
    index = create_index("Flat", 4, Metric.L2)

    def full(_piece):
        raise MemoryError

    with pytest.raises(FaissFailed, match="not enough memory for this index; take one with smaller codes"):
        index.write(full)


def test_adding_before_training():
    with pytest.raises(NotTrained):
        create_index("IVF8,Flat", 4, Metric.L2).add(clustered(10, 4))


def test_unknown_search_parameter():
    with pytest.raises(FaissFailed, match="nprobe"):
        create_index("Flat", 4, Metric.L2).set_effort("nprobe", 4)
    with pytest.raises(FaissFailed, match="'verbose'"):
        create_index("IVF8,Flat", 4, Metric.L2).set_effort("verbose", 1)


def test_faiss_does_not_write_to_the_terminal(capfd):
    """It warns of few training points on standard error, which belongs to the command line."""
    build_index(ArraySource(clustered(300, 8)), "IVF64,PQ4x4", k=5)
    build_index(ArraySource(clustered(300, 8)), "PQ4x4", k=5)
    build_index(ArraySource(clustered(300, 8)), "OPQ2_4,IVF4,Flat", k=5)
    assert capfd.readouterr() == ("", "")

"""Inverted lists on disk: made in runs and by parts, they are those that FAISS makes at once in memory."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from index.build import add_keys, build_index
from index.errors import FaissFailed
from index.faiss_index import FaissIndex
from index.faiss_lists import ListStore
from index.metric import Metric
from index.source import ArraySource
from index.storage import open_index, save_index
from tests.vector_oracle import clustered

COUNT, DIM = 3000, 16
SPECS = [
    *("IVF16,Flat", "IVF16,SQ8", "IVF16,PQ4x4", "IVF16,PQ4", "IVF16,PQ8x4fs", "IVF16,PQ8x4fsr"),
    *("Pad18,IVF16,PQ9x4fs", "PCA8,IVF16,Flat", "IVF16_HNSW8,PQ8x4fs"),
]


@pytest.fixture(scope="module")
def keys_ND():
    return clustered(COUNT, DIM)


@pytest.fixture
def small_runs(monkeypatch):
    monkeypatch.setattr("index.build.RUN_BYTES", 1 << 13)
    monkeypatch.setattr("index.build.BLOCK_BYTES", 4 * DIM * 100)


def in_memory(built, keys_ND):
    """FAISS's own index with the same training, and all keys in its memory."""
    pieces = []
    built.native.write(pieces.append)
    native = faiss.deserialize_index(np.frombuffer(b"".join(pieces), np.uint8))
    native.reset()
    native.add(keys_ND - built.centre_D)
    return native


def check_same(built, native, queries_QD):
    """The same proposals, with the distances of the codes, to the bit; a projection's product depends on alignment."""
    if (effort := built.effort) is not None:
        for one in (built.native, FaissIndex(native)):
            one.set_effort(effort.name, 7)
    for k in (1, 30):
        distances_QK, ids_QK = built.native.search(queries_QD - built.centre_D, k)
        expected_QK, expected_ids_QK = native.search(queries_QD - built.centre_D, k)
        rounding = 1e-6 if isinstance(native, faiss.IndexPreTransform) else 0
        np.testing.assert_allclose(distances_QK, expected_QK, rtol=rounding)
        np.testing.assert_array_equal(ids_QK, expected_ids_QK)
    assert (ids_QK >= 0).all()


@pytest.mark.parametrize("spec", SPECS)
def test_runs_and_parts_are_one_index(spec, keys_ND, small_runs, tmp_path):
    queries_QD, runs = clustered(20, DIM, seed=5), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ListStore, "end_run", _noting(ListStore.end_run, runs))
        built = build_index(ArraySource(keys_ND[:2000]), spec, recall_target=None, scratch=tmp_path)
        assert len(runs) > 2
        save_index(built, tmp_path / "index")
        opened = open_index(tmp_path / "index", ArraySource(keys_ND[:2000]))
        for first, last in ((2000, 2001), (2001, 2500), (2500, 3000)):
            add_keys(opened, ArraySource(keys_ND[first:last]), scratch=tmp_path)
    check_same(opened, in_memory(built, keys_ND), queries_QD)
    check_same(built, in_memory(built, keys_ND[:2000]), queries_QD)


@pytest.mark.parametrize("spec", ["IVF16,SQ8", "IVF16,PQ8x4fs", "Pad18,IVF16,PQ9x4fs"])
def test_the_bytes_do_not_depend_on_the_runs(spec, keys_ND, small_runs, monkeypatch):
    runs = build_index(ArraySource(keys_ND), spec, recall_target=None)
    monkeypatch.setattr("index.build.RUN_BYTES", 1 << 28)
    at_once = build_index(ArraySource(keys_ND), spec, recall_target=None)
    np.testing.assert_array_equal(runs.native.lists, at_once.native.lists)


def _noting(work, seen):
    def noted(*given):
        seen.append(given)
        work(*given)

    return noted


def test_what_a_run_holds_in_memory_is_bounded(keys_ND, small_runs, monkeypatch, tmp_path):
    held, add = [], ListStore.add

    def watched(self, block_ND, lists_N):
        add(self, block_ND, lists_N)
        held.append(sum(codes_NB.nbytes + lists_N.nbytes for lists_N, codes_NB in self._run))

    monkeypatch.setattr(ListStore, "add", watched)
    build_index(ArraySource(keys_ND), "IVF16,SQ8", recall_target=None, scratch=tmp_path)
    assert len(held) == 30 and 1 << 11 < max(held) <= 1 << 12  # while a run is put together, it is there twice


def test_nothing_that_is_there_is_encoded_again(keys_ND, monkeypatch, tmp_path):
    save_index(build_index(ArraySource(keys_ND), "IVF16,PQ8x4fs", recall_target=None), tmp_path / "index")
    opened, added, add = open_index(tmp_path / "index", ArraySource(keys_ND)), [], ListStore.add
    monkeypatch.setattr(ListStore, "add", lambda self, *given: (added.append(len(given[0])), add(self, *given)))
    add_keys(opened, ArraySource(keys_ND[:40]), scratch=tmp_path)
    assert added == [40] and opened.indexed == COUNT + 40


def test_nothing_is_left_in_the_scratch_folder(keys_ND, small_runs, tmp_path):
    built = build_index(ArraySource(keys_ND), "IVF16,Flat", metric=Metric.IP, recall_target=None, scratch=tmp_path)
    assert not list(tmp_path.iterdir())
    assert (built.search(keys_ND[:5], 3).ids_QK >= 0).all()


@pytest.mark.parametrize("spec", ["IVF16,PQ8x4fs_64", "IVF16,PQ8x4fs,RFlat", "PQ8x4fs"])
def test_other_kinds_stay_in_the_memory_of_faiss(spec, keys_ND, small_runs, tmp_path):
    built = build_index(ArraySource(keys_ND), spec, recall_target=None, scratch=tmp_path)
    assert built.native.lists is None
    check_same(built, in_memory(built, keys_ND), clustered(20, DIM, seed=5))


def test_a_full_disk_is_an_error_of_the_disk_and_loses_no_key(keys_ND, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    built = build_index(ArraySource(keys_ND), "IVF16,Flat", recall_target=None)
    with monkeypatch.context() as patched:
        patched.setattr("index.faiss_lists._write", full)
        with pytest.raises(OSError, match="No space left"):
            add_keys(built, ArraySource(keys_ND[:50]))
    with pytest.raises(FaissFailed, match="cannot be found yet"):
        built.native.search(keys_ND[:1], 1)
    built.native.finish(None)
    assert sum(built.native._lists.mapped.sizes_L) == COUNT + 50


@pytest.mark.parametrize("spec", ["IVF16,Flat", "IVF16,PQ8x4fs"])
def test_no_keys_more_change_nothing(spec, keys_ND):
    built = build_index(ArraySource(keys_ND), spec, recall_target=None)
    before = built.native.lists
    add_keys(built, ArraySource(keys_ND[:0]))
    built.native.finish(None)
    assert built.native.lists is before
    check_same(built, in_memory(built, keys_ND), clustered(20, DIM, seed=5))


def test_encoding_and_packing_in_pieces_change_no_byte(keys_ND, monkeypatch):
    at_once = build_index(ArraySource(keys_ND), "IVF2,PQ8x4fs", recall_target=None)
    monkeypatch.setattr("index.faiss_lists.ENCODING_BYTES", 1)
    monkeypatch.setattr("index.faiss_lists.PACKED_CODES", 64)
    pieces = build_index(ArraySource(keys_ND), "IVF2,PQ8x4fs", recall_target=None)
    np.testing.assert_array_equal(at_once.native.lists, pieces.native.lists)


def test_an_emptied_index_is_filled_again(keys_ND):
    built = build_index(ArraySource(keys_ND), "IVF16,PQ8x4fs", recall_target=None)
    built.native.reset()
    assert len(built.native) == 0
    add_keys(built, ArraySource(keys_ND[:1000]))
    check_same(built, in_memory(built, keys_ND[:1000]), clustered(20, DIM, seed=5))

"""A bound of memory: read, compared with what is in use, and kept by building and searching, with the same results."""

from __future__ import annotations

import mmap
import shutil
from dataclasses import replace

import numpy as np
import pytest

from index.build import build_index
from index.exact import ExactIndex
from index.faiss_index import FaissIndex
from index.source import ArraySource
from knnlm import memory
from knnlm.config import KNNConfig, Settings
from knnlm.errors import InputError
from knnlm.knn.indexing import index_layer
from knnlm.knn.searcher import open_searcher
from knnlm.memory import LEAST_WORK, check_room, own_bytes, parse_size, work_bytes
from knnlm.store.datastore import Datastore
from knnlm.store.writer import DatastoreWriter
from tests.vector_oracle import clustered

KEYS, DIM, LAYER = 20_000, 32, "0.ffn_input"
MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2e9), ("512 MiB", 512 << 20), ("1.5GiB", 1.5 * (1 << 30)), (" 300kB ", 3e5), ("0.001TB", 1e9)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "2", "GB", "-1GB", "0GB", "1e9", "2 gb", "1GB2", "inf GB", "9" * 400 + "GB"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match=r"`memory` is .*, but is a number with kB, MB"):
        parse_size(text)


def test_own_memory_counts_what_is_written_to():
    # New pages of the system's: those of the allocator may have been written to before.
    with mmap.mmap(-1, 64 * MEGABYTE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        block, before = bytes(MEGABYTE), own_bytes()
        for _ in range(32):
            pages.write(block)
        assert 30 * MEGABYTE < own_bytes() - before < 40 * MEGABYTE


def test_a_bound_that_cannot_be_kept_says_what_is_needed(monkeypatch):
    monkeypatch.setattr(memory, "own_bytes", lambda: 10**9)
    check_room(None, 10**12)
    check_room(10**9 + 5 * 10**8 + LEAST_WORK, 5 * 10**8)
    with pytest.raises(InputError, match=r"`memory` is 1\.7 GB, .* take 1\.0 .* 0\.8; give 1\.8GB or more"):
        check_room(1.7e9, 5 * 10**8)
    check_room(parse_size("1.8GB"), 5 * 10**8)


def test_searches_get_what_is_left(monkeypatch):
    monkeypatch.setattr(memory, "own_bytes", lambda: 10**9)
    assert work_bytes(None, 7) == 7
    assert work_bytes(2e9, 1 << 40) == 10**9 and work_bytes(2e9, 300 << 20) == 300 << 20
    assert work_bytes(1.0, 1 << 40) == LEAST_WORK


class CountingSource(ArraySource):
    """Remembers the largest block that was asked for."""

    most_read = most_taken = 0

    def read(self, start, stop):
        self.most_read = max(self.most_read, stop - start)
        return super().read(start, stop)

    def take(self, ids_N):
        self.most_taken = max(self.most_taken, len(ids_N))
        return super().take(ids_N)


def test_building_holds_as_little_as_it_is_given(monkeypatch):
    source, trained, train = CountingSource(clustered(KEYS, DIM)), [], FaissIndex.train
    monkeypatch.setattr(
        FaissIndex, "train", lambda self, keys_ND, seed: (trained.append(keys_ND.nbytes), train(self, keys_ND, seed))
    )
    build_index(source, "IVF64,PQ8x4fs", recall_target=None, work_bytes=MEGABYTE)
    assert MEGABYTE // 8 < trained[0] <= MEGABYTE // 4
    assert source.most_read * 4 * DIM <= MEGABYTE // 16 and source.most_taken * 4 * DIM <= MEGABYTE // 4


def test_searching_holds_as_little_as_it_is_given(monkeypatch):
    source, proposed, propose = CountingSource(clustered(KEYS, DIM)), [], ExactIndex._propose
    index, queries_QD = ExactIndex(source, "l2"), clustered(300, DIM, seed=3)
    expected = index.search(queries_QD, 50)
    monkeypatch.setattr(
        ExactIndex, "_propose", lambda *given: (proposed.append(len(given[1]) * given[2]), propose(*given))[1]
    )
    source.most_read, index.work_bytes = 0, MEGABYTE
    found = index.search(queries_QD, 50)
    assert 48 * max(proposed) <= MEGABYTE // 4 and len(proposed) > 1
    assert 0 < source.most_read * 4 * DIM <= MEGABYTE // 16
    np.testing.assert_array_equal(found.ids_QK, expected.ids_QK)
    np.testing.assert_array_equal(found.distances_QK, expected.distances_QK)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Keys of 1.3 MB, in three parts."""
    folder, vectors_ND = tmp_path_factory.mktemp("large") / "store", clustered(KEYS, DIM)
    folder.mkdir()
    about = {"fingerprint": {"config": "a", "weights": "b", "tokenizer": "c"}, "context": 8, "stride": 4}
    with DatastoreWriter(folder, {LAYER: DIM}, part_rows=KEYS // 3, **about) as writer:
        for number, rows_ND in enumerate(np.array_split(vectors_ND, 20)):
            writer.begin_document(0, "a.txt", number)
            writer.append_values(np.arange(len(rows_ND), dtype=np.int32) % 50)
            writer.append_keys(LAYER, rows_ND)
        writer.finish()
    return folder


@pytest.mark.parametrize("index", ["exact", "IVF64,PQ8x4fs"])
def test_a_store_that_is_larger_than_the_bound(store, index, tmp_path, monkeypatch):
    # With a bound of 1 MB, of which nothing is in use. A sample of 2,048 keys fits into both quarters.
    monkeypatch.setattr(memory, "own_bytes", lambda: 0)
    monkeypatch.setattr(memory, "LEAST_WORK", 1)
    monkeypatch.setattr("index.spec.TRAINING_BYTES", MEGABYTE // 4)
    queries_QD, settings = clustered(300, DIM, seed=3), Settings(knn=KNNConfig(index=index, k=20))
    found = []
    for bound in (None, float(MEGABYTE)):
        folder = shutil.copytree(store, tmp_path / str(bound))
        report = index_layer(folder, LAYER, replace(settings, memory=bound))
        searcher = open_searcher(Datastore.open(folder), LAYER, "l2", memory=bound)
        assert bound is None or searcher.index.work_bytes == MEGABYTE
        found.append((report, searcher.neighbors(queries_QD, 20)))
    (first, without), (second, within) = found
    assert first == second and first.spec == index
    np.testing.assert_array_equal(without.ids_QK, within.ids_QK)
    np.testing.assert_array_equal(without.distances_QK, within.distances_QK)

"""Work that is shared out among threads: every item once, errors told, the threads of others as they were."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Barrier, Thread

import numpy as np
import pytest
import torch

from index.exact import ExactIndex
from index.faiss_index import thread_count, use_threads
from index.metric import Metric
from index.rerank import exact_distances
from index.source import ArraySource
from index.threads import share_out
from index.torch_threads import one_thread
from tests.vector_index.test_pruning import falling


@pytest.fixture(params=[1, 2, 5])
def threads(request) -> int:
    return request.param


@pytest.mark.parametrize("count", [0, 1, 7])
def test_each_item_is_taken_once(threads, count):
    done: list[int] = []

    def work(items: Iterator[int]) -> None:
        done.extend(items)

    share_out(range(count), work, threads)
    assert sorted(done) == list(range(count))


def test_all_threads_work_at_a_time(threads):
    together = Barrier(threads, timeout=20)

    def work(items: Iterator[int]) -> None:
        for _ in items:
            together.wait()

    share_out(range(3 * threads), work, threads)


def test_an_error_is_raised_when_all_have_ended(threads):
    done: list[int] = []

    def work(items: Iterator[int]) -> None:
        for item in items:
            if item == 1:
                raise ValueError("one")
            done.append(item)

    with pytest.raises(ValueError, match="one"):
        share_out(range(9), work, threads)
    assert sorted(done) == ([0] if threads == 1 else [0, *range(2, 9)])


def test_faiss_and_torch_use_one_thread_within_and_as_many_as_before_after():
    usual, within = torch.get_num_threads(), []
    torch.set_num_threads(3)
    before = thread_count()  # 3 as well, where both have one OpenMP library
    try:
        with one_thread():
            share = Thread(target=lambda: (use_threads(1), within.extend([thread_count(), torch.get_num_threads()])))
            share.start()
            share.join()
            assert torch.get_num_threads() == 1
        assert (within, torch.get_num_threads(), thread_count()) == ([1, 1], 3, before)
    finally:
        torch.set_num_threads(usual)


def test_pruned_search_is_shared_out_where_torch_and_faiss_have_one_library(monkeypatch):
    """Torch's one thread is FAISS's as well there: the number is asked for before it is set."""
    seen, share = [], share_out
    monkeypatch.setattr("index.exact.thread_count", lambda: 4 if torch.get_num_threads() == 3 else 1)
    monkeypatch.setattr("index.exact.share_out", lambda *given: (seen.append(given[2]), share(*given)))
    monkeypatch.setattr("index.exact.is_fast", lambda: True)
    monkeypatch.setattr("index.pruning.LEAST_PAIRS", 1)
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        ExactIndex(ArraySource(falling(100_000, 128)), Metric.L2).search(falling(500, 128, seed=1), 10)
    finally:
        torch.set_num_threads(usual)
    assert seen == [4]


def test_pruned_search_does_not_depend_on_threads(threads, monkeypatch):
    monkeypatch.setattr("index.exact.thread_count", lambda: threads)
    monkeypatch.setattr("index.exact.is_fast", lambda: True)
    monkeypatch.setattr("index.pruning.LEAST_PAIRS", 1)
    keys_ND, queries_QD = falling(8000, 64), falling(48, 64, seed=1)
    found = ExactIndex(ArraySource(keys_ND), Metric.L2).search(queries_QD, 10)
    due_QN = ((queries_QD[:, None].astype(np.float64) - keys_ND[None]) ** 2).sum(axis=2)
    assert np.allclose(found.distances_QK, np.sort(due_QN, axis=1)[:, :10], rtol=1e-5)
    assert (found.ids_QK == np.argsort(due_QN, axis=1, kind="stable")[:, :10]).all()


def test_exact_distances_do_not_depend_on_threads(threads, monkeypatch):
    monkeypatch.setattr("index.rerank.thread_count", lambda: threads)
    monkeypatch.setattr("index.rerank.KEY_BYTES", 4 * 8 * 16)
    rng = np.random.default_rng(0)
    keys_ND, queries_QD = rng.standard_normal((300, 8), np.float32), rng.standard_normal((20, 8), np.float32)
    ids_QC = rng.integers(-1, 300, (20, 40))
    found_QC = exact_distances(queries_QD, ids_QC, ArraySource(keys_ND), Metric.L2)
    due_QC = ((queries_QD[:, None].astype(np.float64) - keys_ND[ids_QC]) ** 2).sum(axis=2)
    assert np.allclose(found_QC, np.where(ids_QC < 0, np.inf, due_QC), rtol=1e-5)

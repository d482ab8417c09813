"""Work that is shared out among threads of Python: NumPy and FAISS let go of its lock while they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from index.faiss_index import use_one_thread

T = TypeVar("T")


def share_out(items: Sequence[T], work: Callable[[Iterator[T]], None], threads: int) -> None:
    """Call `work` in so many threads with one iterator for all: who is free takes the next item.

    FAISS itself then uses one thread in each. What `work` raises is raised here when all have ended.
    """
    shared, threads = iter(items), min(threads, len(items))
    if threads <= 1:
        work(shared)
        return
    with ThreadPoolExecutor(threads, initializer=use_one_thread) as pool:
        for running in [pool.submit(work, shared) for _ in range(threads)]:
            running.result()

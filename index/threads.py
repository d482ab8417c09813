"""Work spread over Python threads: NumPy and FAISS release the interpreter lock while they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from index.faiss_index import use_threads

T = TypeVar("T")


def share_out(items: Sequence[T], work: Callable[[Iterator[T]], None], threads: int) -> None:
    """Call `work` in several threads with one shared iterator: each free thread takes the next item.

    FAISS itself then uses one thread in each. An error of `work` is raised here when all threads have ended.
    """
    shared, threads = iter(items), min(threads, len(items))
    if threads <= 1:
        work(shared)
        return
    with ThreadPoolExecutor(threads, initializer=use_threads, initargs=(1,)) as pool:
        for running in [pool.submit(work, shared) for _ in range(threads)]:
            running.result()

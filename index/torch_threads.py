"""How many threads torch computes with."""

# ruff: noqa: TID251 - a door to torch, as `index.scan`
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """Make torch use one thread, in this thread and in those it starts during the block.

    On shared cores, threads wait for one another in small steps: 5 s instead of 0.1 for an eigenvalue problem.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

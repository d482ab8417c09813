"""SIGHUP, by which a server is told to take the newest generation; it waits while the model is loaded."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def hang_ups_wait() -> Iterator[None]:
    """Let a SIGHUP wait in the block until `take_hang_ups`; by itself it would end the process.

    Threads that start in the block never get one.
    """
    if not _may_come():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take_hang_ups(take: Callable[[], None]) -> None:
    """Call `take` in the running event loop for each SIGHUP, also for one that waits."""
    if _may_come():
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, take)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def _may_come() -> bool:
    """Other threads get no signals, and Windows has no SIGHUP."""
    return threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP")

"""Work in forks of this process, which can be killed at any moment and start at once: everything is imported already.

The parent never computes anything: a fork of a process whose thread pools run would hang.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Seconds after which a fork counts as hung: many, for a machine that others use too.
LIMIT_SECONDS = 900.0
# Keys of a part: a store of the campaign has several.
PART_ROWS = 1000
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Ended:
    """How a fork ended."""

    status: int
    """Exit status; if negative, minus the signal that ended it."""
    output: str
    """All that it wrote to standard output and standard error."""
    seconds: float
    hung: bool = False

    @property
    def traceback(self) -> bool:
        """Whether Python printed a traceback."""
        return TRACEBACK in self.output


def fork(work: Callable[[], object], *, kill_after: float | None = None) -> Ended:
    """Run a function in a fork.

    :param kill_after: seconds after which it is killed (SIGKILL), if it has not ended by then.
    """
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        child = os.fork()
        if not child:
            _work(work, log.fileno())
        status, hung = _wait(child, started, kill_after)
        seconds = time.perf_counter() - started
        log.seek(0)
        return Ended(status, log.read().decode(errors="replace"), seconds, hung)


def command(words: Sequence[object], *, kill_after: float | None = None) -> Ended:
    """Run knnlm's command line in a fork."""
    return fork(lambda: run_knnlm(words), kill_after=kill_after)


def run_knnlm(words: Sequence[object]) -> None:
    """Run knnlm's command line in this process."""
    from knnlm.cli import main

    sys.argv = ["knnlm", *map(str, words)]
    main()


def _work(work: Callable[[], object], log: int) -> None:
    """The fork's whole life."""
    status = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _wait(child: int, started: float, kill_after: float | None) -> tuple[int, bool]:
    """The exit status, or minus the signal, and whether it hung."""
    limit = LIMIT_SECONDS if kill_after is None else kill_after
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), False
        if time.perf_counter() - started > limit:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return os.waitstatus_to_exitcode(status), kill_after is None
        time.sleep(0.002)


def temporary(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A folder for one part of the campaign."""
    return tempfile.TemporaryDirectory(prefix=f"knnlm-torture-{prefix}-")


def load_everything() -> None:
    """Import what the verbs import, so that forks do not."""
    import faiss  # noqa: F401
    import torch

    import knnlm.cli.tables
    import knnlm.knn.indexing
    import knnlm.knn.retrieval
    import knnlm.model.loading
    import knnlm.pipeline
    import knnlm.report.html  # noqa: F401
    from knnlm.store import writer
    from tests import tiny_models  # noqa: F401

    torch.set_num_threads(1)
    writer.PART_ROWS = PART_ROWS

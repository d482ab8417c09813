"""Ray Core: connecting, tasks and what they need, and Ray's errors as ours. Only this module imports Ray."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from knnlm.errors import DatastoreError, InputError, KNNLMError, first_line, missing_library, not_installed

LOCAL, RUNNING = "local", "auto"
# Seconds after which an address that does not answer is refused; Ray itself tries for minutes.
CONNECT_SECONDS = 5.0
_ADVICE = "take local, auto (the one that runs on this machine) or HOST:PORT of its head"

Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a task keeps for itself while it runs."""

    cpus: int = 1
    gpus: int = 0


class Cluster:
    """A Ray cluster in use; made by `open_cluster`."""

    def __init__(self, ray: Any, *, trust_remote_code: bool = False) -> None:  # noqa: ANN401  (a module)
        self._ray = ray
        self.trust_remote_code = trust_remote_code
        """Whether workers may run Python code that comes with the model."""
        self._functions: dict[Callable[..., Any], Any] = {}

    @property
    def most_cpus(self) -> int:
        """CPUs of the largest machine: a task cannot need more."""
        return max(1, int(max((node.get("CPU", 0) for node in self._machines()), default=1)))

    def slots(self, need: Need) -> int:
        """Return how many such tasks can run at once now, at least 1."""
        found = 0
        for node in self._machines():
            cpus, gpus = node.get("CPU", 0) // need.cpus, node.get("GPU", 0) // max(1, need.gpus)
            found += int(min(cpus, gpus) if need.gpus else cpus)
        return max(1, found)

    def _machines(self) -> list[Mapping[str, float]]:
        """What each machine has."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def submit(
        self, function: Callable[Given, Result], need: Need, retries: int, *given: Given.args, **named: Given.kwargs
    ) -> Pending[Result]:
        """Have a module's function called by a worker process.

        It may be called more than once: after its process or its machine is lost, `retries` times at most. An error
        that it raises is not tried again.
        """
        placed = self._remote(function).options(
            num_cpus=need.cpus,
            num_gpus=need.gpus,
            max_retries=retries,
            retry_exceptions=False,
            scheduling_strategy="SPREAD",
        )
        return Pending(self._ray, placed.remote(*given, **named))

    def _remote(self, function: Callable[..., Any]) -> Any:  # noqa: ANN401  (Ray's own)
        """The function as Ray knows it, which is sent to the workers once."""
        if function not in self._functions:
            # A worker keeps what it has loaded: by default Ray ends one that uses a GPU after each task.
            self._functions[function] = self._ray.remote(max_calls=0)(function)
        return self._functions[function]

    def actor(self, kind: type, retries: int, *given: object) -> Actor:
        """Start a process with an object of a module's class.

        If it is lost, it is started anew, `retries` times at most, and what it was asked is asked again. It keeps no
        CPU for itself, as it waits most of the time: those of several datastores, or of a generation that is still in
        use, would wait for one another for ever.
        """
        placed = self._ray.remote(kind).options(
            num_cpus=0,
            max_restarts=retries,
            max_task_retries=retries,
            scheduling_strategy="SPREAD",
        )
        return Actor(self._ray, placed.remote(*given))

    def put(self, value: object) -> object:
        """Return a reference to a value that several calls are given: it is sent to each machine once."""
        return self._ray.put(value)


class Actor:
    """An object in a process of its own, which ends when this is let go."""

    def __init__(self, ray: Any, handle: Any) -> None:  # noqa: ANN401  (Ray's own)
        self._ray, self._handle = ray, handle

    def call(self, method: Callable[..., Result], *given: object) -> Pending[Result]:
        """Have a method of its class called with values, or references from `Cluster.put`."""
        return Pending(self._ray, getattr(self._handle, method.__name__).remote(*given))


class Pending(Generic[Result]):
    """A result that is awaited."""

    def __init__(self, ray: Any, reference: Any) -> None:  # noqa: ANN401  (Ray's own)
        self._ray, self._reference = ray, reference

    def result(self) -> Result:
        """Wait for it.

        :raises DatastoreError: workers died again and again. Errors of the function are raised as they are.
        """
        try:
            found: Result = self._ray.get(self._reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, KNNLMError):
                raise error.cause from None
            raise (error.cause or error) from error
        except self._ray.exceptions.RayError as error:
            raise DatastoreError(
                f"a Ray worker was lost more often than it is tried again ({_told(error)}); give the same command again"
            ) from error
        return found

    def cancel(self) -> None:
        """End it, whether or not it has begun, and wait until that is done."""
        self._ray.cancel(self._reference, force=True)
        self._ray.wait([self._reference], timeout=CONNECT_SECONDS)


@contextmanager
def open_cluster(address: str, *, trust_remote_code: bool = False) -> Iterator[Cluster]:
    """Connect to a Ray cluster, or start Ray on this machine, for the duration of the block.

    A session that is connected already is used as it is.

    :param address: `local`: Ray is started here and ended after the block; `auto`: the one that runs on this machine;
        else HOST:PORT of a cluster's head.
    :param trust_remote_code: workers may run Python code that comes with the model.
    :raises InputError: Ray is not installed, or there is no such cluster.
    """
    ray = _imported()
    if ray.is_initialized():
        yield Cluster(ray, trust_remote_code=trust_remote_code)
        return
    _connect(ray, address)
    try:
        yield Cluster(ray, trust_remote_code=trust_remote_code)
    finally:
        ray.shutdown()


def _imported() -> Any:  # noqa: ANN401  (a module)
    # No figures of use are sent to Ray's makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise InputError(not_installed("Ray", missing_library(error), "ray")) from error
    return ray


def _connect(ray: Any, address: str) -> None:  # noqa: ANN401  (a module)
    # Ray's log goes to its own files: what a task has to say is in its result or its error.
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if address == LOCAL:
        quiet["include_dashboard"] = False
    elif address != RUNNING:
        _check_address(address)
    ended_by = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise InputError(f"`address` is {address!r}, where Ray cannot be used ({_told(error)}); {_ADVICE}") from error
    finally:
        if ended_by is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ended_by)  # Ray's own ends the process without a word


def _check_address(address: str) -> None:
    """Refuse what is no address, or where nobody listens."""
    parts = re.fullmatch(r"\[?([^\s/\[\]]+)\]?:(\d{1,5})", address)
    if parts is None or not int(parts[2]) < 1 << 16:
        raise InputError(f"`address` is {address!r}, which is no address; {_ADVICE}")
    try:
        socket.create_connection((parts[1], int(parts[2])), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"`address` is {address!r}, where nothing answers ({error.strerror or error}); {_ADVICE}"
        ) from error


def _told(error: Exception) -> str:
    return first_line(error).rstrip(".")

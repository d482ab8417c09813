"""A server of a tiny kNN-LM on a port of its own, for tests that talk to it as its users do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Semaphore, Thread

import openai

from knnlm import KNNLM
from knnlm.knn.retrieval import Retrieval, open_retrieval
from knnlm.model.loading import load_model
from knnlm.server.app import create_app
from knnlm.server.limits import Limits
from knnlm.server.run import listen, serve
from knnlm.server.service import Service
from knnlm.store.datastore import Datastore

LAYER, K, TEMPERATURE, LAMBDA = "2.ffn_input", 64, 4.0, 0.6
NAME = "tiny"


class Paced:
    """A service's model that computes nothing unless it is told to."""

    def __init__(self, service: Service) -> None:
        self._turns, self._model = Semaphore(0), service.thread._model
        self._run, self._model.run = self._model.run, self._wait
        self.is_due = False
        """A forward pass waits for being allowed."""

    def _wait(self, *args):
        self.is_due = True
        assert self._turns.acquire(timeout=60)
        self.is_due = False
        return self._run(*args)

    def allow(self, passes: int) -> None:
        """Let it compute some forward passes."""
        self._turns.release(passes)


@dataclass
class Running:
    """A server that runs in a thread of this process."""

    service: Service
    url: str

    @contextmanager
    def client(self, key: str = "none", **options) -> Iterator[openai.OpenAI]:
        """The official client, which tries once."""
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, **options}) as client:
            yield client


def make_service(store: Path, name: str = NAME, **limits) -> Service:
    """A service of its own model, so that no test sees another's."""
    lm = load_model(Datastore.open(store).model)
    model = KNNLM.from_store(store, LAYER, K, TEMPERATURE, LAMBDA, lm=lm)
    return Service(name, lm, model, Limits(**limits), newest=lambda: newest(store))


def newest(store: Path, layer: str = LAYER) -> Retrieval:
    """What the newest generation of a datastore is searched with."""
    return open_retrieval(Datastore.open(store), layer, K, TEMPERATURE, LAMBDA)


@contextmanager
def running(service: Service, **options) -> Iterator[Running]:
    """Serve until the block ends; what still runs is finished."""
    listener, started = listen("127.0.0.1", 0), Event()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    app = create_app(service, **options)
    thread = Thread(target=serve, args=(app, service, listener, started.set))
    thread.start()
    try:
        assert started.wait(120)
        yield Running(service, url)
    finally:
        service.closing = True
        thread.join(60)
        assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what comes soon."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)

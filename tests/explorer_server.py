"""The explorer on a port of its own, as `knnlm serve` has it: one thread for the model, a key if there is one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from threading import Semaphore, Thread
from time import sleep

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: scripts/install serve")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: scripts/install serve")

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from knnlm.config import LayerConfig, Settings, TextConfig
from knnlm.inference.explain import Explainer
from knnlm.knn.retrieval import open_retrieval
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import build
from knnlm.server.explorer.routes import explorer_router
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import tiny_model, tiny_tokenizer

MARKUP = "<script>window.broken = 1</script><img src=x onerror='window.broken = 2'><b>bold</b> the nurse"
# A file may have any name too.
SOURCE = "<i>text<i>.jsonl"
# Such that the likeliest continuation is another one than with the fixed λ.
GATE = {"offset": 0.5, "distance": -0.6, "different": -0.8}
FITTED = {
    "1.ffn_input": {"k": 40, "temperature": 9.0, "lambda": 0.35},
    "2.ffn_input": {"k": 64, "temperature": 4.0, "lambda": 0.625, "gate": GATE},
}
SETTINGS = Settings(
    text=TextConfig(context=32, stride=16), layers=LayerConfig(layers=",".join(FITTED)), key_dtype="float32"
)


def make_explainer(folder: Path) -> Explainer:
    """Of a tiny GPT-2 with 128 positions, whose datastore has a document of markup, and two layers."""
    lm = LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="some/where/tiny")
    text = [write_jsonl(folder / SOURCE, [*texts(0, 6), MARKUP])]
    store = build(lm, text, folder / "tiny.knn", eval_text=text, settings=SETTINGS)
    store.update_manifest(fitted=FITTED)
    return Explainer(lm, open_retrieval(store, "2.ffn_input"))


@dataclass
class Running:
    """A server in a thread of this process."""

    explainer: Explainer
    api_key: str | None = None
    calls: list[str] = field(default_factory=list)
    """Paths that were asked for."""
    work: int = 0
    """Functions that the model's thread executed."""
    waiting: int = 0
    """Functions that it does not execute before they are released."""
    turns: Semaphore | None = None
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @contextmanager
    def held(self) -> Iterator[Semaphore]:
        """Let the model's thread execute nothing in the block but as many functions as are released."""
        self.turns = Semaphore(0)
        try:
            yield self.turns
        finally:
            self.turns = None

    async def _turn(self) -> None:
        self.waiting += 1
        try:
            while (turns := self.turns) is not None and not turns.acquire(blocking=False):
                await asyncio.sleep(0.005)
        finally:
            self.waiting -= 1

    def app(self) -> FastAPI:
        lock = asyncio.Lock()

        async def run(function, *, admitted=False):
            async with lock:
                await self._turn()
                self.work += 1
                return await asyncio.to_thread(function)

        app = FastAPI()
        app.include_router(explorer_router(lambda: self.explainer, run))

        @app.middleware("http")
        async def gate(request: Request, call_next):
            path = request.url.path
            self.calls.append(path)
            given = request.headers.get("authorization")
            if self.api_key and path.startswith("/explorer/") and given != f"Bearer {self.api_key}":
                return JSONResponse({"error": {"message": "no key", "type": "", "param": None, "code": None}}, 401)
            return await call_next(request)

        return app

    def ask(self, path: str, body: object = None, *, raw: bytes | None = None):
        """The status, the headers and the content of an answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        connection.request("GET" if data is None else "POST", path, data, headers)
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()
        return found


@contextmanager
def running(explainer: Explainer, **options) -> Iterator[Running]:
    found = Running(explainer, **options)
    server = uvicorn.Server(uvicorn.Config(found.app(), port=0, log_level="error", lifespan="off"))
    thread = Thread(target=server.run)
    thread.start()
    while not server.started:
        sleep(0.01)
    found.port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def explainer(tmp_path_factory):
    return make_explainer(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="module")
def server(explainer):
    with running(explainer) as found:
        yield found

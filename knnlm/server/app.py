"""The FastAPI application and its routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from knnlm.server import chat_wire, wire
from knnlm.server.answers import Answer
from knnlm.server.choices import Prompt
from knnlm.server.forms import Form
from knnlm.server.gate import RequestGate
from knnlm.server.metrics import CONTENT_TYPE
from knnlm.server.refusals import Refusal, invalid, mistake, no_json
from knnlm.server.service import Service
from knnlm.server.waiting import Deadline, Receive, unless_gone
from knnlm.version import __version__

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": wire.Error, "description": "Error in the request"},
    "5XX": {"model": wire.Error, "description": "Error of the server"},
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer; with `stream`, in chunks"}
}


def create_app(
    service: Service, *, api_key: str | None = None, only_local: bool = False, routers: Sequence[APIRouter] = ()
) -> FastAPI:
    """Return the server's application; the service's thread starts and stops with it.

    :param api_key: if given, /v1/ and /explorer/ require it as `Authorization: Bearer KEY`.
    :param only_local: refuse requests whose Host header does not name this machine.
    :param routers: additional routes, such as the explorer's.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.thread.start()
        yield
        await asyncio.to_thread(service.thread.stop, wait=not service.forced)

    # FastAPI's documentation pages would load scripts from another host; the schema itself is at /openapi.json.
    app = FastAPI(title="knnlm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    for router in (_routes(service), *routers):
        app.include_router(router)
    app.add_middleware(RequestGate, service=service, api_key=api_key, only_local=only_local)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)
    return app


def _routes(service: Service) -> APIRouter:
    router = APIRouter(responses=_ERRORS)
    model = wire.Model(id=service.name, created=service.created)

    @router.get("/healthz")
    async def healthz() -> wire.Health:
        """Report that the server accepts requests."""
        return wire.Health()

    @router.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE: {}}}})
    async def metrics() -> Response:
        """Metrics in the Prometheus text format."""
        thread = service.thread
        gauges = {"knnlm_choices_running": thread.running, "knnlm_choices_waiting": thread.waiting}
        return Response(service.metrics.text(gauges), headers={"content-type": CONTENT_TYPE})

    @router.get("/v1/models")
    async def models() -> wire.Models:
        """List the served model, the only one."""
        return wire.Models(data=[model])

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> wire.Model:
        """Return the served model by name."""
        service.check_model(name)
        return model

    @router.post("/v1/datastore/reload")
    async def reload(request: Request) -> wire.Reloaded:
        """Serve the newest generation of the datastore; requests that run are finished with theirs."""
        if "origin" in request.headers:  # browsers send a POST without a JSON body from any page, and ask nobody
            raise Refusal(403, "a web page must not reload the datastore; send this without Origin")
        now = await asyncio.to_thread(service.reload)
        return wire.Reloaded(id=service.name, generations=list(now.generations), keys=now.count)

    @router.post("/v1/completions", response_model=wire.Completion, responses=_STREAM)
    async def completions(asked: wire.CompletionRequest, request: Request) -> Any:  # noqa: ANN401 - a model or a response
        """Continue prompts."""
        service.check(asked)
        form = service.completion_form(asked)
        return await _answered(service, asked, partial(service.prompts, asked), form, request.receive)

    @router.post("/v1/chat/completions", response_model=chat_wire.ChatCompletion, responses=_STREAM)
    async def chat_completions(asked: chat_wire.ChatRequest, request: Request) -> Any:  # noqa: ANN401 - as above
        """Answer messages, formatted by the tokenizer's chat template."""
        service.check_chat(asked)
        form = service.chat_form(asked)
        return await _answered(service, asked, partial(service.chat_prompts, asked), form, request.receive)

    return router


async def _answered(
    service: Service, asked: wire.Sampling, prompts: Callable[[], list[Prompt]], form: Form, receive: Receive
) -> Response:
    """Answer a request, whole or as a stream.

    :param prompts: returns the prompts; run in another thread, as it tokenizes.
    """
    deadline = Deadline(service.limits.seconds)
    answer = Answer(service.thread, await deadline.wait(asyncio.to_thread(prompts)), service.name, form, deadline)
    if asked.stream:
        return _Stream(answer, usage=bool(asked.stream_options and asked.stream_options.include_usage))
    try:
        return Response(await unless_gone(receive, answer.whole()), media_type="application/json")
    finally:
        answer.close()


class _Stream(StreamingResponse):
    """A streamed answer that is closed however the response ends."""

    def __init__(self, answer: Answer, *, usage: bool) -> None:
        never_kept = {"cache-control": "no-cache"}
        super().__init__(answer.events(usage=usage), headers=never_kept, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, *args: Any) -> None:  # noqa: ANN401 - ASGI
        try:
            await super().__call__(*args)
        finally:
            self._answer.close()


def _respond(refusal: Refusal) -> Response:
    return Response(refusal.body, refusal.status, refusal.headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _respond(error)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _respond(invalid(error.errors()))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # raised by FastAPI for a body that cannot be read as JSON
        return _respond(no_json())
    known = {404: "there is no path {path} here", 405: "{path} is not for {method}"}
    told = known.get(error.status_code, error.detail).format(path=request.url.path, method=request.method)
    return _respond(Refusal(error.status_code, f"{told}; /openapi.json lists what there is", headers=error.headers))


async def _failed(_: Request, error: Exception) -> Response:
    return _respond(mistake())

"""Routes of the explorer: the page, and the API that it calls.

Only the model's thread may use the model: calls go through `run`, which the server provides.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from knnlm.errors import DatastoreError, InputError, KNNLMError
from knnlm.inference.continuing import Continuing
from knnlm.inference.detokenizer import Detokenizer
from knnlm.inference.explain import Explainer
from knnlm.knn.mixing import Mix
from knnlm.server.explorer import wire
from knnlm.server.limits import Limits
from knnlm.server.refusals import Refusal, invalid, no_json
from knnlm.server.waiting import Deadline, sent_events, unless_gone
from knnlm.server.wire import Error

T = TypeVar("T")
PAGE = Path(__file__).parent / "page"
# Only the page's own files and calls are allowed, so that corpus text injected as markup could load nothing.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": Error, "description": "Error"}}
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}, "description": "Tokens"}}


class Run(Protocol):
    """Runs a function on the model's thread; awaiting returns its result, and cancelling removes it from the queue.

    `admitted`: the function continues earlier work that was admitted, so a full queue must not refuse it.
    """

    def __call__(self, function: Callable[[], T], /, *, admitted: bool = False) -> Awaitable[T]: ...  # noqa: D102


def explorer_router(explainer: Callable[[], Explainer], run: Run, seconds: float = Limits.seconds) -> APIRouter:
    """Return the routes: the page at `/`, and below `/explorer/` its API, which alone reveals the datastore's text.

    :param explainer: returns that of the datastore's newest generation; called on the model's thread.
    :param seconds: time limit of an answer.
    """
    router = APIRouter(route_class=_Route, responses=_ERRORS)
    for path, name, kind in (
        ("/", "index.html", "text/html"),
        ("/explorer.css", "explorer.css", "text/css"),
        ("/explorer.js", "explorer.js", "text/javascript"),
    ):
        router.add_api_route(path, _file(name, kind), include_in_schema=False)

    async def answer(request: Request, work: Callable[[], dict[str, Any]]) -> Response:
        # JSON of a long text takes a moment, so it too is made on the model's thread and not on the event loop.
        made = Deadline(seconds).wait(run(lambda: _dump(work())))
        return Response(await unless_gone(request.receive, made), media_type="application/json", headers=_HEADERS)

    @router.get("/explorer/store")
    async def store(request: Request) -> Response:
        """Model, datastore, layers with their settings, and limits."""
        return await answer(request, lambda: wire.store_document(explainer()))

    @router.post("/explorer/explain")
    async def explain(asked: wire.ExplainRequest, request: Request) -> Response:
        """Return each token of a text with the data needed to mix the distributions again under other settings."""
        return await answer(request, lambda: _explained(explainer(), asked))

    @router.post("/explorer/sources")
    async def sources(asked: wire.SourcesRequest, request: Request) -> Response:
        """Return the text around rows of the datastore."""
        return await answer(request, lambda: _sources(explainer(), asked))

    @router.post("/explorer/overlaps")
    async def overlaps(asked: wire.OverlapsRequest, request: Request) -> Response:
        """Return the longest run of a text's tokens in each document."""
        return await answer(request, lambda: _overlaps(explainer(), asked))

    @router.post("/explorer/continue", response_class=StreamingResponse, responses=_EVENTS)
    async def go_on(asked: wire.ContinueRequest, request: Request) -> Response:
        """Stream new tokens, each an event with its explanation; the last has the finish reason, or an error."""
        deadline = Deadline(seconds)
        # Errors in the request are raised here, while the status can still be set.
        begun = deadline.wait(run(lambda: _Steps(explainer(), asked)))
        steps = await unless_gone(request.receive, begun)
        events = sent_events(_documents(steps, run, deadline))
        return StreamingResponse(events, media_type="text/event-stream", headers=_HEADERS)

    return router


class _Route(APIRoute):
    """A route whose errors have OpenAI's format, in any application."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return _refuse(invalid(error.errors()))
            except HTTPException:  # raised by FastAPI for a body in another encoding
                return _refuse(no_json())
            except Refusal as refusal:
                return _refuse(refusal)
            except DatastoreError as error:  # of a layer whose files are read only now
                return _refuse(Refusal(500, str(error), code="datastore_damaged"))
            except KNNLMError as error:
                return _refuse(Refusal(400, str(error)))

        return handler


def _refuse(refusal: Refusal) -> Response:
    return Response(refusal.body, refusal.status, {**refusal.headers, **_HEADERS})


def _file(name: str, kind: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    content = (PAGE / name).read_bytes()

    async def serve() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return serve


def _dump(document: object) -> str:
    """JSON in ASCII: received text that is quoted may hold lone surrogates, which UTF-8 cannot encode."""
    return json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _explained(explainer: Explainer, asked: wire.ExplainRequest) -> dict[str, Any]:
    if (asked.text is None) == (asked.tokens is None):
        raise InputError("give text or tokens, one of them")
    _check_generation(explainer, asked)
    tokens = explainer.encode(asked.text) if asked.text is not None else _checked(explainer, asked.tokens or [])
    _check_length(explainer, tokens)
    layer = _layer(explainer, asked.layer)
    evidence = [None, *explainer.evidence(tokens, layer)]
    told = {"layer": layer, "generation": wire.generation(explainer)}
    return {**told, **wire.texts_document(explainer, tokens, explainer.pieces(tokens), evidence)}


def _sources(explainer: Explainer, asked: wire.SourcesRequest) -> dict[str, Any]:
    _check_generation(explainer, asked)
    count = explainer.store.count
    if wrong := next((row for row in asked.rows if row >= count), None):
        raise InputError(f"row {wrong} is none of the datastore's {count}")
    return wire.sources_document(explainer, asked.rows)


def _overlaps(explainer: Explainer, asked: wire.OverlapsRequest) -> dict[str, Any]:
    _check_generation(explainer, asked)
    return wire.overlaps_document(explainer, _checked(explainer, asked.tokens))


class _Steps:
    """Events of one continuation, made on the model's thread; the first is made at once."""

    def __init__(self, explainer: Explainer, asked: wire.ContinueRequest) -> None:
        _check_generation(explainer, asked)
        tokens = _checked(explainer, asked.tokens)
        self._left = min(asked.max_new_tokens, wire.max_tokens(explainer) - len(tokens))
        layer = _layer(explainer, asked.layer)
        if self._left < 1:
            raise InputError(
                f"the text has {len(tokens)} tokens, and at most {wire.max_tokens(explainer)} are explained"
            )
        if asked.k > explainer.depth(layer):
            raise InputError(f"k is {asked.k}, but at most {explainer.depth(layer)} neighbours are searched for")
        own = explainer.retrieval(layer).setting
        moved = (own.gate, own.by_text) if asked.gated else (None, False)
        setting = Mix(asked.k, asked.temperature, asked.lam, *moved)
        self._explainer, self._text = explainer, Detokenizer(explainer.lm, tokens, ())
        self._continuing: Continuing = explainer.go_on(
            tokens, setting, layer, temperature=asked.temperature_lm, top_p=asked.top_p, seed=asked.seed
        )
        self._finish_reason: str | None = None
        self.first = self.next()

    def next(self) -> dict[str, Any] | None:
        """Return the next event; None after the last one."""
        if self._finish_reason is not None:
            return None
        new = self._continuing.step()
        self._left -= 1
        self._finish_reason = "stop" if new.ended else "length" if not self._left else None
        piece = self._text.put(new.token) + (self._text.rest() if self._finish_reason else "")
        told = wire.texts_document(self._explainer, [new.token], [piece], [new.evidence])
        return {**told, "finish_reason": self._finish_reason}


async def _documents(steps: _Steps, run: Run, deadline: Deadline) -> AsyncIterator[str]:
    """Yield a document for each step. Cancelled when the client disconnects; no further step is taken then."""
    event = steps.first
    while event is not None:
        yield _dump(event)
        event = await deadline.wait(run(steps.next, admitted=True))


def _check_generation(explainer: Explainer, asked: wire.OfGeneration) -> None:
    """:raises Refusal: rows and documents that the client knows are numbered otherwise by now."""
    if asked.generation not in (None, wire.generation(explainer)):
        message = "the server reads another generation of the datastore by now; explain the text again"
        raise Refusal(409, message, param="generation", code="other_generation")


def _checked(explainer: Explainer, tokens: list[int]) -> list[int]:
    _check_length(explainer, tokens)
    if wrong := next((token for token in tokens if token >= explainer.lm.vocabulary), None):
        raise InputError(f"token {wrong} is none of the model's {explainer.lm.vocabulary}; use its own tokenizer")
    return tokens


def _check_length(explainer: Explainer, tokens: list[int]) -> None:
    if len(tokens) > wire.max_tokens(explainer):
        raise InputError(f"the text has {len(tokens)} tokens, but at most {wire.max_tokens(explainer)} are explained")


def _layer(explainer: Explainer, layer: str | None) -> str:
    if layer is not None and layer not in explainer.store.layers:
        raise InputError(f"there is no layer {layer!r}; the datastore has {', '.join(explainer.store.layers)}")
    return layer or explainer.first

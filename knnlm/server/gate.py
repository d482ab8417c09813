"""Checks before any route: is the server shutting down, is the key right, is the body too large or too slow?"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

from knnlm.server.refusals import Refusal
from knnlm.server.service import Service
from knnlm.server.waiting import Deadline, Message, Receive

Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
# Paths that require the key, if there is one: all that reveal text of the datastore.
_LOCKED = ("/v1/", "/explorer/")
# Paths counted under their own names.
_TIMED = ("/v1/completions", "/v1/chat/completions")
_COUNTED = (*_TIMED, "/v1/models", "/v1/datastore/reload", "/healthz", "/metrics")


class RequestGate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: App, service: Service, api_key: str | None, only_local: bool) -> None:
        self._app, self._service, self._key, self._only_local = app, service, api_key, only_local

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, service = time.perf_counter(), self._service
        told: list[int] = []

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                told.append(message["status"])
            await send(message)

        try:
            await self._enter(scope, receive, counted)
        except Exception:
            told.append(500)  # the status that the application's last handler, outside of this, will send
            raise
        finally:
            path = scope["path"] if scope["path"] in _COUNTED else "other"
            status = next(iter(told), 499)  # the client went away before there was an answer
            service.metrics.count("knnlm_requests_total", path=path, status=str(status))
            if path in _TIMED:
                service.metrics.observe("knnlm_completion_seconds", time.perf_counter() - started)

    async def _enter(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
            body = await self._read_open(receive)
            self._check_open()
        except Refusal as refusal:
            await _answer(refusal, send)
            return
        if body is None:
            return
        # Counted only from here: a shutdown must not wait for a body that never comes.
        self._service.active += 1
        try:
            await self._app(scope, _again(body, receive), send)
        finally:
            self._service.active -= 1

    def _check_open(self) -> None:
        if self._service.closing:
            away = {"retry-after": "5", "connection": "close"}
            raise Refusal(503, "the server is shutting down", code="shutting_down", headers=away)

    def _check(self, scope: Message) -> None:
        self._check_open()
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"localhost").decode("latin-1")
        if self._only_local and not is_loopback(re.sub(r":\d*$", "", host).strip("[]")):
            # DNS rebinding: a foreign page whose name resolves to this machine would have the same origin.
            raise Refusal(403, f"without a key this server answers to names of this machine only, not to {host!r}")
        if self._key is not None and scope["path"].startswith(_LOCKED):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # The scheme's case does not matter (RFC 9110, section 11.1).
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key.encode()):
                message = "this needs the server's key, as Authorization: Bearer KEY; none or another one was given"
                raise Refusal(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    async def _read_open(self, receive: Receive) -> bytes | None:
        """As `_read`; a shutdown, which cancels the wait for the body, is a Refusal."""
        try:
            return await self._read(receive)
        except asyncio.CancelledError:
            self._check_open()
            raise

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client disconnected."""
        limits, parts, size = self._service.limits, [], 0
        deadline = Deadline(limits.seconds)
        while True:
            message = await deadline.wait(receive())
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limits.body_bytes:
                raise Refusal(
                    413, f"the body is longer than {limits.body_bytes} bytes", headers={"connection": "close"}
                )
            if not message.get("more_body"):
                return b"".join(parts)


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower().removesuffix(".") == "localhost"


def _again(body: bytes, receive: Receive) -> Receive:
    """Replay a body that was read, then pass on what follows: that the client disconnected."""
    due = [body]

    async def replay() -> Message:
        if due:
            return {"type": "http.request", "body": due.pop(), "more_body": False}
        return await receive()

    return replay


async def _answer(refusal: Refusal, send: Send) -> None:
    body = refusal.body
    headers = {**refusal.headers, "content-length": str(len(body))}
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})

"""The server process: listening, serving with uvicorn, shutting down."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from knnlm.errors import InputError
from knnlm.server.hang_ups import take_hang_ups
from knnlm.server.refusals import Refusal
from knnlm.server.service import Service

_IDLE = 2
"""Seconds that idle connections may stay open at shutdown."""


def listen(host: str, port: int) -> socket.socket:
    """Bind an address, so that it is reserved while the model is loaded; port 0 picks a free one.

    :raises InputError: the address cannot be bound.
    """
    if not 0 <= port < 1 << 16:
        raise InputError(f"`port` is {port}, but must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as failing:
            taken = failing.enter_context(socket.socket(family, kind, protocol))
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
            failing.pop_all()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"`host={host}` with `port={port}` cannot be taken: {reason}; give another one") from error
    return taken


def _ignore(line: str) -> None:
    """Say nothing."""


def serve(
    app: FastAPI,
    service: Service,
    listener: socket.socket,
    started: Callable[[], None],
    say: Callable[[str], None] = _ignore,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish running requests. SIGHUP serves the datastore's newest generation.

    :param started: called once the server accepts connections.
    :param say: called with one line when a generation has taken another one's place, or could not.
    :raises KeyboardInterrupt: a second signal came; running requests were not finished.
    """
    options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "lifespan": "on"}
    connection = partial(_Connection, seconds=service.limits.seconds)
    config = uvicorn.Config(app, http=connection, timeout_graceful_shutdown=_IDLE, **options)  # type: ignore[arg-type]
    server = _Server(config, service, started, say)
    server.run(sockets=[listener])
    if server.force_exit:
        raise KeyboardInterrupt


class _Connection(H11Protocol):
    """uvicorn's connection, closed when headers do not arrive in time, or when the client does not read what it asked.

    uvicorn itself waits for both without limit, and would keep a connection, with its answer, for each such client.
    """

    def __init__(self, *args: Any, seconds: float, **options: Any) -> None:  # noqa: ANN401 - uvicorn's own
        super().__init__(*args, **options)
        self._seconds = seconds
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    @property
    def _in_request(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request, whatever its annotation says
        return cycle is not None and not cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Start the timer at the first bytes of a request; stop it when its headers are complete."""
        if self._late is None and not self._in_request:
            self._wait()
        super().data_received(data)
        if self._in_request:
            self._wait_no_more()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._wait_no_more()
        self._watch_no_more()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the timer for what the client has to read."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """Stop the timer for what the client has to read."""
        self._watch_no_more()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in OpenAI's form."""
        refusal = Refusal(400, "this is no HTTP/1.1 request", headers={"connection": "close"})
        headers = [(name.encode(), value.encode()) for name, value in refusal.headers.items()]
        for event in (
            h11.Response(status_code=refusal.status, headers=headers, reason=b"Bad Request"),
            h11.Data(data=refusal.body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait(self) -> None:
        self._late = self.loop.call_later(self._seconds, self.transport.close)

    def _wait_no_more(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _watch(self) -> None:
        due = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(self._seconds, self._check_read, due)

    def _check_read(self, due: int) -> None:
        if self.transport.get_write_buffer_size() < due:
            self._watch()
        else:
            self.transport.abort()  # `close` would wait until all is read

    def _watch_no_more(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class _Server(uvicorn.Server):
    """uvicorn's server, which stops listening only when no request is running; until then new ones are refused."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        started: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(config)
        self._service, self._when_started, self._say, self._last = service, started, say, math.inf
        self._reloads: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, and call `started`."""
        await super().startup(sockets)
        take_hang_ups(self._begin_reload)
        self._when_started()

    def _begin_reload(self) -> None:
        task = asyncio.ensure_future(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        try:
            self._say(f"Serving {await asyncio.to_thread(self._service.reload)}")
        except Refusal as refusal:
            self._say(f"Not reloaded: {refusal}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to shut down. uvicorn itself would raise the signal again, and the exit status would not be 0."""
        self._service.forced = self.force_exit = self._service.closing
        self._service.closing = True
        self._last = time.monotonic() + self._service.limits.seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what is not waited for: running requests after a second signal or too long, and bodies that do not come.

        Their tasks end as if the client had gone, or with a 503. uvicorn itself would cancel them where they are, with
        a traceback and an answer of 500.
        """
        if self._service.active:
            for connection in self.server_state.connections:
                connection.transport.abort()
        else:
            for task in self.server_state.tasks:
                task.cancel()
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves it out, and then the application's end has a traceback
            await self.lifespan.shutdown()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to exit; called every 0.1 s. A client that does not read its answer is not waited for."""
        done = not self._service.active or time.monotonic() > self._last
        self.should_exit = self.force_exit or (self._service.closing and done)
        return await super().on_tick(counter)

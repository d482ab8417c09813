"""How long an answer is waited for: neither beyond its time nor when its client is gone. On the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from knnlm.server.refusals import Refusal, mistake, too_long

T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class Deadline:
    """So many seconds from now on."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, time.monotonic() + seconds

    async def wait(self, work: Awaitable[T]) -> T:
        """The result of some work, which is cancelled when the time is up.

        :raises Refusal: the time is up.
        """
        try:
            return await asyncio.wait_for(work, self._end - time.monotonic())
        except TimeoutError:
            raise too_long(self._seconds) from None


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled when the client goes away.

    :param receive: the request's, whose body was read.
    :raises Refusal: the client is gone, and nobody will read it.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(499, "the client went away")
        return await task
    finally:
        task.cancel()
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def sent_events(documents: AsyncIterator[str]) -> AsyncIterator[str]:
    """Server-sent events of documents. What goes wrong is the last event: the status is sent already."""
    try:
        async for document in documents:
            yield _event(document)
    except Refusal as refusal:
        yield _event(refusal.body.decode())
    except Exception:
        yield _event(mistake().body.decode())
        raise


def _event(data: str) -> str:
    return f"data: {data}\n\n"

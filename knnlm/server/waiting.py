"""Time limits, and cancellation when a client disconnects. Runs on the event loop."""

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
    """A point in time, `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, time.monotonic() + seconds

    async def wait(self, work: Awaitable[T]) -> T:
        """Return the result of some work, which is cancelled at the deadline.

        :raises Refusal: the deadline has passed.
        """
        try:
            return await asyncio.wait_for(work, self._end - time.monotonic())
        except TimeoutError:
            raise too_long(self._seconds) from None


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of some work, which is cancelled when the client disconnects.

    :param receive: ASGI's `receive` of the request, after its body.
    :raises Refusal: the client disconnected; nobody will read the refusal.
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
    """Documents as server-sent events. An error becomes the last event, as the status has already been sent."""
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

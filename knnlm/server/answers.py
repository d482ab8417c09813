"""From prompts to an answer, whole or streamed. Runs on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from uuid import uuid4

from knnlm.server.choices import Piece, Prompt
from knnlm.server.forms import Form, Head
from knnlm.server.model_thread import ModelThread
from knnlm.server.waiting import Deadline, sent_events
from knnlm.server.wire import Usage


class Answer:
    """The answer to one request while it is generated. The caller must close it.

    :raises Refusal: the queue is full.
    """

    def __init__(
        self, thread: ModelThread, prompts: Sequence[Prompt], model: str, form: Form, deadline: Deadline
    ) -> None:
        self._thread, self._prompts, self._form, self._deadline = thread, prompts, form, deadline
        self._head = Head(f"{form.prefix}{uuid4().hex}", int(time.time()), model)
        self._come: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._open = {choice for prompt in prompts for choice in prompt.numbers}
        self._tokens: dict[int, int] = {}
        loop = asyncio.get_running_loop()

        def emit(piece: Piece | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed, so nobody waits
                loop.call_soon_threadsafe(self._come.put_nowait, piece)

        for prompt in prompts:
            prompt.emit = emit
        thread.submit(prompts)

    def close(self) -> None:
        """Cancel what is still running or queued."""
        self._thread.cancel(self._prompts)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield pieces of the choices as they are generated.

        :raises Refusal: the time limit is reached. Exceptions of the model's thread are raised here too.
        """
        while self._open:
            piece = await self._deadline.wait(self._come.get())
            if isinstance(piece, Exception):
                raise piece
            self._tokens[piece.choice] = piece.tokens
            if piece.finish:
                self._open.discard(piece.choice)
            yield piece

    async def whole(self) -> str:
        """Wait for the whole answer and return it as JSON. Raises as `pieces`."""
        found: dict[int, list[Piece]] = {choice: [] for choice in self._open}
        async for piece in self.pieces():
            found[piece.choice].append(piece)
        ordered = [pieces for _, pieces in sorted(found.items())]
        return await asyncio.to_thread(self._whole, ordered)  # some MB take a moment

    def _whole(self, choices: Sequence[Sequence[Piece]]) -> str:
        return self._form.whole(self._head, choices, self._usage())

    def events(self, *, usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events; `usage` adds an event with the token counts."""
        return sent_events(self._documents(usage=usage))

    async def _documents(self, *, usage: bool) -> AsyncIterator[str]:
        async for piece in self.pieces():
            if piece.text or piece.scores or piece.finish:
                yield self._form.piece(self._head, piece)
        if usage:
            yield self._form.end(self._head, self._usage())
        yield "[DONE]"

    def _usage(self) -> Usage:
        read, generated = sum(len(prompt.tokens) for prompt in self._prompts), sum(self._tokens.values())
        return Usage(prompt_tokens=read, completion_tokens=generated, total_tokens=read + generated)

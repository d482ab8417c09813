"""From prompts to an answer, whole or in pieces. On the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from uuid import uuid4

from knnlm.server.choices import Piece, Prompt, TokenScore
from knnlm.server.model_thread import ModelThread
from knnlm.server.waiting import Deadline, sent_events
from knnlm.server.wire import Choice, Completion, Logprobs, Usage


class Answer:
    """The answer to one request, while it comes. Whoever makes one closes it.

    :raises Refusal: the queue is full.
    """

    def __init__(self, thread: ModelThread, prompts: Sequence[Prompt], model: str, deadline: Deadline) -> None:
        self._thread, self._prompts, self._model, self._deadline = thread, prompts, model, deadline
        self._id, self._created = f"cmpl-{uuid4().hex}", int(time.time())
        self._come: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._open = {choice for prompt in prompts for choice in prompt.numbers}
        self._tokens: dict[int, int] = {}
        loop = asyncio.get_running_loop()

        def emit(piece: Piece | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._come.put_nowait, piece)

        for prompt in prompts:
            prompt.emit = emit
        thread.submit(prompts)

    def close(self) -> None:
        """Nobody waits for it any more."""
        self._thread.cancel(self._prompts)

    async def pieces(self) -> AsyncIterator[Piece]:
        """What the choices gain, as it comes.

        :raises Refusal: the time is up. And whatever went wrong on the model's thread.
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
        """Wait for all of it, as JSON. Raises as `pieces`."""
        found: dict[int, list[Piece]] = {choice: [] for choice in self._open}
        async for piece in self.pieces():
            found[piece.choice].append(piece)
        ordered = [pieces for _, pieces in sorted(found.items())]
        return await asyncio.to_thread(self._document, ordered, self._usage())  # some MB take a moment

    def events(self, *, usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events; `usage` adds one with the number of tokens."""
        return sent_events(self._documents(usage=usage))

    async def _documents(self, *, usage: bool) -> AsyncIterator[str]:
        async for piece in self.pieces():
            if piece.text or piece.scores or piece.finish:
                yield self._document([[piece]], None)
        if usage:
            yield self._document([], self._usage())
        yield "[DONE]"

    def _document(self, choices: Sequence[Sequence[Piece]], usage: Usage | None) -> str:
        told = [self._choice(pieces) for pieces in choices]
        document = Completion(id=self._id, created=self._created, model=self._model, choices=told, usage=usage)
        return document.model_dump_json()

    def _choice(self, pieces: Sequence[Piece]) -> Choice:
        """Pieces of one choice as one."""
        scores = [score for piece in pieces for score in piece.scores]
        text, finish = "".join(piece.text for piece in pieces), pieces[-1].finish
        logprobs = None if self._prompts[0].wish.logprobs is None else _logprobs(scores)
        return Choice(index=pieces[-1].choice, text=text, logprobs=logprobs, finish_reason=finish)  # type: ignore[arg-type]

    def _usage(self) -> Usage:
        read, generated = sum(len(prompt.tokens) for prompt in self._prompts), sum(self._tokens.values())
        return Usage(prompt_tokens=read, completion_tokens=generated, total_tokens=read + generated)


def _logprobs(scores: Sequence[TokenScore]) -> Logprobs:
    return Logprobs(
        tokens=[score.token for score in scores],
        token_logprobs=[score.log_prob for score in scores],
        top_logprobs=[score.top for score in scores],
        text_offset=[score.offset for score in scores],
    )

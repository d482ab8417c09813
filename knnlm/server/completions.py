"""From prompts to an answer, whole or in pieces. On the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from uuid import uuid4

from knnlm.server.batching import ModelThread
from knnlm.server.choices import Piece, Prompt, TokenScore
from knnlm.server.refusals import Refusal, mistake, too_long
from knnlm.server.wire import Choice, Completion, Logprobs, Usage


class Answer:
    """The answer to one request, while it comes. Whoever makes one closes it.

    :param seconds: that it may take.
    :raises Refusal: the queue is full.
    """

    def __init__(self, thread: ModelThread, prompts: Sequence[Prompt], model: str, seconds: float) -> None:
        self._thread, self._prompts, self._model, self._seconds = thread, prompts, model, seconds
        self._deadline = time.monotonic() + seconds
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
            try:
                piece = await asyncio.wait_for(self._come.get(), self._deadline - time.monotonic())
            except TimeoutError:
                raise too_long(self._seconds) from None
            if isinstance(piece, Exception):
                raise piece
            self._tokens[piece.choice] = piece.tokens
            if piece.finish:
                self._open.discard(piece.choice)
            yield piece

    async def whole(self) -> Completion:
        """Wait for all of it. Raises as `pieces`."""
        found: dict[int, list[Piece]] = {choice: [] for choice in self._open}
        async for piece in self.pieces():
            found[piece.choice].append(piece)
        return self._document([_choice(pieces) for _, pieces in sorted(found.items())], self._usage())

    async def events(self, *, usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events; `usage` adds one with the number of tokens."""
        try:
            async for piece in self.pieces():
                if piece.text or piece.scores or piece.finish:
                    yield _event(self._document([_choice([piece])], None).model_dump_json())
            if usage:
                yield _event(self._document([], self._usage()).model_dump_json())
            yield _event("[DONE]")
        except Refusal as refusal:  # the status is sent already
            yield _event(refusal.body.decode())
        except Exception:
            yield _event(mistake().body.decode())
            raise

    def _document(self, choices: list[Choice], usage: Usage | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _usage(self) -> Usage:
        read, generated = sum(len(prompt.tokens) for prompt in self._prompts), sum(self._tokens.values())
        return Usage(prompt_tokens=read, completion_tokens=generated, total_tokens=read + generated)


def _choice(pieces: Sequence[Piece]) -> Choice:
    """Pieces of one choice as one."""
    scores = [score for piece in pieces for score in piece.scores]
    text, finish = "".join(piece.text for piece in pieces), pieces[-1].finish
    logprobs = _logprobs(scores) if scores else None
    return Choice(index=pieces[-1].choice, text=text, logprobs=logprobs, finish_reason=finish)  # type: ignore[arg-type]


def _logprobs(scores: Sequence[TokenScore]) -> Logprobs:
    return Logprobs(
        tokens=[score.token for score in scores],
        token_logprobs=[score.log_prob for score in scores],
        top_logprobs=[score.top for score in scores],
        text_offset=[score.offset for score in scores],
    )


def _event(data: str) -> str:
    return f"data: {data}\n\n"

"""The thread that owns the model: it continues choices in one batch, and runs other calls between steps.

Choices join and leave between steps (continuous batching), so that a short one does not wait for a long one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from threading import Condition, Thread
from typing import Any, TypeVar

from torch import Tensor

from knnlm.inference.batch import RowModel, RunningBatch
from knnlm.server.choices import AnswerChoice, Prompt
from knnlm.server.limits import Limits
from knnlm.server.metrics import Metrics
from knnlm.server.refusals import too_many

T = TypeVar("T")
# Most tokens, padding included, of prompts read in one forward pass.
_PREFILL_TOKENS = 4096


class ModelThread:
    """Takes prompts and calls from any thread; only its own thread uses the model."""

    def __init__(self, model: RowModel, limits: Limits, metrics: Metrics) -> None:
        self._model, self._limits, self._metrics = model, limits, metrics
        self._news = Condition()
        self._prompts: deque[Prompt] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], None]]] = deque()
        self._closed = False
        self._rows: list[tuple[Prompt, AnswerChoice]] = []
        self._batch: RunningBatch | None = None
        self._thread = Thread(target=self._work, name="knnlm-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, *, wait: bool = True) -> None:
        """End the thread after the current step, and wait for that."""
        with self._news:
            self._closed = True
            self._news.notify()
        if wait:
            self._thread.join()

    @property
    def running(self) -> int:
        """Number of choices being continued."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Number of choices and calls in the queue."""
        return sum(len(prompt.choices) for prompt in tuple(self._prompts)) + len(self._calls)

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Queue prompts, all or none.

        :raises Refusal: the queue is full.
        """
        with self._news:
            self.check_room(sum(len(prompt.choices) for prompt in prompts))
            self._prompts += prompts
            self._news.notify()

    def cancel(self, prompts: Sequence[Prompt]) -> None:
        """Cancel prompts: those in the queue leave at once, those in the batch before its next step."""
        with self._news:
            for prompt in prompts:
                prompt.cancelled = True
            self._prompts = deque(prompt for prompt in self._prompts if not prompt.cancelled)

    async def run(self, function: Callable[[], T], *, admitted: bool = False) -> T:
        """Run a function on the model's thread, between two steps, and return its result or raise its exception.

        Cancelling this removes the function from the queue.
        :param admitted: the function continues earlier work that was admitted, so a full queue does not refuse it.
        :raises Refusal: the queue is full.
        """
        future: Future[T] = Future()
        call = future, partial(_execute, function, future)
        with self._news:
            if not admitted:
                self.check_room(1)
            self._calls.append(call)
            self._news.notify()
        try:
            return await asyncio.wrap_future(future)
        finally:
            with self._news, suppress(ValueError):  # it began
                self._calls.remove(call)

    def check_room(self, more: int) -> None:
        """:raises Refusal: the queue has no room for `more` choices."""
        if self.waiting + more > self._limits.queue:
            raise too_many(self._limits.queue)

    def _work(self) -> None:
        while self._wait():
            with self._news:
                call = self._calls.popleft()[1] if self._calls else None
                prompts = self._next_prompts()
            if call:
                call()
            self._admit(prompts)
            self._guarded(self._step)
        for future, _ in self._calls:
            future.cancel()

    def _wait(self) -> bool:
        with self._news:
            self._news.wait_for(lambda: self._closed or self._calls or self._prompts or self._rows)
        return not self._closed

    def _admit(self, prompts: Sequence[Prompt]) -> None:
        """Let prompts join the batch. An error while reading them is passed only to them."""
        if not prompts:
            return
        try:
            batch, rows = self._read(prompts)
        except Exception as error:
            _tell(error, prompts)
        else:
            self._guarded(partial(self._join, batch, rows))

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do some work; an error, such as out of memory, is passed to all in the batch, and the thread continues."""
        try:
            work()
        except Exception as error:
            _tell(error, {prompt for prompt, _ in self._rows})
            self._rows, self._batch = [], None

    def _next_prompts(self) -> list[Prompt]:
        """Take the next prompts of the queue that fit into the batch and can be read together."""
        taken: list[Prompt] = []
        room = self._limits.batch - len(self._rows)
        while self._prompts and len(self._prompts[0].choices) <= room and _fits(self._prompts[0], taken):
            taken.append(self._prompts.popleft())
            room -= len(taken[-1].choices)
        return taken

    def _read(self, prompts: Sequence[Prompt]) -> tuple[RunningBatch, list[tuple[Prompt, AnswerChoice]]]:
        """Read prompts and choose first tokens; return a row for each choice that is not finished."""
        length = max(len(prompt.tokens) for prompt in prompts)

        def receive(start: int, log_probs_BTV: Tensor) -> None:
            if all(prompt.cancelled for prompt in prompts):
                raise _NobodyWaits
            for prompt, log_probs_TV in zip(prompts, log_probs_BTV, strict=True):
                prompt.score(start - length + len(prompt.tokens), log_probs_TV)

        tokens, retrievals = [prompt.tokens for prompt in prompts], [prompt.retrieval for prompt in prompts]
        batch, log_probs_BV = self._model.prefill(tokens, retrievals, receive if prompts[0].is_scored else None)
        self._metrics.count("knnlm_tokens_total", sum(map(len, tokens)), kind="prompt")
        rows = [(row, choice) for row, prompt in enumerate(prompts) for choice in prompt.choices]
        for prompt in prompts:
            prompt.begin()
        self._advance([(prompts[row], choice) for row, choice in rows], log_probs_BV[[row for row, _ in rows]])
        going_on = [(row, choice) for row, choice in rows if choice.finish is None]
        batch.select([row for row, _ in going_on])
        return batch, [(prompts[row], choice) for row, choice in going_on]

    def _join(self, batch: RunningBatch, rows: list[tuple[Prompt, AnswerChoice]]) -> None:
        self._rows = [*self._rows, *rows]
        if self._batch is not None and rows:
            self._batch.join(batch)
        elif rows:
            self._batch = batch

    def _step(self) -> None:
        """Generate a token for each choice; remove those that are finished or cancelled."""
        self._keep(lambda prompt, choice: not prompt.cancelled)
        if self._batch is not None:
            log_probs_BV = self._batch.step([choice.token for _, choice in self._rows])
            self._metrics.count("knnlm_steps_total")
            self._advance(self._rows, log_probs_BV)
            self._keep(lambda prompt, choice: choice.finish is None)

    def _advance(self, rows: Sequence[tuple[Prompt, AnswerChoice]], log_probs_BV: Tensor) -> None:
        due = [(row, log_probs_V) for row, log_probs_V in zip(rows, log_probs_BV.cpu(), strict=True)]
        for (prompt, choice), log_probs_V in due:
            if choice.finish is None:
                prompt.advance(choice, log_probs_V)
                self._metrics.count("knnlm_tokens_total", kind="generated")

    def _keep(self, stays: Callable[[Prompt, AnswerChoice], bool]) -> None:
        kept = [row for row, pair in enumerate(self._rows) if stays(*pair)]
        if self._batch is not None and len(kept) < len(self._rows):
            self._rows = [self._rows[row] for row in kept]
            self._batch.select(kept)
        if not self._rows:
            self._batch = None


class _NobodyWaits(Exception):
    """All prompts being read were cancelled."""


def _tell(error: Exception, prompts: Collection[Prompt]) -> None:
    for prompt in prompts:
        prompt.emit(error)


def _execute(function: Callable[[], T], future: Future[T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)


def _fits(prompt: Prompt, others: Sequence[Prompt]) -> bool:
    """Whether a prompt can be read with others: scored as they are, and not too many tokens with padding."""
    longest = max(len(one.tokens) for one in (prompt, *others))
    alike = all(one.is_scored == prompt.is_scored for one in others)
    return not others or (alike and longest * (len(others) + 1) <= _PREFILL_TOKENS)

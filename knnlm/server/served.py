"""What the server answers from: one generation of a datastore, until a newer one takes its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from knnlm.config import BATCH_TOKENS
from knnlm.errors import DatastoreMismatch, InputError, KNNLMError, ModelError
from knnlm.inference.copying import CopyGuard
from knnlm.inference.explain import Explainer
from knnlm.inference.model import KNNLM, check_fits
from knnlm.inference.store_text import text_bytes
from knnlm.knn.retrieval import Retrieval
from knnlm.layer_names import FINAL
from knnlm.memory import check_room, pass_bytes
from knnlm.model.lm import LanguageModel
from knnlm.server.refusals import Refusal


@dataclass(frozen=True)
class Served:
    """One generation as it was opened. A request keeps the one that it began with."""

    retrieval: Retrieval
    guard: CopyGuard | None
    """Against runs of its text that are longer than the server allows."""

    @property
    def count(self) -> int:
        """Number of its keys."""
        return self.retrieval.searcher.store.count

    @property
    def generations(self) -> tuple[int, ...]:
        """That of each datastore, in the order in which they were given."""
        return tuple(one.manifest.generation for one in self.retrieval.searcher.store.stores)

    def __str__(self) -> str:
        return f"generation {' + '.join(map(str, self.generations))} with {self.count:,} keys"


class Generations:
    """The generation that is served now, and how the newest one takes its place.

    :param newest: opens the newest generation; None: there is only the one of the model.
    :param max_copy: the longest run of generated tokens that may stand verbatim in one document.
    :param memory: bytes that the process may take.
    :raises InputError: `max_copy` is below 1, or `memory` cannot be kept.
    """

    def __init__(
        self,
        lm: LanguageModel,
        model: KNNLM,
        newest: Callable[[], Retrieval] | None,
        max_copy: int | None,
        memory: float | None = None,
    ) -> None:
        self._lm, self._citer, self._newest, self._max_copy = lm, model.citer, newest, max_copy
        self._memory, self._lock = memory, Lock()
        self._explainer: Explainer | None = None
        self.now = self._served(model.retrieval)
        """What requests that begin now are answered from."""

    def explainer(self) -> Explainer:
        """Return an explainer of what is served now, the same until a reload; for the model's thread."""
        found, now = self._explainer, self.now.retrieval
        if found is None or found.retrieval() is not now:
            found = self._explainer = Explainer(self._lm, now, citer=self._citer, memory=self._memory)
        return found

    def guard(self, retrieval: Retrieval, max_copy: int) -> CopyGuard:
        """Return a guard against runs of a generation's text."""
        return self._citer.copy_guard(retrieval.searcher.store, max_copy)

    def reload(self) -> Served:
        """Serve the newest generation from now on, and return it. For any thread: it takes seconds.

        :raises Refusal: it cannot be served; the one before still is. 409: it does not fit what is served, or another
            thread is at it. 503: it cannot be read.
        """
        if not self._lock.acquire(blocking=False):  # one that waited would keep a thread, which completions need
            message = "a reload is under way; ask again when it has ended"
            raise Refusal(409, message, code="reload_under_way", headers={"retry-after": "1"})
        try:
            self.now, self._explainer = self._open(), None
        except (KNNLMError, OSError) as error:
            wrong = isinstance(error, InputError | ModelError | DatastoreMismatch)
            status, code = (409, "datastore_mismatch") if wrong else (503, "datastore_unreadable")
            raise Refusal(status, f"{error}; {self.now} goes on being served", code=code) from error
        finally:
            self._lock.release()
        return self.now

    def _open(self) -> Served:
        if self._newest is None:
            raise InputError("this server was not told how to open its datastore again; start it anew")
        found = self._newest()
        check_fits(self._lm, found)
        if found.layer != (own := self.now.retrieval.layer):
            raise DatastoreMismatch(f"its layer is {found.layer} by now, but {own} is served; start the server anew")
        return self._served(found)

    def _served(self, retrieval: Retrieval) -> Served:
        # The generation before may still be in use, and is counted as such.
        store, work = retrieval.searcher.store, pass_bytes(self._lm.dims[FINAL], BATCH_TOKENS)
        check_room(self._memory, work + store.loaded_bytes + text_bytes(store))
        most = self._max_copy
        return Served(retrieval, None if most is None else self.guard(retrieval, most))

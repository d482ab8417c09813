"""Parts of a datastore made by Ray tasks: each gets the tokens of its part, writes files, and returns checksums.

Keys never pass through Ray's object store, and the process that plans holds the tokens of a few parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from knnlm.cluster.core import Cluster, Need, Pending
from knnlm.errors import DatastoreMismatch, InputError
from knnlm.extraction.collect import collect_part, first_vectors
from knnlm.locks import holds_lock
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.store.elsewhere import PartAlone, PartFrame, PartsElsewhere
from knnlm.store.manifest import MODEL_PARTS, PartEntry
from knnlm.text.windows import Window
from knnlm.version import __version__

# A part is tried anew where its worker or its machine is lost, as often as machines that may be taken away at any time
# are lost; one whose text makes every worker die ends in an error.
RETRIES = 10


@dataclass(frozen=True)
class WorkerModel:
    """How a worker loads the model, and what it has to be then."""

    name: str
    dtype: str
    device: str
    threads: int
    """Of one pass on CPUs: their number can change the last bit of a vector."""
    trust_remote_code: bool
    digests: tuple[str, ...]
    version: str

    @classmethod
    def of(cls, lm: LanguageModel, threads: int, *, trust_remote_code: bool) -> WorkerModel:
        """Return how to load a model as it is loaded here."""
        name = str(Path(lm.name).resolve()) if Path(lm.name).exists() else lm.name
        dtype = "auto" if getattr(lm.model, "is_quantized", False) else str(lm.dtype).removeprefix("torch.")
        return cls(name, dtype, lm.device.type, threads, trust_remote_code, _digests(lm.fingerprint), __version__)


class PartMaker:
    """Has the parts that a writer lacks made by Ray tasks, some ahead of the one that is awaited; a context manager.

    Parts are taken in their order, and their borders depend on the text alone. Leaving the block ends what still runs.
    """

    def __init__(self, cluster: Cluster, lm: LanguageModel, writer: PartsElsewhere, batch_tokens: int) -> None:
        self._cluster, self._lm, self._writer, self._batch_tokens = cluster, lm, writer, batch_tokens
        on_gpu = lm.device.type == "cuda"
        threads = 1 if on_gpu else min(torch.get_num_threads(), cluster.most_cpus)
        self._need = Need(cpus=threads, gpus=int(on_gpu))
        self._model = WorkerModel.of(lm, threads, trust_remote_code=cluster.trust_remote_code)
        self._waiting: deque[tuple[list[Window], Pending[PartEntry] | PartEntry | None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, part in self._waiting:
            if isinstance(part, Pending):
                part.cancel()
        self._waiting.clear()

    def __call__(self, parts: Iterator[Iterator[Window]]) -> Iterator[list[Window]]:
        """Yield the windows of each part once the writer has the part.

        :raises KNNLMError: a worker's error, such as a vector that cannot be stored.
        :raises DatastoreError: a part's workers are lost again and again.
        """
        left: Mapping[int, PartEntry] = {}
        for number, part in enumerate(parts):
            text = list(part)
            if number == 0:
                self._fix_frame(text)
                left = self._writer.left_behind()
            self._waiting.append((text, self._begun(number, text, left)))
            while len(self._waiting) > 2 * self._cluster.slots(self._need):
                yield self._taken()
        while self._waiting:
            yield self._taken()

    def _fix_frame(self, text: Sequence[Window]) -> None:
        """Every part needs the centres, which one process would take from its first batch."""
        writer = self._writer
        if writer.needs_frame:
            layers = () if writer.has_centres else writer.layers
            writer.fix_frame(first_vectors(self._lm, text, layers, self._batch_tokens) if layers else {})

    def _begun(
        self, number: int, text: list[Window], left: Mapping[int, PartEntry]
    ) -> Pending[PartEntry] | PartEntry | None:
        """The part's task; or the part, if it is there; None if the writer has it already."""
        if number < self._writer.stored_parts:
            return None
        if number in left:
            return left[number]
        frame = self._writer.part_frame
        return self._cluster.submit(
            make_part, self._need, RETRIES, self._model, frame, number, text, self._batch_tokens
        )

    def _taken(self) -> list[Window]:
        text, part = self._waiting[0]
        if part is not None:
            self._writer.take(part.result() if isinstance(part, Pending) else part)
        self._waiting.popleft()
        return text


def make_part(
    model: WorkerModel, frame: PartFrame, number: int, text: Sequence[Window], batch_tokens: int
) -> PartEntry:
    """Make one part in a worker process.

    :raises InputError: the datastore's folder is not on this machine, or another release of knnlm is.
    :raises DatastoreMismatch: the model here is another one.
    """
    if not holds_lock(frame.folder):
        raise InputError(f"{frame.folder} is not on all machines of the cluster; give `out` in a folder that all share")
    lm = _loaded(model)
    torch.set_num_threads(model.threads)
    with PartAlone(frame, number) as writer:
        collect_part(lm, text, tuple(frame.layers), writer, batch_tokens)
        return writer.finish_part()


@lru_cache(maxsize=1)
def _loaded(model: WorkerModel) -> LanguageModel:
    """The model, once for each worker process."""
    if model.version != __version__:
        raise InputError(
            f"knnlm is {__version__} on a machine of the cluster, but {model.version} here; take one release"
        )
    lm = load_model(model.name, dtype=model.dtype, device=model.device, trust_remote_code=model.trust_remote_code)
    if _digests(lm.fingerprint) != model.digests:
        raise DatastoreMismatch(f"{model.name} is another model on a machine of the cluster; give one that all share")
    return lm


def _digests(fingerprint: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(fingerprint[part] for part in MODEL_PARTS)

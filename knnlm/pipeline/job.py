"""Model, settings and progress of one call of a verb, and the text as windows for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from knnlm.cluster.core import Cluster
from knnlm.cluster.search import ClusterSearch
from knnlm.config import Settings
from knnlm.knn.searcher import OpenIndex
from knnlm.model.lm import LanguageModel
from knnlm.pipeline.plan import estimate_tokens, take_share
from knnlm.progress import Progress, toward
from knnlm.text.corpus import measured, read_documents, read_text_rows, text_bytes, thin, tokenize_measured
from knnlm.text.held_out import KEPT_BUDGETS, take_slices
from knnlm.text.windows import TokenDocument, WindowConfig, rows_to_groups, window_config

Paths = Sequence[str | Path]

# Of an evaluation text that is larger, as many tokens are read even for a small budget, so that the sections that it is
# taken in are longer than slices.
LEAST_READ = 8192


@dataclass(frozen=True)
class Job:
    """One call of a verb."""

    lm: LanguageModel
    settings: Settings
    progress: Progress
    cluster: Cluster | None = None
    """Where keys are made and searched; None: in this process."""

    @cached_property
    def opening(self) -> OpenIndex | None:
        """What opens the indexes that are searched; None: this process."""
        return None if self.cluster is None else ClusterSearch(self.cluster)

    @cached_property
    def window(self) -> WindowConfig:
        """Context and stride for this model. Raises as `window_config`."""
        return window_config(self.settings.text, self.lm.name, self.lm.context_limit)

    @property
    def batch_tokens(self) -> int:
        """Padded tokens in one forward pass."""
        return self.settings.text.batch_tokens(self.window.context)

    def documents(self, text: Paths, share: float = 1) -> Iterator[TokenDocument]:
        """Tokenised text, or a share of it: documents, or groups of rows, by protocol.

        `max_tokens` come evenly from all of the text; where its size is not known (a hub set), from its beginning.
        """
        config = self.settings.text
        if config.protocol == "documents":
            documents = read_documents(text, text_field=config.text_field)
            taken = take_share(self.lm, text, config)
            share = min(share, taken.share)
            wanted = documents if share >= 1 else thin(documents, share, section=taken.section)
            return tokenize_measured(wanted, self.lm.encode_with_ends, max_tokens=config.max_tokens)
        rows = read_text_rows(text, text_field=config.text_field)
        return rows_to_groups((measured(row, self.lm.encode_with_ends) for row in rows), self.window)

    def tell_what_is_taken(self, text: Paths) -> None:
        """Note where `max_tokens` are not taken evenly from all of the text."""
        config = self.settings.text
        if config.max_tokens and text_bytes(text, text_field=config.text_field) is None:
            self.progress.note(f"the size of a hub set is not known: the first {config.max_tokens:,} tokens are taken")

    def evaluation_documents(self, text: Paths) -> list[TokenDocument]:
        """The evaluation text, cut to its budget; groups of rows are never cut, as that would move their windows.

        Of a text of known size, a few times the budget is tokenised, evenly from all of it.
        """
        settings = self.settings
        budget = settings.evaluation.eval_tokens if settings.text.protocol == "documents" else None
        is_sized = text_bytes(text, text_field=settings.text.text_field) is not None
        most = KEPT_BUDGETS * max(budget, LEAST_READ) if budget and is_sized else None
        config = replace(settings.text, max_tokens=most)
        part = replace(self, settings=replace(settings, text=config))
        total = estimate_tokens(self.lm, text, config)
        with self.progress.stage("reading the evaluation text", "tokens") as advance:
            told = _told(part.documents(text), lambda tokens: toward(total, advance)(tokens, None))
            return take_slices(told, budget, seed=settings.seed)

    def record(self) -> Mapping[str, object]:
        """The settings as used, for the report."""
        lm, window = self.lm, self.window
        record: dict[str, object] = {"model": lm.name, "dtype": str(lm.dtype), "device": str(lm.device)}
        for name, group in asdict(self.settings).items():
            record |= group if isinstance(group, dict) else {name: group}
        return record | {"context": window.context, "stride": window.stride}


def _told(documents: Iterator[TokenDocument], tell: Callable[[int], None]) -> Iterator[TokenDocument]:
    tokens = 0
    for document in documents:
        yield document
        tokens += len(document.tokens)
        tell(tokens)


class Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Time the block as one phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start

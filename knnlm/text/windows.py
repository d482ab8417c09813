"""Windows over the tokens of documents, and batches of windows: arrays only, no files and no models.

Legend: B windows of a batch, T positions of the longest of them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knnlm.config import TextConfig, check_stride
from knnlm.errors import InputError
from knnlm.text.sizes import Sizes

PROTOCOLS = ("documents", "knn-transformers")


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """A document's tokens, and the origin of its text."""

    tokens: NDArray[np.int32]
    source: str
    """The file's base name, or the hub set."""
    number: int
    """Line, row or part in the source, from 1."""
    sizes: Sizes | None = None
    """Bytes and words that each token covers, if measured."""

    def part(self, first: int, last: int) -> TokenDocument:
        """Return tokens `first` to `last`, as a copy: a view would keep the whole document in memory."""
        tokens, sizes = self.tokens[first:last].copy(), self.sizes and self.sizes[first:last]
        return TokenDocument(tokens, self.source, self.number, sizes)


def target_sizes(documents: Iterable[TokenDocument]) -> Sizes | None:
    """Return the sizes of all tokens with a predecessor, in order; None if a document is not measured."""
    found = [one.sizes and one.sizes[1:] for one in documents if len(one.tokens) >= 2]
    measured = [one for one in found if one is not None]
    return Sizes.joined(measured) if len(measured) == len(found) else None


def count_targets(documents: Iterable[TokenDocument]) -> int:
    """Count tokens with a predecessor in their document: keys of a datastore, predictions of an evaluation."""
    return sum(max(len(document.tokens) - 1, 0) for document in documents)


class Fingerprint:
    """A running SHA-256 of documents' tokens and borders."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, document: TokenDocument) -> None:
        """Add a document; the order of documents matters, their sources do not."""
        self._hash.update(len(document.tokens).to_bytes(8, "little"))
        self._hash.update(np.ascontiguousarray(document.tokens, "<i4").data)

    def hexdigest(self) -> str:
        """Return the hash of all documents so far."""
        return self._hash.hexdigest()


@dataclass(frozen=True)
class WindowConfig:
    """Sliding windows of `context` tokens, with `stride` new ones in each after the first."""

    context: int
    stride: int
    protocol: str = "documents"
    """`documents`, or `knn-transformers`: that project's windows, for comparable figures."""

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise InputError(f"`protocol` is {self.protocol!r}, but must be one of {', '.join(PROTOCOLS)}")
        for name, value in (("context", self.context), ("stride", self.stride)):
            if value < 1:
                raise InputError(f"`{name}` is {value}, but must be at least 1 token")
        check_stride(self.stride, self.context)


@dataclass(frozen=True, eq=False)
class Window:
    """A stretch of one document that goes through the model at once."""

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]
    """The token after each input."""
    first: int
    """`targets[first:]` count here; those before counted in an earlier window."""
    document: int
    """Running number of the document, from 0, over documents that have windows."""
    start: int
    """Position of `inputs[0]` in the document."""
    source: str
    number: int


def unscored_window(tokens_T: NDArray[np.int32], *, start: int, source: str, number: int) -> Window:
    """Return an input without targets."""
    return Window(tokens_T, tokens_T[:0], 0, 0, start, source, number)


def windows(documents: Iterable[TokenDocument], config: WindowConfig) -> Iterator[Window]:
    """Slide over each document such that each token with a predecessor in it counts exactly once, in order.

    The first window counts all its targets; each further one starts `stride` later and counts the new ones: a counted
    token at position p has at least min(p, context - stride) tokens before it. Documents with fewer than two tokens
    have no windows.

    Under the protocol `knn-transformers`, a document is a group of rows (`rows_to_groups`), windows grow from `stride`
    to `context` tokens, the last token of each included, and each scores its last `stride`.
    """
    borders = _sliding if config.protocol == "documents" else _growing
    long_enough = (document for document in documents if len(document.tokens) >= 2)
    for number, document in enumerate(long_enough):
        counted = 0
        for start, stop in borders(len(document.tokens) - 1, config):
            yield Window(
                inputs=document.tokens[start:stop],
                targets=document.tokens[start + 1 : stop + 1],
                first=max(counted - start, 0),
                document=number,
                start=start,
                source=document.source,
                number=document.number,
            )
            counted = stop


def _sliding(targets: int, config: WindowConfig) -> Iterator[tuple[int, int]]:
    """First and last position of each window's inputs (design.md, section 6)."""
    for start in itertools.count(0, config.stride):
        stop = min(start + config.context, targets)
        yield start, stop
        if stop == targets:
            return


def _growing(targets: int, config: WindowConfig) -> Iterator[tuple[int, int]]:
    """As `_sliding`, for neulab/knn-transformers (run_clm.py, group_texts): windows end at multiples of the stride.

    A window there holds `context` tokens, of which the last is only a target.
    """
    for end in itertools.count(config.stride, config.stride):
        stop = min(end, targets + 1) - 1
        start = max(end - config.context, 0)
        if stop > start:
            yield start, stop
        if stop >= targets:
            return


def rows_to_groups(
    rows: Iterable[TokenDocument], config: WindowConfig, *, rows_per_group: int = 1000
) -> Iterator[TokenDocument]:
    """Concatenate every 1,000 rows of text, empty ones too, and drop the tail that fills no block of `context` tokens.

    A group with fewer tokens than one block is kept whole. Follows neulab/knn-transformers (run_clm.py, group_texts,
    under `datasets.map(batched=True)`).
    """
    rows = iter(rows)
    for number in itertools.count(1):
        group = list(itertools.islice(rows, rows_per_group))
        if not group:
            return
        tokens, sizes = np.concatenate([row.tokens for row in group]), [row.sizes for row in group if row.sizes]
        joined = Sizes.joined(sizes) if len(sizes) == len(group) else None
        last = len(tokens) // config.context * config.context or len(tokens)
        yield TokenDocument(tokens, group[0].source, number, joined).part(0, last)


@dataclass(frozen=True, eq=False)
class Batch:
    """Consecutive windows, padded on the right with token 0."""

    tokens_BT: NDArray[np.int64]
    lengths_B: NDArray[np.int64]
    windows: tuple[Window, ...]


def batches(windows: Iterable[Window], max_tokens: int) -> Iterator[Batch]:
    """Group consecutive windows while rows x longest row stays within `max_tokens`; a longer window is alone.

    :raises InputError: `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise InputError(f"a batch of {max_tokens} tokens cannot be; it must hold at least 1")
    return _batches(windows, max_tokens)


def _batches(windows: Iterable[Window], max_tokens: int) -> Iterator[Batch]:
    group: list[Window] = []
    longest = 0
    for window in windows:
        longer = max(longest, len(window.inputs))
        if group and longer * (len(group) + 1) > max_tokens:
            yield _pad(group)
            group, longer = [], len(window.inputs)
        group.append(window)
        longest = longer
    if group:
        yield _pad(group)


def _pad(group: Sequence[Window]) -> Batch:
    lengths_B = np.array([len(window.inputs) for window in group], np.int64)
    tokens_BT = np.zeros((len(group), lengths_B.max()), np.int64)
    for row, window in zip(tokens_BT, group, strict=True):
        row[: len(window.inputs)] = window.inputs
    return Batch(tokens_BT, lengths_B, tuple(group))


DEFAULT_CONTEXT = 1024


def window_config(text: TextConfig, model: str, limit: int | None) -> WindowConfig:
    """Return the settings of windows: by default the model's context, at most 1024 tokens, and half of it as stride.

    :param model: the model's name, for the error.
    :param limit: the model's context in tokens; None: no limit.
    :raises InputError: the context exceeds the model's limit, or the stride the context.
    """
    context = text.context or min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if limit is not None and context > limit:
        raise InputError(f"`context` is {context}, but {model} sees at most {limit} tokens; take that")
    return WindowConfig(context, text.stride or max(context // 2, 1), text.protocol)

"""From documents' tokens to windows, batches, held-out parts and slices: arrays only, no files and no models.

Legend: B windows of a batch, T positions of the longest of them.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knnlm.errors import InputError

PROTOCOLS = ("documents", "knn-transformers")
# With this many documents, whole ones are held out; with fewer, sections of them (a novel is one document).
ENOUGH_DOCUMENTS = 20
# Where a text is too short for sections of full length, they shrink down to this many tokens.
MIN_SECTION = 64
# Shorter slices leave too many tokens without the context that they would have in their document.
MIN_SLICE = 512
# Tokens that are kept of a stream to take slices from, in budgets; without a budget, more than any text has.
KEPT_BUDGETS = 4
NO_LIMIT = 1 << 60


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """One document's tokens, and where its text came from."""

    tokens: NDArray[np.int32]
    source: str
    """The file's base name, or the hub set."""
    number: int
    """Line, row or part in the source, from 1."""


def count_targets(documents: Iterable[TokenDocument]) -> int:
    """How many tokens have a predecessor in their document: keys of a datastore, predictions of an evaluation."""
    return sum(max(len(document.tokens) - 1, 0) for document in documents)


class Fingerprint:
    """A running SHA-256 over the tokens of documents and the borders between them."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, document: TokenDocument) -> None:
        """Add one document; the order of documents counts, their sources do not."""
        self._hash.update(len(document.tokens).to_bytes(8, "little"))
        self._hash.update(np.ascontiguousarray(document.tokens, "<i4").data)

    def hexdigest(self) -> str:
        """Of all documents so far."""
        return self._hash.hexdigest()


@dataclass(frozen=True)
class WindowConfig:
    """Sliding windows: `context` tokens that the model sees at once, `stride` new ones in each further window."""

    context: int
    stride: int
    protocol: str = "documents"
    """`documents`, or `knn-transformers`: that project's windows, for figures that can be compared."""

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise InputError(f"--protocol is {self.protocol!r}, but must be one of {', '.join(PROTOCOLS)}")
        for name, value in (("context", self.context), ("stride", self.stride)):
            if value < 1:
                raise InputError(f"--{name} is {value}, but must be at least 1 token")
        if self.stride > self.context:
            raise InputError(
                f"--stride {self.stride} is over --context {self.context}: tokens between windows would never be "
                "scored; take a stride of at most the context"
            )


@dataclass(frozen=True, eq=False)
class Window:
    """A stretch of one document that goes through the model at once."""

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]
    """The token after each input."""
    first: int
    """`targets[first:]` count here; those before it counted in an earlier window."""
    document: int
    """Running number of the document, from 0, over documents that have windows."""
    start: int
    """Position of `inputs[0]` in the document."""
    source: str
    number: int


def windows(documents: Iterable[TokenDocument], config: WindowConfig) -> Iterator[Window]:
    """Slide over each document, so that each token with a predecessor in it counts exactly once, in order.

    The first window counts all its targets, each further one starts `stride` later and counts what is new: a counted
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
    """The same for neulab/knn-transformers, run_clm.py, group_texts: windows end at multiples of the stride.

    Its windows hold `context` tokens, of which the last is a target only.
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

    A group with fewer tokens than one block is kept whole. So neulab/knn-transformers does (run_clm.py, group_texts,
    under `datasets.map(batched=True)`).
    """
    rows = iter(rows)
    for number in itertools.count(1):
        group = list(itertools.islice(rows, rows_per_group))
        if not group:
            return
        tokens = np.concatenate([row.tokens for row in group])
        if len(tokens) >= config.context:
            tokens = tokens[: len(tokens) // config.context * config.context]
        yield TokenDocument(tokens, group[0].source, number)


@dataclass(frozen=True, eq=False)
class Batch:
    """Consecutive windows, padded on the right with token 0."""

    tokens_BT: NDArray[np.int64]
    lengths_B: NDArray[np.int64]
    windows: tuple[Window, ...]


def batches(windows: Iterable[Window], max_tokens: int) -> Iterator[Batch]:
    """Group consecutive windows while rows x longest row stays within `max_tokens`; a longer window goes alone.

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


class HeldOut:
    """Training documents as a stream, and of the documents that the stream came past as many as are evaluated."""

    def __init__(self, parts: Iterable[tuple[bool, TokenDocument]], max_tokens: int | None, seed: int) -> None:
        self._kept = _Kept(max_tokens, seed)
        self.training = self._pass_on(parts)

    @property
    def evaluation(self) -> list[TokenDocument]:
        """The evaluation documents, as `take_slices` takes them; complete once `training` has run dry."""
        return self._kept.slices()

    def _pass_on(self, parts: Iterable[tuple[bool, TokenDocument]]) -> Iterator[TokenDocument]:
        for is_evaluation, document in parts:
            if is_evaluation:
                self._kept.add(document)
            else:
                yield document


def hold_out(documents: Iterable[TokenDocument], *, max_tokens: int | None = None, seed: int = 0) -> HeldOut:
    """`split_documents` as a stream of training documents, with `max_tokens` of the evaluation documents beside it.

    Memory holds a few times `max_tokens`, however long the text is; None keeps all. Raises as both functions.
    """
    return HeldOut(split_documents(documents, seed=seed), max_tokens, seed)


def split_documents(
    documents: Iterable[TokenDocument], *, share: float = 0.1, seed: int = 0, section: int = 4096, gap: int = 256
) -> Iterator[tuple[bool, TokenDocument]]:
    """Mark a share of the text as evaluation text, in one pass over it: (True, document) is to be held out.

    With at least 20 documents, every round(1 / share)-th is held out whole. With fewer, all are cut into sections of
    `section` to twice as many tokens (fewer where the text is short), every round(1 / share)-th section is held out,
    and up to `gap` tokens are dropped on each side of a border between the two kinds. The seed picks the first.

    :raises InputError: `share`, `section` or `gap` cannot be, or (when iterated) the text is too short.
    """
    if not 0 < share <= 0.5:
        raise InputError(f"the share to hold out is {share}, but must be over 0 and at most 0.5")
    if section < MIN_SECTION or gap < 0:
        raise InputError(f"section {section} and gap {gap}: they must be at least {MIN_SECTION} and 0 tokens")
    return _split_documents(iter(documents), round(1 / share), seed, section, gap)


def _split_documents(
    documents: Iterator[TokenDocument], period: int, seed: int, section: int, gap: int
) -> Iterator[tuple[bool, TokenDocument]]:
    peeked = list(itertools.islice(documents, ENOUGH_DOCUMENTS))
    if len(peeked) < ENOUGH_DOCUMENTS:
        yield from _split_sections(peeked, period, seed, section, gap)
        return
    # Within the documents that surely exist, so that one is held out however small the share.
    offset = _offset(period, ENOUGH_DOCUMENTS, seed)
    for number, document in enumerate(itertools.chain(peeked, documents)):
        yield number % period == offset, document


def _offset(period: int, count: int, seed: int) -> int:
    return int(np.random.default_rng(seed).integers(min(period, count)))


def _split_sections(
    documents: Sequence[TokenDocument], period: int, seed: int, section: int, gap: int
) -> Iterator[tuple[bool, TokenDocument]]:
    total = sum(len(document.tokens) for document in documents)
    section = min(section, max(MIN_SECTION, total // period))
    counts = [max(1, len(document.tokens) // section) for document in documents]
    if sum(counts) < 2:
        raise InputError(
            f"the text has {total} tokens in {len(documents)} document(s), too short to hold some out; "
            "give more text, or other text with --eval-text"
        )
    offset, seen = _offset(period, sum(counts), seed), 0
    for document, count in zip(documents, counts, strict=True):
        held_out = [number % period == offset for number in range(seen, seen + count)]
        yield from _cut_sections(document, held_out, section, min(gap, section // 8))
        seen += count


def _cut_sections(
    document: TokenDocument, held_out: Sequence[bool], section: int, gap: int
) -> Iterator[tuple[bool, TokenDocument]]:
    """Runs of sections of one kind as documents of their own, less the gaps at inner borders; the last has the rest."""
    end = 0
    for is_evaluation, run in itertools.groupby(held_out):
        begin, end = end, end + len(list(run))
        first = begin * section + (gap if begin else 0)
        last = end * section - gap if end < len(held_out) else len(document.tokens)
        yield is_evaluation, TokenDocument(document.tokens[first:last], document.source, document.number)


def take_slices(documents: Iterable[TokenDocument], max_tokens: int | None, *, seed: int) -> list[TokenDocument]:
    """Spread a budget of tokens over documents; all of them, whole, where they fit or `max_tokens` is None.

    Each document gives the same number of consecutive tokens from a random start, or all that it has. Where that
    would be fewer than 512, only documents evenly spread over the text give any. Memory holds a few times the budget.

    :raises InputError: `max_tokens` is below 2.
    """
    kept = _Kept(max_tokens, seed)
    for document in documents:
        kept.add(document)
    return kept.slices()


class _Kept:
    """Documents of a stream, enough of them to take slices from: all, up to `KEPT_BUDGETS` times the budget of tokens.

    Beyond that, all are cut to a common length, half of what it was, as long as that leaves more than a slice takes of
    a document; then documents are dropped, so that those kept stay evenly spread over the stream.
    """

    def __init__(self, max_tokens: int | None, seed: int) -> None:
        if max_tokens is not None and max_tokens < 2:
            raise InputError(f"--eval-tokens is {max_tokens}, but a token and its predecessor take at least 2")
        self._budget = max_tokens or NO_LIMIT
        self._limit = self._most = KEPT_BUDGETS * self._budget
        self._seed = seed
        self._rng = np.random.default_rng((seed, 1))  # not the numbers that `slices` draws
        self._offset = self._rng.random()
        self._seen, self._tokens, self._border = 0, 0, 1.0
        # The next to be dropped is first: minus its place in the golden order, its number, the document.
        self._heap: list[tuple[float, int, TokenDocument]] = []

    def add(self, document: TokenDocument) -> None:
        """Take in the stream's next document."""
        place = float(_golden_places(self._seen, self._offset))
        self._seen += 1
        if place >= self._border:
            return
        heapq.heappush(self._heap, (-place, self._seen, _slice(document, self._limit, self._rng)))
        self._tokens += min(len(document.tokens), self._limit)
        while self._tokens > self._most:
            self._shrink()

    def _shrink(self) -> None:
        shortest = min(self._budget, 2 * MIN_SLICE)
        if self._limit > shortest:
            self._limit = max(self._limit // 2, shortest)
            self._heap = [(place, number, _slice(one, self._limit, self._rng)) for place, number, one in self._heap]
            self._tokens = sum(len(document.tokens) for *_, document in self._heap)
            return
        place, _, dropped = heapq.heappop(self._heap)
        self._border = -place
        self._tokens -= len(dropped.tokens)

    def slices(self) -> list[TokenDocument]:
        """What `take_slices` gives of the documents so far, in their order."""
        documents = [document for _, _, document in sorted(self._heap, key=lambda entry: entry[1])]
        if self._tokens <= self._budget:
            return documents
        lengths = np.array([len(document.tokens) for document in documents], np.int64)
        rng = np.random.default_rng(self._seed)
        chosen = _spread(lengths, self._budget, rng)
        level = _water_level(lengths[chosen], self._budget)
        return [_slice(documents[number], level, rng) for number in chosen]


def _golden_places(numbers: int | NDArray[np.int64], offset: float) -> NDArray[np.float64]:
    """Multiples of the golden ratio, modulo 1: the numbers whose places are below any threshold are evenly spaced."""
    return np.asarray((numbers * (1 + 5**0.5) / 2 + offset) % 1)


def _spread(lengths: NDArray[np.int64], max_tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """As many documents as can give `MIN_SLICE` tokens (or all they have), evenly spaced, in order."""
    order = np.argsort(_golden_places(np.arange(len(lengths)), rng.random()), kind="stable")
    needed = np.cumsum(np.minimum(lengths[order], MIN_SLICE))
    count = max(1, int(np.searchsorted(needed, max_tokens, side="right")))
    return np.sort(order[:count])


def _water_level(lengths: NDArray[np.int64], max_tokens: int) -> int:
    """The largest c with sum(min(length, c)) <= max_tokens; the longest length if all fit."""
    ascending = np.sort(lengths)
    taken = np.concatenate([[0], np.cumsum(ascending)[:-1]])
    levels = (max_tokens - taken) // np.arange(len(lengths), 0, -1)
    over = np.flatnonzero(levels < ascending)
    return int(levels[over[0]] if len(over) else ascending[-1])


def _slice(document: TokenDocument, length: int, rng: np.random.Generator) -> TokenDocument:
    start = int(rng.integers(max(0, len(document.tokens) - length) + 1))
    # A copy: a view would keep the whole document in memory.
    return TokenDocument(document.tokens[start : start + length].copy(), document.source, document.number)

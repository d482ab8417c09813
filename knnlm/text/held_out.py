"""Held-out parts and slices of documents' tokens, from a stream that may be larger than memory."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from knnlm.errors import InputError
from knnlm.text.windows import TokenDocument

# With this many documents, whole ones are held out; with fewer, sections of them (a novel is one document).
ENOUGH_DOCUMENTS = 20
# Of a small share of few documents: shorter sections than a tenth has, so that there are several.
SHORT_SECTION = 1024
# Where a text is too short for sections of full length, they shrink down to this many tokens.
MIN_SECTION = 64
# In shorter slices too many tokens lack the context that they have in their document.
MIN_SLICE = 512
# Tokens of a stream kept to take slices from, in multiples of the budget; without a budget, more than any text has.
KEPT_BUDGETS = 4
NO_LIMIT = 1 << 60


class HeldOut:
    """A stream of training documents; collects the evaluation documents that it passes, up to the budget."""

    def __init__(self, parts: Iterable[tuple[bool, TokenDocument]], max_tokens: int | None, seed: int) -> None:
        self._kept = _Kept(max_tokens, seed)
        self.training = self._pass_on(parts)

    @property
    def evaluation(self) -> list[TokenDocument]:
        """The evaluation documents, cut as by `take_slices`; complete once `training` is exhausted."""
        return self._kept.slices()

    def _pass_on(self, parts: Iterable[tuple[bool, TokenDocument]]) -> Iterator[TokenDocument]:
        for is_evaluation, document in parts:
            if is_evaluation:
                self._kept.add(document)
            else:
                yield document


def hold_out(documents: Iterable[TokenDocument], *, max_tokens: int | None = None, seed: int = 0) -> HeldOut:
    """Split as `split_documents` does: a stream of training documents, and `max_tokens` of the evaluation documents.

    Memory holds a few times `max_tokens`, however long the text is; None keeps all. Raises as `split_documents` and
    `take_slices`.
    """
    return HeldOut(split_documents(documents, seed=seed), max_tokens, seed)


def keep_back(
    documents: Iterable[TokenDocument], *, share: float, max_tokens: int | None = None, seed: int = 0
) -> HeldOut:
    """As `hold_out`, of a small share of the text, by tokens: at least one document, however small the share.

    With at least 20 documents, whole ones: one of the first ten, and after as much text as that is the share of, the
    next. With fewer, sections of `SHORT_SECTION` tokens, as by `split_documents`.
    """
    return HeldOut(_mark_share(iter(documents), share, seed), max_tokens, seed)


def _mark_share(documents: Iterator[TokenDocument], share: float, seed: int) -> Iterator[tuple[bool, TokenDocument]]:
    # The parts of one document, such as `thin` takes of it, are on one side.
    wholes = (list(parts) for _, parts in itertools.groupby(documents, key=lambda one: (one.source, one.number)))
    peeked = list(itertools.islice(wholes, ENOUGH_DOCUMENTS))
    if len(peeked) < ENOUGH_DOCUMENTS:
        few = list(itertools.chain.from_iterable(peeked))
        yield from _split_sections(few, round(1 / share), seed, SHORT_SECTION, SHORT_SECTION // 8)
        return
    first = int(np.random.default_rng(seed).integers(ENOUGH_DOCUMENTS // 2))
    sizes = (sum(len(document.tokens) for document in parts) for parts in peeked[:first])
    seen, next_place = 0, float(sum(sizes))
    for parts in itertools.chain(peeked, wholes):
        tokens, is_kept_back = sum(len(document.tokens) for document in parts), seen >= next_place
        next_place += tokens / share if is_kept_back else 0
        seen += tokens
        for document in parts:
            yield is_kept_back, document


def split_documents(
    documents: Iterable[TokenDocument], *, share: float = 0.1, seed: int = 0, section: int = 4096, gap: int = 256
) -> Iterator[tuple[bool, TokenDocument]]:
    """Mark a share of the text as evaluation text, in one pass: (True, document) is held out.

    With at least 20 documents, every round(1 / share)-th is held out whole. With fewer, all are cut into sections of
    `section` to twice as many tokens (fewer where the text is short), every round(1 / share)-th section is held out,
    and up to `gap` tokens are dropped on each side of a border between the two kinds. The seed picks the first.

    :raises InputError: `share`, `section` or `gap` is out of range, or (when iterated) the text is too short.
    """
    if not 0 < share <= 0.5:
        raise InputError(f"the share to hold out is {share}, but must be over 0 and at most 0.5")
    if section < MIN_SECTION or gap < 0:
        raise InputError(f"section {section} and gap {gap}: they must be at least {MIN_SECTION} and 0 tokens")
    return _split_documents(iter(documents), round(1 / share), seed, section, gap)


def _split_documents(
    documents: Iterator[TokenDocument], period: int, seed: int, section: int, gap: int
) -> Iterator[tuple[bool, TokenDocument]]:
    # The parts of one document, such as `thin` takes of it, are on one side.
    wholes = (list(parts) for _, parts in itertools.groupby(documents, key=lambda one: (one.source, one.number)))
    peeked = list(itertools.islice(wholes, ENOUGH_DOCUMENTS))
    if len(peeked) < ENOUGH_DOCUMENTS:
        yield from _split_sections(list(itertools.chain.from_iterable(peeked)), period, seed, section, gap)
        return
    # Among the documents known to exist, so that at least one is held out however small the share.
    offset = _offset(period, ENOUGH_DOCUMENTS, seed)
    for number, parts in enumerate(itertools.chain(peeked, wholes)):
        for document in parts:
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
            "give more text, or other text with `eval_text`"
        )
    offset, seen = _offset(period, sum(counts), seed), 0
    for document, count in zip(documents, counts, strict=True):
        held_out = [number % period == offset for number in range(seen, seen + count)]
        yield from _cut_sections(document, held_out, section, min(gap, section // 8))
        seen += count


def _cut_sections(
    document: TokenDocument, held_out: Sequence[bool], section: int, gap: int
) -> Iterator[tuple[bool, TokenDocument]]:
    """Runs of sections of one kind as separate documents, without the gaps at inner borders; the last has the rest."""
    end = 0
    for is_evaluation, run in itertools.groupby(held_out):
        begin, end = end, end + len(list(run))
        first = begin * section + (gap if begin else 0)
        last = end * section - gap if end < len(held_out) else len(document.tokens)
        yield is_evaluation, document.part(first, last)


def take_slices(documents: Iterable[TokenDocument], max_tokens: int | None, *, seed: int) -> list[TokenDocument]:
    """Spread a budget of tokens over documents; all of them, whole, if they fit or `max_tokens` is None.

    Each document gives the same number of consecutive tokens from a random start, or all that it has. If that were
    fewer than 512, a subset of documents, spread evenly over the text, is used. Memory holds a few times the budget.

    :raises InputError: `max_tokens` is below 2.
    """
    kept = _Kept(max_tokens, seed)
    for document in documents:
        kept.add(document)
    return kept.slices()


def take_sample(documents: Iterable[TokenDocument], max_tokens: int, *, run: int, seed: int) -> list[TokenDocument]:
    """As `take_slices`, from documents cut into runs of at most `run` tokens: a novel gives many slices, not one.

    The slices of one text are few clusters or many as its documents are; none has more than `run` tokens.
    """
    runs = (
        document.part(start, start + run) for document in documents for start in range(0, len(document.tokens), run)
    )
    return take_slices(runs, max_tokens, seed=seed)


class _Kept:
    """The part of a stream that slices are taken from: all documents, up to `KEPT_BUDGETS` times the token budget.

    Beyond that, the length to which all are cut is halved while it stays above that of a slice; then documents are
    dropped, such that those kept stay evenly spread over the stream.
    """

    def __init__(self, max_tokens: int | None, seed: int) -> None:
        if max_tokens is not None and max_tokens < 2:
            raise InputError(f"`eval_tokens` is {max_tokens}, but a token and its predecessor take at least 2")
        self._budget = max_tokens or NO_LIMIT
        self._limit = self._most = KEPT_BUDGETS * self._budget
        self._seed = seed
        self._rng = np.random.default_rng((seed, 1))  # not the numbers that `slices` draws
        self._offset = self._rng.random()
        self._seen, self._tokens, self._border = 0, 0, 1.0
        # The next to be dropped is first: minus its place in the golden order, its number, the document.
        self._heap: list[tuple[float, int, TokenDocument]] = []

    def add(self, document: TokenDocument) -> None:
        """Add the stream's next document."""
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
        """Return the slices of the documents so far, in their order, as `take_slices` does."""
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
    return document.part(start, start + length)

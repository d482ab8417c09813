"""Segments of a text: stretches of equal length that do not overlap, each inside one document.

A shorter rest is left out: length affects both perplexity and dispersion, and would correlate the two.

Legend: S segments, T tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knnlm.errors import InputError
from knnlm.text.windows import TokenDocument


@dataclass(frozen=True, eq=False)
class Segment:
    """`context` consecutive tokens of one document."""

    tokens_T: NDArray[np.int32]
    document: int
    """Running number of the document, from 0."""
    start: int
    """Position of the first token in the document."""
    source: str
    number: int


def check_context(context: int, model: str, limit: int | None, *, field: str = "context") -> None:
    """Raise InputError, before the model is loaded, if a segment exceeds its context."""
    if limit is not None and context > limit:
        raise InputError(f"`{field}` is {context}, but {model} sees at most {limit} tokens; take that or less")


def cut_segments(documents: Iterable[TokenDocument], context: int) -> Iterator[Segment]:
    """Yield all segments of `context` tokens, in the order of the text.

    :raises InputError: `context` is below 2, which leaves no token to predict.
    """
    if context < 2:
        raise InputError(f"`context` is {context}, but a segment needs at least 2 tokens, one to predict the other")
    for number, document in enumerate(documents):
        for start in range(0, len(document.tokens) - context + 1, context):
            # A copy: a view would keep the whole document in memory.
            tokens_T = document.tokens[start : start + context].copy()
            yield Segment(tokens_T, number, start, document.source, document.number)


def sample_segments(
    segments: Iterable[Segment], limit: int, *, seed: int, remedy: str = "longer documents"
) -> list[Segment]:
    """Sample at most `limit` segments uniformly (Vitter 1985, algorithm R), in the order of the text.

    :param remedy: further advice in the error message.
    :raises InputError: there are no segments.
    """
    rng = np.random.default_rng(seed)
    kept: list[Segment] = []
    for number, segment in enumerate(segments):
        if number < limit:
            kept.append(segment)
        elif (slot := int(rng.integers(number + 1))) < limit:
            kept[slot] = segment
    if not kept:
        raise InputError(f"no document of the text is as long as one segment; take a smaller `context`, or {remedy}")
    return sorted(kept, key=lambda segment: (segment.document, segment.start))

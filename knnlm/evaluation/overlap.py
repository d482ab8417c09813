"""Share of the evaluation text that is also in the datastore: a datastore that holds the answers flatters perplexity.

Legend: N tokens of a stream, E evaluation n-grams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from knnlm.progress import Advance, Progress
from knnlm.store.joint import AnyStore
from knnlm.text.windows import TokenDocument

# Tokens hashed at once; their hashes take 8 MB.
CHUNK_TOKENS = 1 << 20
# Any odd multiplier with well mixed bits; this is 2**64 divided by the golden ratio.
BASE = np.uint64(0x9E3779B97F4A7C15)


def overlap(evaluation: Sequence[TokenDocument], training: Iterable[NDArray[np.int32]], *, n: int = 13) -> float:
    """Share (0 to 1) of the evaluation documents' n-grams that also occur in the training tokens.

    n-grams are compared by 64-bit hashes; the probability of a false match is about E·N / 2**64. The training arrays
    are read as one stream, so n-grams that span two arrays count, as do those that span two documents, which match only
    by chance. 13 tokens is the usual length for contamination checks (Brown et al. 2020, appendix C).

    :param training: consecutive pieces of the datastore's value stream, of any lengths, memory maps included.
    :return: 0.0 when no evaluation document has n tokens.
    """
    hashes = [_ngram_hashes(document.tokens, n) for document in evaluation]
    grams_E, counts_E = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]), return_counts=True)
    if not len(grams_E):
        return 0.0
    found_E = np.zeros(len(grams_E), bool)
    for tokens_N in _chunks(training, n):
        # Sorted queries walk through the table in order, which is several times faster than at random.
        seen = np.sort(_ngram_hashes(tokens_N, n))
        places = np.minimum(np.searchsorted(grams_E, seen), len(grams_E) - 1)
        found_E[places[grams_E[places] == seen]] = True
    return float(counts_E[found_E].sum() / counts_E.sum())


def _chunks(arrays: Iterable[NDArray[np.int32]], n: int) -> Iterator[NDArray[np.int32]]:
    """Pieces of bounded size, each preceded by the last n - 1 tokens of the one before, so that no n-gram is lost."""
    carry = np.empty(0, np.int32)
    for array in arrays:
        for start in range(0, len(array), CHUNK_TOKENS):
            piece = np.concatenate([carry, array[start : start + CHUNK_TOKENS]])
            carry = piece[max(0, len(piece) - (n - 1)) :]
            yield piece


def _ngram_hashes(tokens_N: NDArray[np.int32], n: int) -> NDArray[np.uint64]:
    """Polynomial hash modulo 2**64 of each n-gram [max(0, N - n + 1)]; tokens are mixed first."""
    count = max(0, len(tokens_N) - n + 1)
    mixed_N = _mix(tokens_N.astype(np.uint64))
    hashes = np.zeros(count, np.uint64)
    for offset in range(n):
        hashes *= BASE
        hashes += mixed_N[offset : offset + count]
    return hashes


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): small token ids become 64 random-looking bits."""
    values = (values + BASE).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# Share of shared 13-grams from which a warning is given.
OVERLAP_SHARE = 0.02
# Values searched between two updates of the progress bar.
OVERLAP_TOKENS = 1 << 20


def overlap_warning(documents: Sequence[TokenDocument], store: AnyStore, progress: Progress) -> tuple[str, ...]:
    """Return a warning if the datastore holds part of the evaluation text."""
    with progress.stage("looking for the evaluation text in the datastore", "tokens") as advance:
        share = overlap(documents, _pieces(store.values, advance))
    if share < OVERLAP_SHARE:
        return ()
    return (
        f"{share:.1%} of the evaluation text's 13-grams also stand in the datastore: its perplexity is flattered; "
        "take evaluation text that the datastore does not hold",
    )


def _pieces(values_N: NDArray[np.int32], advance: Advance) -> Iterator[NDArray[np.int32]]:
    for start in range(0, len(values_N), OVERLAP_TOKENS):
        yield values_N[start : start + OVERLAP_TOKENS]
        advance(min(start + OVERLAP_TOKENS, len(values_N)), len(values_N))

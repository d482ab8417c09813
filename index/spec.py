"""Index specs: parsing, requirements, and the choice from the number of keys, their dimension and memory.

A spec is `auto`, `exact`, or a FAISS factory string such as `IVF4096,Flat` or `OPQ16_64,IVF1024,PQ16x4fs`
(https://github.com/facebookresearch/faiss/wiki/The-index-factory). FAISS is not loaded here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from index.errors import TooFewKeys, UnknownSpec

# Exact search reads all N D numbers for each token that is generated, 1 to 2 ns each from float16 on disk: up to 13 ms
# here, where an inverted file of 100,000 x 768 takes 5 (and brute force 176).
EXACT_ELEMENTS = 1 << 23
# Of fewer keys an inverted file has few lists, and the k nearest are a good part of all.
EXACT_KEYS = 1 << 14
# FAISS's guide: 4 sqrt(N) to 16 sqrt(N) lists; 4 to 8 here (a power of two), as k-means costs lists squared.
LISTS_PER_ROOT = 4
# From this many lists on, a graph finds the nearest lists faster than a scan of them.
GRAPH_LISTS = 1 << 15
# FAISS sums the codes' distances in 16 bits: with more codes, each would have only a few steps.
MOST_CODES = 256
# Training points for each list or code word: FAISS warns below 39 and drops what is above 256.
POINTS = 64
# Bytes of the training sample, in memory as float32: at most this, and at most a quarter of the memory given for the
# index; a quarter of what building may take.
TRAINING_BYTES = 1 << 30

# Candidates per neighbour that FAISS proposes before exact re-ranking; coarser codes order keys more roughly. Tuning
# raises it if recall needs more. First match counts; other specs keep float32 or float16.
_OVERFETCH = (
    (r"LSH|RaBitQ|ITQ", 4.0),
    (r"PQ|RQ|LSQ|Lattice|PCA|RR\d", 2.0),
    (r"SQ4|SQ6", 1.5),
    (r"SQ8", 1.1),
)


# The spec for N keys of D dimensions and the bytes that the index may take.
Rule = Callable[[int, int, int], str]


@dataclass(frozen=True)
class IndexSpec:
    """A parsed spec, not yet checked by FAISS."""

    text: str
    """`exact`, a name in `RULES`, or the factory string."""

    @property
    def is_auto(self) -> bool:
        """Whether `choose_spec` makes the choice."""
        return self.text == "auto"

    @property
    def rule(self) -> Rule | None:
        """The function that chooses the spec once keys and memory are known; None if it is chosen already."""
        return RULES.get(self.text)

    @property
    def is_exact(self) -> bool:
        """Whether it is brute force."""
        return self.text == "exact"

    @property
    def lists(self) -> int:
        """Number of inverted lists; 0 without an inverted file."""
        found = re.search(r"IVF(\d+)([kM]?)", self.text)
        return int(found[1]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[found[2]] if found else 0

    @property
    def min_training(self) -> int:
        """Keys without which k-means cannot run: one for each list and each code word."""
        words = [1 << int(bits or 8) for bits in re.findall(r"PQ\d+(?:x(\d+))?", self.text)]
        halves = [1 << int(bits) for bits in re.findall(r"IMI2x(\d+)", self.text)]
        return max([1, self.lists, *words, *halves])

    @property
    def whole_at_once(self) -> bool:
        """Whether FAISS builds it from all keys in one call, so that they must be in memory."""
        return "NSG" in self.text

    @property
    def overfetch(self) -> float:
        """Candidates per neighbour wanted."""
        return next((factor for pattern, factor in _OVERFETCH if re.search(pattern, self.text)), 1.0)

    def check_count(self, count: int) -> None:
        """Raise TooFewKeys, with advice, if `count` keys are too few to train the index."""
        if count < self.min_training:
            raise TooFewKeys(
                f"index {self.text!r} needs at least {self.min_training} keys to be trained, but there are {count}; "
                "take auto, exact, or fewer lists"
            )

    def training_points(self, count: int, dim: int, training_bytes: int | None = None) -> int:
        """Return the number of keys to train on, as float32 of at most so many bytes. Raises as `check_count`."""
        self.check_count(count)
        # 256 is the code words of 8 bits; projections and scalar ranges need no more than these.
        wanted = POINTS * max(256, self.min_training)
        most = TRAINING_BYTES if training_bytes is None else min(TRAINING_BYTES, training_bytes)
        return min(count, max(self.min_training, min(wanted, most // (4 * dim))))


def parse_spec(text: str) -> IndexSpec:
    """Parse a spec; `index.build.check_spec` checks it with FAISS, once dimension and metric are known.

    :raises UnknownSpec: it is empty, has white space or non-ASCII characters, or a size of 0, which crashes FAISS.
    """
    stripped = text.strip()
    if stripped.lower() in ("exact", *RULES):
        return IndexSpec(stripped.lower())
    if not stripped or not re.fullmatch(r"[\x21-\x7e]+", stripped):
        raise UnknownSpec(
            f"index is {text!r}, but must be auto, exact, or a FAISS factory string such as 'IVF1024,Flat'"
        )
    if re.search(r"(?<!\d)0+(?!\d)", stripped):
        raise UnknownSpec(f"index is {text!r}, but no size in it may be 0; take auto, exact, or sizes above 0")
    return IndexSpec(stripped)


def choose_spec(count: int, dim: int, memory_bytes: int) -> str:
    """Return the spec of `auto` for N keys of D dimensions and the memory that the index may take.

    1. `exact` up to 2**14 keys, or 2**23 elements (N D): brute force is quick, even for one query.
    2. Above, an inverted file of 4 to 8 sqrt(N) lists, fewer if their training sample would not fit. Its codes are the
       finest 4-bit product quantizer that fits, from 2 dimensions per code (D/4 bytes per key) to 64.

    Every search re-ranks by exact distances, so coarse codes cost more candidates, not precision. Of ten kinds, those
    that FAISS scans fastest found most of the neighbours' weight in a given time, and whole vectors the least, because
    reading them takes longer than ranking more candidates (docs/performance.md). No OPQ: learning its rotation takes
    longer than re-ranking more candidates. No HNSW: it needs more memory and builds slowly.
    """
    if count <= EXACT_KEYS or count * dim <= EXACT_ELEMENTS:
        return "exact"
    lists = choose_lists(count, dim, memory_bytes)
    quantizer = f"IVF{lists}_HNSW32" if lists >= GRAPH_LISTS else f"IVF{lists}"
    return ",".join(part for part in _layout(count, dim, memory_bytes, quantizer) if part)


def choose_lists(count: int, dim: int, memory_bytes: int) -> int:
    """Return the number of lists: the power of two from 4 sqrt(N) up, or the largest whose training sample fits."""
    lists = 1 << math.ceil(math.log2(LISTS_PER_ROOT * math.sqrt(max(1, count))))
    points = min(count, min(TRAINING_BYTES, memory_bytes // 4) // (4 * dim))
    return max(1, min(lists, 1 << int(math.log2(max(1, points // POINTS)))))


def _layout(count: int, dim: int, memory_bytes: int, quantizer: str) -> tuple[str, str, str]:
    """(transformation, quantizer, codes); each key also takes 8 bytes for its id."""
    per_key = memory_bytes / count - 8
    widths = [width for width in (2, 4, 8, 16, 32) if math.ceil(dim / width) <= MOST_CODES] + [64]
    width = next((width for width in widths if math.ceil(dim / width) / 2 <= per_key), widths[-1])
    parts = math.ceil(dim / width)
    # The dimensions per code must divide D; padding with zeros makes it divisible.
    return ("" if dim % width == 0 else f"Pad{parts * width}"), quantizer, f"PQ{parts}x4fs"


RULES: Mapping[str, Rule] = {
    "auto": choose_spec,
}
"""Specs that are chosen from the keys and the memory, by name."""

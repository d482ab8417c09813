"""Inverted lists in a mapped file: an index of any size is built and searched in bounded memory.

Keys are added in runs. FAISS encodes them, the codes of one run are held in memory, and then written to a file, list by
list. At the end all runs, and the lists that were there before, are merged into one file, which FAISS searches where it
is mapped. So one search costs the same however many parts the keys came in, and nothing is encoded twice.

The file: the size of each list, int64 [L]. Then for each list, from a multiple of `ALIGNED` bytes on, its codes as
FAISS packs them, in whole blocks, and its ids, int64. Little-endian.

Legend: L lists, N keys of a run, D dimension, B bytes of a code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from index.mapped import Bytes, map_handle
from index.typed import demand

# Names that SWIG makes at run time are not in FAISS's stubs.
_faiss: Any = faiss

# Kinds whose keys are in their inverted lists, and nowhere else.
_KINDS = (faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQFastScan)
# Bytes at whose multiples a list begins: a line of the processor's cache.
ALIGNED = 64
# Codes that are stored together where FAISS packs none, so that the ids behind them are aligned.
LEAST_BLOCK = 8
# Codes in a block, where FAISS packs them. Of blocks of 64 (`PQ8x4fs_64`) FAISS unpacks other codes than it packed.
BLOCK = 32
# Bytes that FAISS may take while it encodes: of product quantizers it computes a table of 256 floats for each byte of a
# key's code.
ENCODING_BYTES = 1 << 26
# Codes that are packed at a time: as half bytes they take ten times as much memory.
PACKED_CODES = 128 * BLOCK

Ids = NDArray[np.int64]


class Layout(NamedTuple):
    """What the size of a list implies about its bytes."""

    lists: int
    code_bytes: int
    block: int
    """Codes of a list are padded to a multiple of this number."""

    def codes_bytes(self, size: Any) -> Any:  # noqa: ANN401  (an integer, or an array of them)
        """Bytes of the codes of a list of this size."""
        return _rounded(size, self.block) * self.code_bytes

    def starts(self, sizes_L: Ids) -> Ids:
        """First byte of each list, and the size of the file, [L + 1]."""
        taken_L = _rounded(self.codes_bytes(sizes_L) + 8 * sizes_L, ALIGNED)
        starts: Ids = np.concatenate([[0], np.cumsum(taken_L)]) + _rounded(8 * self.lists, ALIGNED)
        return starts


class Lists:
    """All lists of an index, in mapped bytes."""

    def __init__(self, data: Bytes, layout: Layout) -> None:
        """:raises index.typed.Misfit: the bytes are not those of such lists."""
        demand(len(data) >= 8 * layout.lists, f"it has {len(data)} bytes, too few for {layout.lists} lists")
        self.data, self.layout = data, layout
        self.sizes_L: Ids = data[: 8 * layout.lists].view("<i8").astype(np.int64)
        demand(0 <= self.sizes_L.min() and self.sizes_L.max() < len(data), "its lists have impossible sizes")
        self._starts = layout.starts(self.sizes_L)
        demand(self._starts[-1] == len(data), f"it has {len(data)} bytes, but its lists need {self._starts[-1]}")

    def __len__(self) -> int:
        return int(self.sizes_L.sum())

    def codes(self, number: int) -> Bytes:
        """Packed codes of a list."""
        start, size = self._starts[number], self.layout.codes_bytes(self.sizes_L[number])
        return self.data[start : start + size]

    def ids(self, number: int) -> Ids:
        """Ids of a list."""
        start = self._starts[number] + self.layout.codes_bytes(self.sizes_L[number])
        return self.data[start : start + 8 * self.sizes_L[number]].view("<i8")

    def places(self) -> Iterator[tuple[int, int, int]]:
        """Of each list its size, the codes that there is room for, and its first byte."""
        room_L = _rounded(self.sizes_L, self.layout.block)
        return zip(self.sizes_L.tolist(), room_L.tolist(), self._starts[:-1].tolist(), strict=True)


class ListStore:
    """The lists of one FAISS index: in memory while keys are added, then in a mapped file."""

    def __init__(self, ivf: Any) -> None:  # noqa: ANN401  (FAISS has no types)
        self._ivf = ivf
        memory = faiss.downcast_InvertedLists(ivf.invlists)
        block = getattr(memory, "n_per_block", LEAST_BLOCK)
        self.layout = Layout(int(ivf.nlist), int(ivf.code_size), int(block))
        self.mapped: Lists | None = None
        """The lists that are searched; None while keys are added."""
        self._before: list[Lists] = []
        self._codes = _codes_of(ivf, self.layout)
        self._run: list[tuple[Ids, Bytes]] = []
        self._attached: _Attached | None = None

    @classmethod
    def of(cls, native: Any) -> ListStore | None:  # noqa: ANN401
        """The store of an index without keys; None for a kind that keeps them elsewhere."""
        inner = faiss.downcast_index(native)
        inner = faiss.downcast_index(inner.index) if isinstance(inner, faiss.IndexPreTransform) else inner
        return cls(inner) if type(inner) in _KINDS and getattr(inner, "bbs", BLOCK) == BLOCK else None

    @property
    def count(self) -> int:
        """Keys so far."""
        return int(self._ivf.ntotal)

    @property
    def key_bytes(self) -> int:
        """Bytes of a key of a run in memory: its code and list, both once more while all are sorted, and its place."""
        return 2 * self.layout.code_bytes + 32

    @property
    def is_whole(self) -> bool:
        """Whether no keys were added since `finish`."""
        return not (self._run or self._before)

    def add(self, keys_ND: NDArray[np.float32], lists_N: Ids) -> None:
        """Encode keys for these lists; their ids continue the count."""
        self._reopen()
        keys_ND, lists_N = np.ascontiguousarray(keys_ND, np.float32), np.ascontiguousarray(lists_N, np.int64)
        codes_NB = np.empty((len(keys_ND), self.layout.code_bytes), np.uint8)
        rows = max(256, ENCODING_BYTES // (1024 * self.layout.code_bytes))
        for start in range(0, len(keys_ND), rows):
            some = [array[start : start + rows] for array in (keys_ND, lists_N, codes_NB)]
            self._ivf.encode_vectors(len(some[0]), *map(faiss.swig_ptr, some))
        self._run.append((lists_N, codes_NB))
        self._ivf.ntotal += len(keys_ND)

    def _reopen(self) -> None:
        """Let the lists that are searched be the first run: nothing is found until `finish`."""
        if self.mapped is not None:
            self._before, self.mapped = [self.mapped], None
            self._use_memory()

    def clear(self) -> None:
        """Forget all keys."""
        self._before, self.mapped, self._run = [], None, []
        self._use_memory()

    def end_run(self, folder: Path | None) -> None:
        """Write the lists of the run to a temporary file without a name in a folder, and begin another.

        :raises OSError: the disk is full; the run is kept.
        """
        self._reopen()
        run = self._run or [(np.zeros(0, np.int64), np.zeros((0, self.layout.code_bytes), np.uint8))]
        lists_N, codes_NB = (np.concatenate(blocks) for blocks in zip(*run, strict=True))
        sizes_L = np.bincount(lists_N, minlength=self.layout.lists)
        self._before.append(self._written(sizes_L, self._sorted(lists_N, codes_NB, sizes_L), folder))
        self._run = []

    def _sorted(self, lists_N: Ids, codes_NB: Bytes, sizes_L: Ids) -> Iterator[tuple[Bytes, Ids]]:
        first = self._ivf.ntotal - len(lists_N)
        for rows in np.split(np.argsort(lists_N, kind="stable"), np.cumsum(sizes_L)[:-1]):
            yield self._codes.packed(codes_NB[rows]), first + rows

    def finish(self, folder: Path | None) -> None:
        """Make one file of all runs, and search it. Raises as `end_run`."""
        self.end_run(folder)
        filled = [one for one in self._before if len(one)] or self._before[:1]
        sizes_L = np.sum([one.sizes_L for one in filled], axis=0)
        self.use(filled[0] if len(filled) == 1 else self._written(sizes_L, self._merged(filled), folder))

    def use(self, lists: Lists) -> None:
        """Search these lists."""
        self._before, self.mapped = [], lists
        self._attached = _Attached(self._ivf, lists)

    def detached(self, work: Callable[[], None]) -> None:
        """Do something with the index as if it had no keys, such as writing it."""
        mapped = self.mapped
        if mapped is None:
            return work()
        self._use_memory()
        try:
            work()
        finally:
            self._attached = _Attached(self._ivf, mapped)
        return None

    def _use_memory(self) -> None:
        self._ivf.replace_invlists(_owned(_memory_lists(self._ivf)), True)
        self._attached = None

    def _merged(self, runs: Sequence[Lists]) -> Iterator[tuple[Bytes, Ids]]:
        for number in range(self.layout.lists):
            found = [one for one in runs if one.sizes_L[number]] or runs[:1]
            parts = [(one.codes(number), int(one.sizes_L[number])) for one in found]
            codes = parts[0][0] if len(found) == 1 else self._codes.joined(parts)
            yield codes, np.concatenate([one.ids(number) for one in found])

    def _written(self, sizes_L: Ids, lists: Iterable[tuple[Bytes, Ids]], folder: Path | None) -> Lists:
        with TemporaryFile(dir=folder) as file:
            _write(file, sizes_L, lists, self.layout)
            file.flush()
            return Lists(map_handle(file.fileno()), self.layout)


class _Attached:
    """FAISS's view of mapped lists. It would unmap them itself, so it forgets them before it goes."""

    def __init__(self, ivf: Any, lists: Lists) -> None:  # noqa: ANN401
        self._lists, self._view = lists, _faiss.OnDiskInvertedLists()
        view = self._view
        view.nlist, view.code_size, view.read_only = lists.layout.lists, lists.layout.code_bytes, True
        # A thread for each list that is fetched ahead costs more than most searches.
        view.prefetch_nthread = 0
        for size, capacity, offset in lists.places():
            one = _faiss.OnDiskOneList()
            one.size, one.capacity, one.offset = size, capacity, offset
            view.lists.push_back(one)
        view.ptr, view.totsize = faiss.swig_ptr(lists.data), len(lists.data)
        ivf.replace_invlists(view, False)

    def __del__(self) -> None:
        self._view.ptr = None


def _codes_of(ivf: Any, layout: Layout) -> _Codes:  # noqa: ANN401
    return _PackedCodes(ivf.get_CodePacker(), layout) if isinstance(ivf, faiss.IndexIVFPQFastScan) else _Codes(layout)


def _memory_lists(ivf: Any) -> Any:  # noqa: ANN401
    """Empty lists of the index's kind."""
    if isinstance(ivf, faiss.IndexIVFPQFastScan):
        return _faiss.BlockInvertedLists(ivf.nlist, _owned(ivf.get_CodePacker()))
    return faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)


class _Codes:
    """How the codes of a list are stored: one after the other."""

    def __init__(self, layout: Layout) -> None:
        self._bytes = layout.code_bytes

    def packed(self, codes_NB: Bytes) -> Bytes:
        """The bytes of a list of these codes."""
        return codes_NB.reshape(-1)

    def joined(self, codes: Sequence[tuple[Bytes, int]]) -> Bytes:
        """The bytes of one list from those of several, each with its number of codes."""
        return np.concatenate([part[: count * self._bytes] for part, count in codes])


class _PackedCodes(_Codes):
    """How FAISS packs 4-bit codes into blocks. FAISS joins packed lists itself, but beyond the end of its memory.

    (`BlockInvertedLists::add_entries` of 1.15, where a list's size is a multiple of the bytes of a block.)
    """

    def __init__(self, packer: Any, layout: Layout) -> None:  # noqa: ANN401
        super().__init__(layout)
        self._block, self._half_bytes = layout.block, 2 * layout.code_bytes
        # Of each half byte of the codes one after the other, its place in the block: FAISS unpacks places, 4 bits at a
        # time.
        places = np.arange(self._block * self._half_bytes)
        self._places = np.zeros_like(places)
        for shift in range(0, int(places[-1]).bit_length(), 4):
            block = _bytes_of((places >> shift) & 15)[None]
            unpacked = np.concatenate([packer.unpack_1(block, row) for row in range(self._block)])
            self._places |= _halves_of(unpacked).astype(places.dtype) << shift

    def packed(self, codes_NB: Bytes) -> Bytes:
        pieces = [codes_NB[start : start + PACKED_CODES] for start in range(0, max(1, len(codes_NB)), PACKED_CODES)]
        halves = (_halves_of(piece.reshape(-1)).reshape(-1, self._half_bytes) for piece in pieces)
        return np.concatenate([self._packed(piece) for piece in halves])

    def joined(self, codes: Sequence[tuple[Bytes, int]]) -> Bytes:
        """As `_Codes.joined`; whole blocks of the first list stay as they are."""
        (first, size), rest = codes[0], codes[1:]
        whole = size // self._block * self._block * self._half_bytes // 2
        loose = [self._unpacked(first[whole:], size % self._block), *(self._unpacked(*one) for one in rest)]
        return np.concatenate([first[:whole], self._packed(np.concatenate(loose))])

    def _unpacked(self, packed: Bytes, count: int) -> Bytes:
        """Half bytes of `count` codes, [count, half bytes]."""
        halves = _halves_of(packed).reshape(-1, len(self._places))[:, self._places]
        return halves.reshape(-1, self._half_bytes)[:count]

    def _packed(self, halves: Bytes) -> Bytes:
        padded = np.zeros((-(-len(halves) // self._block), len(self._places)), np.uint8)
        padded.reshape(-1)[: halves.size] = halves.reshape(-1)
        packed = np.empty_like(padded)
        packed[:, self._places] = padded
        return _bytes_of(packed.reshape(-1))


def _halves_of(data: Bytes) -> Bytes:
    """Half bytes, the lower ones first."""
    halves = np.empty((len(data), 2), np.uint8)
    halves[:, 0], halves[:, 1] = data & 15, data >> 4
    return halves.reshape(-1)


def _bytes_of(halves: NDArray[Any]) -> Bytes:
    pairs = halves.astype(np.uint8).reshape(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)


def _owned(thing: Any) -> Any:  # noqa: ANN401
    """The thing, which is now FAISS's to delete."""
    thing.this.disown()
    return thing


def _write(file: BinaryIO, sizes_L: Ids, lists: Iterable[tuple[Bytes, Ids]], layout: Layout) -> None:
    starts = layout.starts(sizes_L).tolist()
    file.write(sizes_L.astype("<i8").tobytes())
    for size, start, (codes, ids) in zip(sizes_L.tolist(), starts, lists, strict=False):
        _pad(file, start)
        file.write(codes.data)
        _pad(file, start + layout.codes_bytes(size))
        file.write(np.ascontiguousarray(ids, "<i8").data)
    _pad(file, starts[-1])


def _pad(file: BinaryIO, place: int) -> None:
    file.write(bytes(place - file.tell()))


def _rounded(numbers: Any, multiple: int) -> Any:  # noqa: ANN401  (integers or arrays of them)
    return -(-numbers // multiple) * multiple

"""Layer names, and patterns that select layers.

A layer is `BLOCK.PART`, or `final_norm` for the vector that enters the LM head. Parts, in the order of the network:
`attn_input` (the normed input of attention), `attn_output` (what attention returns, before any norm behind it and the
residual), `ffn_input` (what enters the feed-forward, after any norm before it: the key of Khandelwal et al. 2020),
`ffn_output` (like `attn_output`), and `block_output` (the residual stream after the block).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from knnlm.errors import LayerError

PARTS = ("attn_input", "attn_output", "ffn_input", "ffn_output", "block_output")
FINAL = "final_norm"
# Where a part lies between its block's input (0) and output (1).
_OFFSETS = dict(zip(PARTS, (0.0, 0.25, 0.5, 0.75, 1.0), strict=True))
_PATTERN = re.compile(r"(?P<block>\*|-?\d+)(?:-(?P<last>\d+))?\.(?P<part>[a-z_*?]+)")


def split(name: str) -> tuple[int | None, str]:
    """Split a layer's name into block and part; the block of `final_norm` is None. Raises LayerError."""
    block, part = loosely_split(name)
    if part in PARTS if block is not None else name == FINAL:
        return block, part
    raise LayerError(f"not the name of a layer: {name!r}; write BLOCK.PART such as 0.{PARTS[0]}, or {FINAL}")


def loosely_split(name: str) -> tuple[int | None, str]:
    """As `split`, but a name of another form, which a report may hold, is a part without a block."""
    block, dot, part = name.partition(".")
    return (int(block), part) if dot and block.isdecimal() else (None, name)


def depth(name: str, num_blocks: int) -> float:
    """Return a layer's relative depth, from 0 (the first block's input) to 1 (the last block's output), for charts."""
    block, part = split(name)
    return 1.0 if block is None else (block + _OFFSETS[part]) / num_blocks


def default_candidates(names: Sequence[str]) -> tuple[str, ...]:
    """Return the default candidates: `ffn_input` of the upper half of the blocks.

    If the model has no readable feed-forward: `block_output` of the same blocks.
    """
    first = _num_blocks(names) // 2
    for wanted in ("ffn_input", "block_output"):
        found = tuple(name for name, block, part in _parsed(names) if part == wanted and block >= first)
        if found:
            return found
    return tuple(names)


def residual_layers(names: Sequence[str]) -> tuple[str, ...]:
    """Return the residual stream: `attn_input` from block 1 on, `ffn_input`, `block_output`, `final_norm`."""
    wanted = {"ffn_input", "block_output", FINAL}
    return tuple(n for n, block, part in _parsed(names) if part in wanted or (part == "attn_input" and block > 0))


def select_layers(patterns: str | Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the layers that match any of the patterns (a list, or one string with commas), in network order.

    A pattern is a layer's name, `BLOCK.PART` with a block such as `5`, `-1` (the last), `4-7` or `*` and a part such as
    `ffn_input`, `ffn_*` or `*`, or a word: `all`, `residual`, `candidates` (`default_candidates`).

    Raises LayerError, which lists the names, for a pattern that matches nothing.
    """
    texts = [patterns] if isinstance(patterns, str) else list(patterns)
    pieces = [piece.strip() for text in texts for piece in text.split(",") if piece.strip()]
    if not pieces:
        raise LayerError(f"no layer is named; there are {list_names(names)}")
    found = {name for piece in pieces for name in _select(piece, names)}
    return tuple(name for name in names if name in found)


def check_names(wanted: Sequence[str], names: Sequence[str]) -> None:
    """Raise LayerError, which lists the names, unless all wanted names are among them."""
    for name in wanted:
        if name not in names:
            raise LayerError(f"this model has no layer {name!r}; it has {list_names(names)}")


def list_names(names: Sequence[str]) -> str:
    """Return the names in one line, runs of blocks folded (`0-7.ffn_input`), as `select_layers` accepts them."""
    folded: list[str] = []
    for wanted in (*PARTS, FINAL):
        blocks = [block for _, block, part in _parsed(names) if part == wanted]
        folded += [wanted] if wanted == FINAL and blocks else [f"{run}.{wanted}" for run in _runs(blocks)]
    return ", ".join(folded)


def _runs(blocks: Sequence[int]) -> list[str]:
    starts = [block for block in blocks if block - 1 not in blocks]
    ends = [block for block in blocks if block + 1 not in blocks]
    return [str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)]


def _select(pattern: str, names: Sequence[str]) -> tuple[str, ...]:
    words = {"all": tuple(names), "residual": residual_layers(names), "candidates": default_candidates(names)}
    found = words.get(pattern) or ((pattern,) if pattern in names else _match(pattern, names))
    if not found:
        raise LayerError(f"no layer fits {pattern!r}; there are {list_names(names)}")
    return found


def _match(pattern: str, names: Sequence[str]) -> tuple[str, ...]:
    parts = _PATTERN.fullmatch(pattern)
    if parts is None:
        return ()
    num_blocks = _num_blocks(names)
    if parts["block"] == "*":
        blocks = range(num_blocks)
    else:
        first = int(parts["block"])
        first += num_blocks if first < 0 else 0
        blocks = range(first, int(parts["last"] or first) + 1)
    return tuple(n for n, block, part in _parsed(names) if block in blocks and fnmatchcase(part, parts["part"]))


def _parsed(names: Sequence[str]) -> list[tuple[str, int, str]]:
    """Return (name, block, part); the block of `final_norm` is -1, which no pattern matches."""
    return [(name, -1 if block is None else block, part) for name, (block, part) in ((n, split(n)) for n in names)]


def _num_blocks(names: Sequence[str]) -> int:
    return max((block for _, block, _ in _parsed(names)), default=-1) + 1


def network_order(name: str) -> tuple[float, int, str]:
    """Return a sort key for layers in network order; unknown parts come last in their block."""
    block, part = loosely_split(name)
    position = PARTS.index(part) if part in PARTS else len(PARTS)
    return (float("inf") if block is None else block, position, name)

"""Parts of a layer's name as plain strings, so that a report needs no model."""

from __future__ import annotations

PARTS = ("attn_input", "attn_output", "ffn_input", "ffn_output", "block_output")
FINAL = "final_norm"


def split(name: str) -> tuple[int | None, str]:
    """Block and part of a layer: `"5.ffn_input"` -> `(5, "ffn_input")`, `"final_norm"` -> `(None, "final_norm")`."""
    block, dot, part = name.partition(".")
    if dot and block.isdecimal():
        return int(block), part
    return None, name


def network_order(name: str) -> tuple[float, int, str]:
    """A sort key for layers in the order in which the network computes them; unknown parts come last in their block."""
    block, part = split(name)
    position = PARTS.index(part) if part in PARTS else len(PARTS)
    return (float("inf") if block is None else block, position, name)

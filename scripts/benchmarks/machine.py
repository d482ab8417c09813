"""Description of the machine: processor, matrix units, and peak speed of matrix products."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import torch

# Flags of the processor that matter for matrix products.
_UNITS = re.compile(r"avx2|avx512f|avx512_bf16|avx512_vnni|avx_vnni|amx_\w+|asimd|sve|bf16|i8mm")


def describe() -> dict[str, Any]:
    """Name, cores, matrix units, and measured GFLOP/s of a product of 1,024 x 1,024 matrices by type."""
    name, units = _processor()
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "units": units,
        "gflops": {kind: round(_peak(kind)) for kind in ("float32", "bfloat16")},
    }


def _processor() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "unknown", []
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    units = sorted(flag for flag in (flags[1].split() if flags else []) if _UNITS.fullmatch(flag))
    return (name[1] if name else "unknown"), units


def _peak(kind: str, size: int = 1024) -> float:
    """The best of eight products, as other work on the machine can only slow one down; a small one where it crawls."""
    dtype = getattr(torch, kind)
    if size > 64 and _peak(kind, 64) < 2:  # bfloat16 that is emulated would take seconds
        return _peak(kind, 64)
    matrix = torch.ones(size, size, dtype=dtype)
    best = min(_product_seconds(matrix) for _ in range(8))
    return 2 * size**3 / best / 1e9


def _product_seconds(matrix: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(matrix, matrix)
    return time.perf_counter() - start

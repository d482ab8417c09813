"""The device to compute on, and whether its CPU is faster in bfloat16 (design.md, section 5)."""

from __future__ import annotations

import re
import time
from functools import cache
from pathlib import Path

import torch

from knnlm.errors import InputError

_CPUINFO = Path("/proc/cpuinfo")
# Flags of x86 CPUs that multiply pairs or tiles of bfloat16.
_BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16"}
# bfloat16 is used on another CPU if its products are at least this many times as fast as float32's.
_WORTHWHILE = 1.3


def pick_device(device: str) -> torch.device:
    """Return the device named cpu, cuda, cuda:1 or mps, or for auto the fastest. Raises InputError if absent."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    kind = device.partition(":")[0]
    if kind not in present:
        raise InputError(f"`device` is {device!r}; take auto, cpu, cuda or mps")
    if not present[kind]:
        raise InputError(f"`device` is {device!r}, but this machine has none that torch can use; take auto or cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError(f"`device` is {device!r}, which torch does not understand; take auto, {kind}") from None
    if kind == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(
            f"`device` is {device!r}, but this machine has {count} of them; take cuda:0 to cuda:{count - 1}"
        )
    return found


def pick_dtype_on_cpu(stated: torch.dtype) -> tuple[torch.dtype, str | None]:
    """Return the type in which this CPU computes a checkpoint of the stated type, and a note if they differ.

    bfloat16 is computed in bfloat16 if that is faster, else in float32. float16 is computed in float32, which holds its
    weights exactly: bfloat16 would round them, and CPUs multiply float16 slowly.
    """
    if stated == torch.float16:
        return torch.float32, "the checkpoint is float16 and computed in float32, which holds its weights exactly"
    if stated != torch.bfloat16:
        return torch.float32, None
    if multiplies_bfloat16():
        return torch.bfloat16, None
    return torch.float32, "the checkpoint is bfloat16 and computed in float32, in which this CPU multiplies faster"


def trains_in_bfloat16() -> bool:
    """Return whether the device that a Trainer uses here multiplies bfloat16 faster than float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return pick_device("auto").type == "cpu" and multiplies_bfloat16()


@cache
def multiplies_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 faster than float32.

    An x86 CPU is taken by its word, the same at every start: a measurement gives anything while other processes compute
    (ratios of 0.05 to 0.77 were seen on one machine). Only a CPU that does not say is measured.
    """
    units = _units(_CPUINFO)
    return bool(units & _BFLOAT16_UNITS) if units else bfloat16_speed() >= _WORTHWHILE


def _units(cpuinfo: Path) -> set[str]:
    """The flags of an x86 CPU under Linux; none of another."""
    try:
        found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return set()
    return set(found[1].split()) if found else set()


@cache
def bfloat16_speed() -> float:
    """Return the speed of bfloat16 matrix products relative to float32 on this CPU, measured once per process."""
    small = _seconds(torch.float32, 64) / _seconds(torch.bfloat16, 64)
    # Where bfloat16 is emulated, a large product would take a second.
    return small if small < 0.1 else _seconds(torch.float32, 512) / _seconds(torch.bfloat16, 512)


def _seconds(dtype: torch.dtype, size: int) -> float:
    matrix = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(6):  # the first warms up, and the shortest is the least disturbed by other work
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - start)
    return min(times)

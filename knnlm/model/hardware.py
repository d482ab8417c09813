"""The device to compute on, and whether its CPU is faster in bfloat16 (design.md, section 5)."""

from __future__ import annotations

import time
from functools import cache

import torch

from knnlm.errors import InputError

# bfloat16 is used on a CPU if its products are at least this many times as fast as float32's.
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
    speed = bfloat16_speed()
    if speed >= _WORTHWHILE:
        return torch.bfloat16, None
    reason = f"this CPU's bfloat16 products are {speed:.2g} times as fast as float32's"
    return torch.float32, f"the checkpoint is bfloat16 and computed in float32: {reason}"


def trains_in_bfloat16() -> bool:
    """Return whether the device that a Trainer uses here multiplies bfloat16 faster than float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return pick_device("auto").type == "cpu" and bfloat16_speed() >= _WORTHWHILE


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

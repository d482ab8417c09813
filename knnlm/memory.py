"""A bound of the memory that a process takes: read from text, compared with what is in use, and shared out.

What counts is the process's own memory (on Linux `RssAnon`). Pages of mapped files, such as keys and inverted lists,
do not: they are copies of what is on disk, which the system takes back when anything needs the room.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from knnlm.errors import InputError

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
# The least with which a search is not much slower: some hundred queries at a time, of a thousand neighbours each.
LEAST_WORK = 256 << 20
# Numbers of each token that a forward pass holds at a time, as multiples of the model's width.
_ACTIVATIONS = 32


def parse_size(text: str) -> float:
    """Return the bytes of a size such as `2GB` or `512 MiB`.

    :raises InputError: no number above 0 with one of these units.
    """
    found = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})\s*", text)
    size = float(found[1]) * UNITS[found[2]] if found else 0
    if not 0 < size < float("inf"):
        raise InputError(f"`memory` is {text!r}, but is a number with kB, MB, GB, KiB, MiB or GiB, such as 2GB")
    return size


def own_bytes() -> int:
    """Return the memory of this process without mapped files.

    :raises InputError: the system does not say.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        raise InputError("`memory` needs Linux, which says what a process takes; leave it out") from None


def pass_bytes(width: int, tokens: int) -> int:
    """Return about what a forward pass of so many tokens takes, in float32."""
    return 4 * _ACTIVATIONS * width * tokens


def check_room(memory: float | None, besides: float) -> None:
    """Check before long work that a bound can be kept.

    :param memory: the bound; None: there is none.
    :param besides: bytes that will be taken beside a search and what is in use now.
    :raises InputError: it cannot be kept; says what is needed.
    """
    if memory is None:
        return
    used, more = own_bytes(), besides + LEAST_WORK
    if used + more > memory:
        least = math.ceil((used + more) / 1e8) / 10
        raise InputError(
            f"`memory` is {memory / 1e9:.1f} GB, but the model and libraries take {used / 1e9:.1f} and the work "
            f"{more / 1e9:.1f}; give {least:.1f}GB or more"
        )


def work_bytes(memory: float | None, otherwise: int) -> int:
    """Return the memory that a search may take now: what a bound leaves, at most `otherwise`.

    Never less than `LEAST_WORK`: memory that was freed counts as in use, but is used again first.
    """
    if memory is None:
        return otherwise
    return max(LEAST_WORK, min(otherwise, int(memory) - own_bytes()))

"""Short names of files and models that can still be told apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def path_tails(name: str) -> list[str]:
    """The ends of a path at its slashes, the whole first: `runs/a/final` -> `runs/a/final`, `a/final`, `final`."""
    parts = name.rstrip("/").split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def short_names(names: Sequence[str]) -> list[str]:
    """Of each name the shortest end that no other has: `a/x`, `b/x` and `b/y` -> `a/x`, `b/x`, `y`.

    A name that is the end of another stays whole.
    """
    owners = Counter(tail for name in dict.fromkeys(names) for tail in path_tails(name))
    return [next((tail for tail in reversed(path_tails(name)) if owners[tail] == 1), name) for name in names]

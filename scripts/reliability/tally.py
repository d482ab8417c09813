"""Counts of a campaign's outcomes, and its faults with their messages."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

# Faults of each kind that are kept with their messages.
SHOWN = 5


@dataclass
class Tally:
    """Counts by part of the campaign."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: dict[str, Counter[str]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def count(self, part: str, outcome: str, times: int = 1) -> None:
        """Count an acceptable outcome."""
        self.counts.setdefault(part, Counter())[outcome] += times

    def fault(self, part: str, kind: str, told: str) -> None:
        """Record a fault."""
        found = self.faults.setdefault(part, Counter())
        found[kind] += 1
        if found[kind] <= SHOWN:
            self.told.append(f"{part}: {kind}: {told.strip()}")

    def rows(self) -> list[tuple[str, int, str, str]]:
        """For a table: part, how many were tried, what came out, faults."""
        parts = dict.fromkeys((*self.counts, *self.faults))
        return [
            (
                part,
                sum(n for name, n in self.counts.get(part, Counter()).items() if name in TRIED)
                or sum(self.counts.get(part, Counter()).values()),
                ", ".join(f"{name} {n}" for name, n in sorted(self.counts.get(part, Counter()).items())),
                ", ".join(f"{name} {n}" for name, n in sorted(self.faults.get(part, Counter()).items())) or "none",
            )
            for part in parts
        ]


# Outcomes of which each try has exactly one, where a try has several.
TRIED = ("killed", "came too late")

"""Metrics of the server, in the Prometheus text format (exposition format 0.0.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from threading import Lock

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Name: kind, what it is.
_KNOWN = {
    "knnlm_requests_total": ("counter", "Requests, by path and status."),
    "knnlm_tokens_total": ("counter", "Prompt tokens and generated tokens."),
    "knnlm_steps_total": ("counter", "Decoding steps; each is one forward pass for a batch of choices."),
    "knnlm_completion_seconds": ("histogram", "Seconds from a completion request to the end of its answer."),
    "knnlm_choices_running": ("gauge", "Choices being generated."),
    "knnlm_choices_waiting": ("gauge", "Choices and explorer calls in the queue."),
}
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Metrics of one server; thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._values: Counter[tuple[str, str]] = Counter()

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._values[name, _labels(labels)] += amount  # type: ignore[assignment] # a Counter of float

    def observe(self, name: str, value: float) -> None:
        """Add to a histogram."""
        for limit in (*_BUCKETS, float("inf")):
            self.count(f"{name}_bucket", float(value <= limit), le="+Inf" if limit == float("inf") else str(limit))
        self.count(f"{name}_sum", value)
        self.count(f"{name}_count")

    def text(self, gauges: Mapping[str, float]) -> str:
        """All metrics as text, with the current values of gauges."""
        with self._lock:
            values = [*self._values.items(), *(((name, ""), value) for name, value in gauges.items())]
        lines = []
        for name, (kind, meaning) in _KNOWN.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{own}{labels} {value:.17g}" for (own, labels), value in values if own.startswith(name)]
        return "\n".join([*lines, ""])


def _labels(labels: Mapping[str, str]) -> str:
    """Labels in Prometheus syntax; all values are the server's own and need no escaping."""
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}" if labels else ""

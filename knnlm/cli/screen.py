"""The terminal of the command line: tables, progress, JSON. Only the command line shows anything to people."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    from knnlm.progress import Advance


# What a terminal would obey, or what no encoding has: control characters but for tabs and line breaks, halves of pairs.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters written out: names in a datastore may come from somebody else."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


def _json_text(document: object, *, ascii_only: bool) -> str:
    text = json.dumps(document, indent=2, ensure_ascii=ascii_only, allow_nan=False)
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # all of them stand inside JSON's strings


def _console(**options: Any) -> Console:  # noqa: ANN401
    """A console through which nothing passes unseen, whatever table or line it is in."""
    from rich.console import Console
    from rich.segment import Segment

    class VisibleConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                own = segment.control is not None  # rich's, such as moving the cursor
                yield segment if own else Segment(visible(segment.text), segment.style)

    return VisibleConsole(**options)


class Screen:
    """Tables to standard output, progress and notes to standard error; with --json only the document to the former."""

    def __init__(self, as_json: bool, words: Callable[[str], str] = str) -> None:
        """:param words: what a line that the library wrote becomes here, such as one with options for fields."""
        self.as_json, self._words = as_json, words
        # Where output goes to a file or a pipe, there is no width to keep to, and no bar to draw.
        self.out: Console = _console(width=None if sys.stdout.isatty() else 140)
        self.err: Console = _console(stderr=True)

    @contextmanager
    def stage(self, name: str, unit: str) -> Iterator[Advance]:
        """A bar with rate and time left, gone when the stage is over."""
        from rich import progress as bars

        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TaskProgressColumn(),
            bars.TextColumn("{task.fields[rate]}"),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=self.err, transient=True, disable=not self.err.is_terminal) as shown:
            task = shown.add_task(name, total=None, rate="")

            def advance(done: int, total: int | None) -> None:
                elapsed = shown.tasks[0].elapsed or 0
                rate = f"{done / elapsed:,.0f} {unit}/s" if elapsed > 0 else ""
                shown.update(task, completed=done, total=total, rate=rate)

            yield advance

    def note(self, line: str) -> None:
        """A line on the way."""
        self.err.print(self._words(line), highlight=False, markup=False, soft_wrap=True)

    def say(self, line: Any) -> None:  # noqa: ANN401  (whatever rich can render)
        """A line or table of the result; nothing with --json."""
        from rich.text import Text

        if isinstance(line, str):
            line = self._words(line)
        elif isinstance(line, Text) and (told := self._words(line.plain)) != line.plain:
            line = Text(told, style=line.style)
        if not self.as_json:
            self.out.print(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))

    def result(self, document: object) -> None:
        """The result's document; nothing without --json."""
        if self.as_json:
            # Elsewhere a letter as \\u00e2 loses nothing.
            is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
            sys.stdout.write(_json_text(document, ascii_only=not is_utf8) + "\n")

"""Output of the command line: tables, progress, JSON. The library itself prints nothing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from knnlm.cli.telling import Teller
from knnlm.progress import Forecast

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    from knnlm.progress import Advance, Stage


# Control characters except tabs and line breaks, which terminals obey; lone surrogates, which cannot be encoded.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """Escape control characters: names in a datastore from somebody else may contain them."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


def _json_text(document: object, *, ascii_only: bool) -> str:
    text = json.dumps(document, indent=2, ensure_ascii=ascii_only, allow_nan=False)
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # these occur only inside JSON strings


def _console(**options: Any) -> Console:  # noqa: ANN401
    """Return a console that escapes control characters in everything that it prints."""
    from rich.console import Console
    from rich.segment import Segment

    class VisibleConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                own = segment.control is not None  # rich's, such as moving the cursor
                yield segment if own else Segment(visible(segment.text), segment.style)

    return VisibleConsole(**options)


@contextmanager
def _regularly(work: Callable[[], None], seconds: float) -> Iterator[None]:
    """Do the work now and then during the block, in a thread, as the block may compute for minutes without a word."""
    ended = Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            work()

    thread = Thread(target=repeat, daemon=True, name="knnlm-progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Screen:
    """Tables go to standard output, progress and notes to standard error; with --json, standard output is JSON only."""

    def __init__(self, as_json: bool, words: Callable[[str], str] = str, *, verbose: bool = False) -> None:
        """:param words: translates the library's lines, for example fields into options."""
        self.as_json, self._words, self._verbose = as_json, words, verbose
        # A file or pipe has no width of its own, and shows no progress bar.
        self.out: Console = _console(width=None if sys.stdout.isatty() else 140)
        self.err: Console = _console(stderr=True)
        self._teller = Teller(Forecast(), self.note)

    def plan(self, stages: Sequence[Stage]) -> None:
        """Take the stages of the whole, whose time is then told."""
        self._teller.plan(stages)

    @contextmanager
    def stage(self, name: str, unit: str) -> Iterator[Advance]:
        """Show one bar for the whole, with the stage's name and the time left; without a terminal, a line at times."""
        self._teller.begin(name, unit)
        try:
            with self._bar() if self.err.is_terminal else _regularly(self._teller.line_if_due, seconds=1):
                yield self._teller.advance
        finally:
            self._teller.end()

    @contextmanager
    def _bar(self) -> Iterator[None]:
        from rich import progress as bars

        # Narrow, so that the time left is seen in 80 columns too.
        columns = (bars.BarColumn(15), bars.TaskProgressColumn(), bars.TextColumn("{task.description}", markup=False))
        with bars.Progress(*columns, console=self.err, transient=True) as shown:
            task = shown.add_task(self._teller.line(counted=False), total=None)

            def update() -> None:
                share = self._teller.share()
                line = self._teller.line(counted=False)
                shown.update(task, description=line, completed=share or 0, total=share and 1.0)

            with _regularly(update, seconds=0.5):
                yield

    def note(self, line: str) -> None:
        """Print a note to standard error."""
        self.err.print(self._words(line), highlight=False, markup=False, soft_wrap=True)

    def detail(self, line: str) -> None:
        """Print a note that only a user who asks for it wants to see."""
        if self._verbose:
            self.note(line)

    def say(self, line: Any) -> None:  # noqa: ANN401  (whatever rich can render)
        """Print a line or table of the result; nothing with --json."""
        from rich.text import Text

        if isinstance(line, str):
            line = self._words(line)
        elif isinstance(line, Text) and (told := self._words(line.plain)) != line.plain:
            line = Text(told, style=line.style)
        if not self.as_json:
            self.out.print(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))

    def result(self, document: object) -> None:
        """Print the result as JSON; nothing without --json."""
        if self.as_json:
            # Other encodings get letters as \\u00e2, which is the same JSON.
            is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
            sys.stdout.write(_json_text(document, ascii_only=not is_utf8) + "\n")

"""From the words of a command line to a verb, and from errors to one line and an exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import typer
import typer.exceptions

from knnlm.cli import correlate, main_job, rank, slices, train

app = typer.Typer(
    name="knnlm",
    help="Give a language model a memory, and choose by geometry where it looks.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
VERBS: dict[str, Callable[..., None]] = {
    "run": main_job.run,
    "score": main_job.score,
    "build": main_job.build,
    "eval": main_job.evaluate,
    "info": main_job.info,
    "verify": main_job.verify,
    "correlate": correlate.correlate,
    "slices": slices.slices,
    "rank-models": rank.rank_models,
    "train": train.train,
}
for name, verb in VERBS.items():
    app.command(name)(verb)

TAKES_SEVERAL = ("--text", "--vectors", "--other-text", "--eval-text", "--questions", "--cloze")
"""Options that may be followed by several values."""
INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT."""


def main() -> None:
    """Run the command line: exit status 0, 2 with one line for expected errors, 130 for Ctrl-C."""
    from index.errors import VectorIndexError
    from knnlm.errors import KNNLMError

    # Both are read when transformers is imported. Tokenizers warn about forks that are never made here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # What a scheduler, `docker stop` and `timeout` send: unwinds as Ctrl-C does, so that nothing is left behind.
    signal.signal(signal.SIGTERM, lambda number, _: _fail("stopped by SIGTERM", 128 + number))
    try:
        status = app(_spread(sys.argv[1:]) or ["--help"], prog_name="knnlm", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except typer.exceptions.TyperException as error:
        _fail(_usage(error), 2)
    except (KNNLMError, VectorIndexError) as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(_refused_by_system(error), 2)
    if status == INTERRUPTED:  # typer catches KeyboardInterrupt itself and returns this
        _fail("stopped by Ctrl-C; nothing half-written was left behind", INTERRUPTED)
    sys.exit(status)


def _spread(arguments: Sequence[str]) -> list[str]:
    """`--text a b` as `--text a --text b`: a shell expands `--text *.jsonl` to the former, typer knows the latter."""
    spread: list[str] = []
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in TAKES_SEVERAL else ""
        elif option and spread[-1] != option:
            spread.append(option)
        spread.append(argument)
    return spread


def _usage(error: typer.exceptions.TyperException) -> str:
    """What typer says of wrong options, in one line, and where the right ones are listed."""
    context = getattr(error, "ctx", None)
    verb = next((word for word in sys.argv[1:2] if word in VERBS), None)
    command = context.command_path if context else f"knnlm {verb}" if verb else "knnlm"
    swallowed = next((option for option in TAKES_SEVERAL if option in sys.argv), None)
    if swallowed and getattr(getattr(error, "param", None), "name", None) == "store":
        return f"STORE comes first: {command} STORE {swallowed} …"
    return f"{' '.join(error.format_message().split()).rstrip('.')}; {command} --help lists the options"


def _refused_by_system(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}; check the path, its permissions and the free space"


def _fail(message: str, status: int) -> NoReturn:
    """End with one line, whatever a file's name or a library's message holds."""
    sys.stderr.write(f"knnlm: {' '.join(message.split())}\n")
    sys.exit(status)

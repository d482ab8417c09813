"""The command line: parses arguments, runs a verb, and turns errors into one line and an exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache, wraps
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer
import typer.exceptions
from typer.core import TyperGroup

from knnlm.cli import (
    build,
    changes,
    correlate,
    evaluate,
    explain,
    generate,
    lm_eval,
    push,
    rank_models,
    reproduce,
    run,
    score,
    serve,
    slices,
    store,
    train,
)
from knnlm.cli.fields import in_options, options_of
from knnlm.cli.groups import expanded
from knnlm.cli.screen import visible
from knnlm.version import __version__

app = typer.Typer(
    name="knnlm",
    help="Give a language model a memory, and choose by geometry where it looks.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
VERBS: dict[str, Callable[..., None]] = {
    "run": run.run,
    "score": score.score,
    "build": build.build,
    "eval": evaluate.evaluate,
    "add": changes.add,
    "remove": changes.remove,
    "compact": changes.compact,
    "merge": changes.merge,
    "info": store.info,
    "verify": store.verify,
    "push": push.push,
    "generate": generate.generate,
    "serve": serve.serve,
    "explain": explain.explain,
    "lm-eval": lm_eval.lm_eval,
    "correlate": correlate.correlate,
    "slices": slices.slices,
    "rank-models": rank_models.rank_models,
    "train": train.train,
    "reproduce": reproduce.reproduce,
}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"knnlm {__version__}")
        raise typer.Exit


@app.callback(help=app.info.help)
def _with_no_verb(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before a verb; each is handled by its callback."""


FOREIGN = {"lm-eval": lm_eval.AS_IT_IS}
"""Verbs that pass their options on to another program."""


def _stoppable(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn Ctrl-C into typer's Abort: typer swallows KeyboardInterrupt, with any notes that are to be shown."""

    @wraps(verb)
    def run(**given: object) -> None:
        try:
            verb(**given)
        except KeyboardInterrupt as stop:
            raise typer.Abort from stop

    return run


for name, verb in VERBS.items():
    app.command(name, context_settings=FOREIGN.get(name))(_stoppable(expanded(verb)))

TAKES_SEVERAL = (
    "--text",
    "--vectors",
    "--other-text",
    "--eval-text",
    "--questions",
    "--cloze",
    "--document",
    "--source",
)
"""Options that accept several values."""
INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT."""
NOTHING_LEFT = ("nothing half-written was left behind",)
"""Note after a stop, if the stopped work left none."""


@cache
def _command() -> TyperGroup:
    """All verbs with their options, read from their signatures once: a refusal takes no longer than that."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    return command


class _Terminated(SystemExit):
    """Raised on SIGTERM, which schedulers, `docker stop` and `timeout` send."""


def main() -> None:
    """Run the command line. Exit status: 0, 2 with one line for expected errors, 130 for Ctrl-C, 143 for SIGTERM."""
    from index.errors import VectorIndexError
    from knnlm.cli.memory import keep_freed_memory
    from knnlm.errors import KNNLMError

    keep_freed_memory()
    _open_standard_streams()

    # Both are read when transformers is imported. Without the first, tokenizers warns of forks; none are made here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # if it is not UTF-8, a result with ? in it is better than none
    try:
        status = _command()(_spread(sys.argv[1:]) or ["--help"], prog_name="knnlm", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort) as stop:
        _fail(_with_notes("stopped by Ctrl-C", stop.__cause__, NOTHING_LEFT), INTERRUPTED)
    except _Terminated as stop:
        _fail(_with_notes("stopped by SIGTERM", stop, NOTHING_LEFT), 128 + signal.SIGTERM)
    except typer.exceptions.TyperException as error:
        _fail(_usage(error), 2)
    except (KNNLMError, VectorIndexError) as error:
        _fail(_with_notes(str(error), error), 2)
    except OSError as error:
        _fail(_with_notes(_refused_by_system(error), error), 2)
    if status == INTERRUPTED:  # typer's status for Ctrl-C before the verb
        _fail(_with_notes("stopped by Ctrl-C", None, NOTHING_LEFT), INTERRUPTED)
    sys.exit(status)


def _open_standard_streams() -> None:
    """Put the null device in the place of standard streams that are closed, as after `>&-`.

    Python has None for them, and the next file to be opened would get their numbers: what a library prints would be
    written into it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            null = open(os.devnull, mode, encoding="utf-8")
            try:
                os.fstat(number)
            except OSError:
                os.dup2(null.fileno(), number)
            setattr(sys, name, null)


def _spread(arguments: Sequence[str]) -> list[str]:
    """Turn `--text a b`, as a shell expands `--text *.jsonl`, into `--text a --text b`, which typer requires."""
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
    """Return typer's message on wrong options as one line, with a pointer to --help."""
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


def _terminate(number: int, frame: object) -> NoReturn:
    """Unwind the stack as Ctrl-C does, so that temporary files are removed."""
    raise _Terminated


def _with_notes(message: str, error: BaseException | None, otherwise: Sequence[str] = ()) -> str:
    """Return a message with the exception's notes, such as what was kept."""
    return "; ".join([message, *getattr(error, "__notes__", otherwise)])


def _fail(message: str, status: int) -> NoReturn:
    """Print a message as one line, with options in place of fields and control characters escaped, and exit."""
    verb = _command().commands.get(next(iter(sys.argv[1:]), ""))
    told = in_options(message, options_of(verb) if verb else {})
    sys.stderr.write(f"knnlm: {visible(' '.join(told.split()))}\n")
    sys.exit(status)

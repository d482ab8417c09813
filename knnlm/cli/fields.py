"""From the library's words to the command line's: a message names fields, and a user gave options.

The library writes a field in backticks, alone or as Python takes it: `lam`, `overwrite=True`, `dtype='float32'`; and
a function as `knnlm.build`. Here they become --lambda, --overwrite, --dtype float32 and knnlm build.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

ALIASES = {
    "windows": "batch_size",
    "weight": "push_away",
    "decoding.temperature": "temperature_lm",
    "prompt_tokens": "max_prompt_tokens",
    "completion_tokens": "max_completion_tokens",
    "batch": "max_batch",
    "queue": "max_queue",
    "seconds": "max_seconds",
}
"""Fields that a verb takes under another name."""
VERBS = {
    "`knnlm.run`": "knnlm run",
    "`knnlm.score`": "knnlm score",
    "`knnlm.build`": "knnlm build",
    "`knnlm.evaluate`": "knnlm eval",
}
"""Functions that are verbs."""
_FIELD = re.compile(r"`(?P<name>[a-z][a-z_.]*)(?:=(?P<value>[^`]*))?`")


def in_options(message: str, options: Mapping[str, str]) -> str:
    """A message with options in the place of fields; what is no option of the verb stays as it is.

    :param options: of the verb that runs, by the names of its parameters, as `options_of` gives them.
    """

    def option(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        given = options.get(name) or options.get(ALIASES.get(name, ""))
        if given is None:
            return VERBS.get(found[0], found[0])
        return given if value in (None, "True") else f"{given} {value.strip(chr(39))}"

    return _FIELD.sub(option, message)


class Parameter(Protocol):
    """What is read of typer's options and arguments."""

    @property
    def name(self) -> str | None:
        """In the verb's signature."""

    @property
    def opts(self) -> Sequence[str]:
        """What is written on the command line."""


class Command(Protocol):
    """What is read of typer's commands."""

    @property
    def params(self) -> Sequence[Parameter]:
        """The verb's options and arguments."""


def options_of(command: Command) -> dict[str, str]:
    """The option of each parameter of a verb; of an argument the name that the help has for it."""
    return {
        parameter.name: next((option for option in parameter.opts if option.startswith("--")), parameter.name.upper())
        for parameter in command.params
        if parameter.name
    }

"""Translates fields in the library's messages into options of the command line.

The library writes a field in backticks, alone or as a keyword argument: `lam`, `overwrite=True`, `dtype='float32'`;
and a function as `knnlm.build`. Here they become --lambda, --overwrite, --dtype float32 and knnlm build.
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
"""Fields whose option has another name."""
VERBS = {
    "`knnlm.run`": "knnlm run",
    "`knnlm.score`": "knnlm score",
    "`knnlm.build`": "knnlm build",
    "`knnlm.evaluate`": "knnlm eval",
    "`knnlm.compact`": "knnlm compact",
}
"""Functions of the library, and their verbs."""
_FIELD = re.compile(r"`(?P<name>[a-z][a-z_.]*)(?:=(?P<value>[^`]*))?`")


def in_options(message: str, options: Mapping[str, str]) -> str:
    """Replace the fields in a message by options; a field without an option of the verb stays.

    :param options: options of the running verb by parameter name, from `options_of`.
    """

    def option(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        given = options.get(name) or options.get(ALIASES.get(name, ""))
        if given is None:
            return VERBS.get(found[0], found[0])
        return given if value in (None, "True") else f"{given} {value.strip(chr(39))}"

    return _FIELD.sub(option, message)


class Parameter(Protocol):
    """The part of typer's options and arguments that is used."""

    @property
    def name(self) -> str | None:
        """Name in the verb's signature."""

    @property
    def opts(self) -> Sequence[str]:
        """Names on the command line."""


class Command(Protocol):
    """The part of typer's commands that is used."""

    @property
    def params(self) -> Sequence[Parameter]:
        """The verb's options and arguments."""


def options_of(command: Command) -> dict[str, str]:
    """Option of each parameter of a verb; for an argument, its name in the help."""
    return {
        parameter.name: next((option for option in parameter.opts if option.startswith("--")), parameter.name.upper())
        for parameter in command.params
        if parameter.name
    }

"""Groups of options: dataclasses in a verb's signature, which typer sees as single options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints

from knnlm.errors import InputError


class Place:
    """Marks an option that names a file or folder, whose name may hold any bytes."""


def expanded(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb for typer: its signature has each group's fields in place of the group, which the call builds.

    A group is a frozen dataclass whose fields are options or groups. Field names must be unique within a verb.
    """
    hints = get_type_hints(verb, include_extras=True)
    given_to = {name: hints[name] for name in signature(verb).parameters}
    parameters = [
        one for name, own in signature(verb).parameters.items() for one in _flat(name, hints[name], own.default)
    ]

    @wraps(verb)
    def run(**given: object) -> None:
        for one in parameters:
            if not any(isinstance(mark, Place) for mark in getattr(one.annotation, "__metadata__", ())):
                given[one.name] = _decoded(one.name, given[one.name])
        verb(**{name: _built(name, hint, given) for name, hint in given_to.items()})

    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _is_group(hint: object) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def _flat(name: str, hint: Any, default: object) -> Iterator[Parameter]:  # noqa: ANN401  (any type)
    if not _is_group(hint):
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        return
    hints = get_type_hints(hint, include_extras=True)
    for field in fields(hint):
        yield from _flat(field.name, hints[field.name], Parameter.empty if field.default is MISSING else field.default)


def _built(name: str, hint: Any, given: Mapping[str, object]) -> object:  # noqa: ANN401  (any type)
    if not _is_group(hint):
        return given[name]
    hints = get_type_hints(hint, include_extras=True)
    return hint(**{field.name: _built(field.name, hints[field.name], given) for field in fields(hint)})


def _decoded(name: str, value: object) -> object:
    """The value with its text decoded as UTF-8, also where the locale is another one.

    Python gives bytes that it cannot decode by the locale as lone surrogates.
    :raises InputError: an argument is not UTF-8, which tokenizers require.
    """
    if isinstance(value, list | tuple):
        return type(value)(_decoded(name, piece) for piece in value)
    if not isinstance(value, str):
        return value
    try:
        return value.encode("utf-8", "surrogateescape").decode()
    except UnicodeError as error:
        at = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(f"`{name}` is not UTF-8{at}; give text in UTF-8") from None

"""JSON documents that may be damaged or untrusted: parsed strictly, checksummed, and built into dataclasses.

A dataclass is the schema of its document: annotations give the types, `__post_init__` the ranges (with `demand`), and
`field(metadata={"name": …})` a field's name in JSON if Python does not allow it. Any error is a `Misfit`, one line that
names the place: never an OverflowError for 1e999 or a RecursionError for deep lists.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

CHECKSUM = "checksum"
# Levels of nesting; no document of ours has more than eight.
DEEPEST = 64
BRACKETS, STRINGS = re.compile(r"[][{}]"), re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
# Bound of all integers: no count, size or position of ours reaches it.
LARGEST = 1 << 63
# Characters of a wrong value that a message shows.
SHOWN = 60

Kind = TypeVar("Kind")
Document = dict[str, Any]
Readers = Mapping[Any, Callable[[Any], object]]


class Misfit(ValueError):
    """An error in a document, with its place."""


def demand(condition: bool, fact: str) -> None:
    """Raise Misfit with the fact unless the condition holds."""
    if not condition:
        raise Misfit(fact)


def is_sha256(text: str) -> bool:
    """Return whether a text is a SHA-256: 64 lower-case hexadecimal digits."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


# Text to plain values


def loads(text: str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:  # noqa: ANN401 -- as json.loads
    """Parse JSON that others wrote, as `json.loads`, but never into a RecursionError.

    :raises ValueError: it is no JSON, or has more than `DEEPEST` levels.
    """
    check_levels(text)
    return json.loads(text, object_pairs_hook=object_pairs_hook)


def check_levels(text: str) -> None:
    """Check the nesting before parsing: a RecursionError at the stack's end also breaks whatever Python runs there.

    :raises Misfit: more than `DEEPEST` levels.
    """
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    level = 0
    for bracket in BRACKETS.findall(STRINGS.sub("", text)):
        level += 1 if bracket in "[{" else -1
        if level > DEEPEST:
            raise Misfit(f"it has more than {DEEPEST} levels")


def parse(text: bytes) -> object:
    """Parse strict JSON, UTF-8.

    :raises Misfit: any other text, a repeated name, a number beyond float64 or 64 bits, a lone surrogate, or more than
        `DEEPEST` levels.
    """
    try:
        decoded = text.decode("utf-8")
        check_levels(decoded)
        document = json.loads(
            decoded,
            parse_constant=_refuse_number,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_object,
        )
    except ValueError as error:
        raise Misfit(str(error)) from None
    _check_values(document)
    return document


def _refuse_number(text: str) -> NoReturn:
    raise Misfit(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise Misfit(f"the number {shown(text)} is too large")
    return number


def _whole(text: str) -> int:
    # Before it is converted: Python refuses thousands of digits with an error of its own.
    if len(text) > 20 or abs(int(text)) >= LARGEST:
        raise Misfit(f"the number {shown(text)} is too large")
    return int(text)


def _object(pairs: list[tuple[str, object]]) -> Document:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise Misfit("a name stands twice in one object")
    return document


def _check_values(document: object) -> None:
    """Without recursion."""
    waiting = [(document, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            raise Misfit(f"it has more than {DEEPEST} levels")
        if isinstance(value, str) and not _encodes(value):
            raise Misfit(f"{shown(value)} holds half of a surrogate pair")
        parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(part, depth + 1) for part in parts]


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# A document's checksum of itself


def sealed(document: Mapping[str, Any]) -> Document:
    """Return the document with a field `checksum` over all others, independent of their order and of white space."""
    others = {name: value for name, value in document.items() if name != CHECKSUM}
    return others | {CHECKSUM: _digest(others)}


def check_seal(document: Mapping[str, Any]) -> None:
    """Raise Misfit if the document has no checksum or a wrong one."""
    if CHECKSUM not in document:
        raise Misfit(f"no {CHECKSUM!r} of itself: it was cut short, or written before there was one")
    if document[CHECKSUM] != sealed(document)[CHECKSUM]:
        raise Misfit("it does not give its own checksum: it was changed after it was written")


def _digest(document: Document) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


# Plain values to dataclasses


def build(kind: type[Kind], value: object, readers: Readers | None = None, place: str = "") -> Kind:
    """Build a value of a type: a dataclass, or a type that its fields may have. Unknown fields are ignored.

    :param readers: functions that read certain types instead, by annotation.
    :param place: place of the value, for messages.
    :raises Misfit: a field is missing, or of another type or range.
    """
    return cast(Kind, _read(kind, value, place, readers or {}))


def _read(hint: Any, value: Any, place: str, readers: Readers) -> object:  # noqa: ANN401
    if hint in readers:
        return _checked(lambda: readers[hint](value), place)
    if hint in (Any, object):
        return value
    origin, hints = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(hints[0], value, place, readers)
    if origin is tuple:
        return _tuple(hints, _of(list, value, place), place, readers)
    if origin in (dict, Mapping):
        items = _of(dict, value, place).items()
        return {key: _read(hints[1], item, f"{place}[{shown(key)}]", readers) for key, item in items}
    if is_dataclass(hint):
        return _dataclass(cast(type, hint), _of(dict, value, place), place, readers)
    return _of(hint, value, place)


# Each type's name in messages, and the Python types accepted for it.
_NAMES: dict[type, tuple[str, tuple[type, ...]]] = {
    float: ("a number", (float, int)),
    int: ("a whole number", (int,)),
    bool: ("true or false", (bool,)),
    str: ("a text", (str,)),
    list: ("a list", (list, tuple)),
    dict: ("an object", (Mapping,)),
}


def _of(kind: Any, value: Any, place: str) -> Any:  # noqa: ANN401
    name, allowed = _NAMES[kind]
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise Misfit(f"{place or 'it'} is {shown(value)}, but must be {name}")
    return float(cast(float, value)) if kind is float else value


def _tuple(hints: tuple[Any, ...], value: list[Any], place: str, readers: Readers) -> tuple[object, ...]:
    kinds = [hints[0]] * len(value) if hints[-1] is Ellipsis else list(hints)
    if len(kinds) != len(value):
        raise Misfit(f"{place} has {len(value)} items, but must have {len(kinds)}")
    return tuple(
        _read(kind, item, f"{place}[{i}]", readers) for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _dataclass(kind: type, value: Mapping[str, Any], place: str, readers: Readers) -> object:
    given = {}
    for one, hint in _model(kind):
        name = one.metadata.get("name", one.name)
        if name in value:
            given[one.name] = _read(hint, value[name], f"{place}.{name}".lstrip("."), readers)
        elif one.default is MISSING and one.default_factory is MISSING:
            raise Misfit(f"no {name!r}" + (f" in {place}" if place else ""))
    return _checked(lambda: kind(**given), place)


def _checked(make: Callable[[], object], place: str) -> object:
    try:
        return make()
    except ValueError as error:
        raise Misfit(f"{place}: {error}" if place else str(error)) from None


@cache
def _model(kind: type) -> tuple[tuple[Field[Any], Any], ...]:
    hints = get_type_hints(kind)
    return tuple((one, hints[one.name]) for one in fields(kind))


def shown(value: object) -> str:
    """Return a value for a message: one short line, without control characters."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"

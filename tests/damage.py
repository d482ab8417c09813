"""Damage, drawn from a seed: flipped bits of files, and JSON documents with wrong values in them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from index.typed import CHECKSUM, sealed

Document = dict[str, Any]

WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3.5,
    2**62,
    "",
    "x",
    "\x1b[31m",
    "../x",
    [],
    {},
    [[]],
    {"": None},
)
"""Values that take the place of right ones."""

TEXTS = (
    "1e999",
    "-1e999",
    "9" * 400,
    "9" * 5000,
    "NaN",
    "-Infinity",
    '"\\ud800"',
    "[" * 2000 + "]" * 2000,
    "[" * 100_000,
    '{"a":' * 2000 + "1" + "}" * 2000,
    "",
    "{",
    "\x00",
    '"\x01"',
    '{"a": 1, "a": 2}',
)
"""JSON, or what should be it, that readers have failed on."""


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_bit(path: Path, rng: random.Random, *, within: int | None = None) -> int:
    """Flip one bit, in place; gives the byte's place. An empty file is let be.

    :param within: of the first so many bytes.
    """
    data = bytearray(path.read_bytes())
    if not data:
        return 0
    place = rng.randrange(min(len(data), within or len(data)))
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return place


def rewrite(path: Path, change: Callable[[Document], object], *, seal: bool = True) -> None:
    """Change a JSON document in place; with a right checksum of itself, where it has one."""
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(sealed(document) if seal and CHECKSUM in document else document), encoding="utf-8")


def damaged_documents(document: Document, rng: random.Random, count: int) -> Iterator[str]:
    """Texts of the document with one to three places wrong, every other one with a right checksum of itself."""
    for number in range(count):
        damaged = copy.deepcopy(document)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _damage(damaged, rng)
        if number % 4 == 3:
            yield _with_text(damaged, rng)
        else:
            yield json.dumps(sealed(damaged) if number % 2 and CHECKSUM in damaged else damaged)


def _damage(document: Document, rng: random.Random) -> None:
    """Take a value away, or put a wrong one, or another one of the document, in its place."""
    holder, key = rng.choice(list(_places(document)) or [(document, "x")])
    what = rng.randrange(6)
    if what == 0 and key in holder if isinstance(holder, dict) else what == 0:
        del holder[key]
    elif what == 1:
        other, place = rng.choice(list(_places(document)))
        holder[key] = copy.deepcopy(other[place])
    elif what == 2 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "\x1b]0;x\x07", "../x", "é"))] = holder.pop(key, None)
    else:
        holder[key] = copy.deepcopy(rng.choice(WRONG))


def _with_text(document: Document, rng: random.Random) -> str:
    """A value, or the end, of the text replaced by what is hardly JSON."""
    holder, key = rng.choice(list(_places(document)) or [(document, "x")])
    holder[key] = "HERE"
    text = json.dumps(document).replace('"HERE"', rng.choice(TEXTS))
    return text[: rng.randrange(len(text))] if not rng.randrange(4) else text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key or number) of every value in lists and objects, but for the checksum."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in items:
        if key != CHECKSUM:
            yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)

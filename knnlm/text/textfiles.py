"""Files of UTF-8 text and of JSON Lines, read strictly: errors name the place of what is not text."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from knnlm.errors import InputError
from knnlm.json_text import loads
from knnlm.regular import open_regular

BLOCK_BYTES = 1 << 20
# A line is a document and held in memory; without a limit, a file without line ends would fill it.
LINE_BYTES = 1 << 28


@dataclass(frozen=True)
class Row:
    """An object of JSON Lines or a row of a hub set with all its fields, and its origin."""

    fields: Mapping[str, object]
    source: str
    number: int
    where: str
    """Place for messages: `line 3 of questions.jsonl`."""


def decode_blocks(path: Path) -> Iterator[str]:
    """Yield the file's text in bounded pieces, with LF line ends and without a byte-order mark.

    :raises InputError: bytes that are not UTF-8, or NUL.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    position = 0
    with open_regular(path) as file:
        while block := file.read(BLOCK_BYTES):
            # Bytes of a character that is cut by the end of the last block are decoded with this one.
            begin = position - len(decoder.getstate()[0])
            text = _decode(block, decoder.decode, begin, path)
            yield lines.decode(text.removeprefix("\ufeff") if not position else text)
            position += len(block)
        begin = position - len(decoder.getstate()[0])
        yield lines.decode(_decode(b"", lambda rest: decoder.decode(rest, final=True), begin, path), final=True)


def _decode(data: bytes, decoder: Callable[[bytes], str], begin: int, path: Path) -> str:
    """The text of bytes that begin at byte `begin` of a file."""
    try:
        text = decoder(data)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"{path} is not UTF-8 text: byte {begin + error.start} is 0x{byte:02x}; convert it, or leave it out"
        ) from None
    if "\0" in text:
        place = begin + len(text[: text.index("\0")].encode())
        raise InputError(f"{path} looks binary: byte {place} is NUL; give text in UTF-8")
    return text


def json_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON Lines file; blank lines are skipped.

    :raises InputError: a line that is not UTF-8, not a JSON object, or too long.
    """
    return (row for row, _ in _rows_and_ends(path))


def text_share(path: Path, text_field: str, rows: int) -> float:
    """Estimate a field's share of a JSON Lines file, in bytes, from its first rows. Raises as `json_rows`."""
    sample = [(text_of(row.fields, text_field, row.where), end) for row, end in islice(_rows_and_ends(path), rows)]
    return sum(len(text.encode()) for text, _ in sample) / sample[-1][1] if sample else 0.0


def _rows_and_ends(path: Path) -> Iterator[tuple[Row, int]]:
    """Each row with its end's position in the file, in bytes."""
    position = 0
    with open_regular(path) as file:
        # readline with a limit returns longer lines in pieces.
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), start=1):
            where = f"line {number} of {path}"
            if len(line) > LINE_BYTES:
                raise InputError(f"{where} is over {LINE_BYTES:,} bytes; JSON Lines has one document on a line")
            text = _decode(line, lambda data: str(data, "utf-8"), position, path)
            text = text.removeprefix("\ufeff") if number == 1 else text
            position += len(line)
            if not text.isspace() and text:
                yield Row(_parse(text, where), path.name, number, where), position


def _parse(line: str, where: str) -> Mapping[str, object]:
    try:
        row = loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error.msg} at column {error.colno}; mend or remove it") from None
    except ValueError as error:
        raise InputError(f"{where} cannot be read as JSON: {error}; mend or remove it") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} is no JSON object but {type(row).__name__}; write one {{...}} on each line")
    return row


def text_of(row: Mapping[str, object], text_field: str, where: str) -> str:
    """Return the row's text; null counts as empty.

    :raises InputError: the row lacks the field, or it is not a string.
    """
    if text_field not in row:
        raise no_field(text_field, row, where)
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{text_field!r} in {where} is no string but {type(text).__name__}; choose with `text_field`")
    return whole_characters(text)


def no_field(text_field: str, fields: Iterable[str], where: str) -> InputError:
    """Return the error for a missing field; it lists those present."""
    return InputError(
        f"{where} has no field {text_field!r}, only {', '.join(fields) or 'none'}; name it with `text_field`"
    )


def whole_characters(text: str) -> str:
    """Replace lone surrogates (U+D800 to U+DFFF), which JSON can hold but which cannot be tokenised."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

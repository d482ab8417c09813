"""Documents and their tokens, read from files, folders and hub sets; knows nothing of windows or models.

Everything is streamed: memory holds one document (at most 16 million characters) and one block of a file.

`knnlm.text.hub` describes the names of hub sets.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnlm.errors import InputError, first_line
from knnlm.places import HUB_PREFIX
from knnlm.regular import check_regular
from knnlm.text import parquet, textfiles
from knnlm.text.hub import HubSet, hub_rows, parse_hub_set
from knnlm.text.sizes import Sizes
from knnlm.text.windows import TokenDocument

# A document's text and tokens are in memory together; longer documents are cut between paragraphs.
DOCUMENT_CHARACTERS = 16_000_000
# Rows of JSON Lines, over all files, from which the share of text is estimated.
SAMPLE_ROWS = 200
# A reader for each type of file: yields (number, text) of each document, of any length.
Readers = Mapping[str, Callable[[Path, str], Iterator[tuple[int, str]]]]


@dataclass(frozen=True)
class Document:
    """One text, and where it came from."""

    text: str
    source: str
    """The file's base name, or the hub set's name as given."""
    number: int
    """Line of a .jsonl, row of a .parquet or hub set, part of a .txt, from 1."""


def read_documents(paths: Sequence[str | Path], *, text_field: str = "text") -> Iterator[Document]:
    """Read files, folders (recursively, in sorted order) and hub sets, in the order given, as a stream.

    A .txt file is one document; .jsonl has one on each line and .parquet one in each row, under `text_field`.
    Text is UTF-8. Empty documents are skipped, documents over 16 million characters are cut into several, and a
    file reached twice is read once. In folders, files of other types and hidden ones are skipped.

    :raises InputError: at once for paths that are missing, empty or of an unknown type; during reading for text that
        cannot be read, and at the end if there was no text at all.
    """
    return (document for document in _read(_find(paths), text_field, READERS) if not _is_blank(document))


def read_text_rows(paths: Sequence[str | Path], *, text_field: str = "text") -> Iterator[Document]:
    """Read the same text in the rows that `datasets` makes of it, empty ones too: a .txt by lines, with line ends.

    Raises as `read_documents`.
    """
    return _read(_find(paths), text_field, {**READERS, ".txt": _read_txt_lines})


def check_paths(paths: Sequence[str | Path]) -> None:
    """Check that there is text to read, before anything heavy is loaded.

    :raises InputError: a path is missing, empty or of an unknown type.
    """
    _find(paths)


def thin(documents: Iterable[Document], share: float, *, section: int = 16_384) -> Iterator[Document]:
    """Yield about a share (0 to 1) of the text, in sections of `section` characters spread evenly over it.

    Sections, not documents, because one document can be half of the text.
    """
    due = section / 2  # so that the number of sections is rounded, not cut
    for document in documents:
        for start in range(0, len(document.text), section):
            piece = document.text[start : start + section]
            due += share * len(piece)
            if due >= len(piece):
                due -= len(piece)
                yield replace(document, text=piece)


def read_rows(path: str | Path) -> Iterator[textfiles.Row]:
    """Read the rows of a .jsonl file or a hub set with all their fields, as a stream.

    :raises InputError: at once for a path that is missing, empty or no .jsonl file; later as `read_documents`.
    """
    if str(path).startswith(HUB_PREFIX):
        return _hub_set_rows(parse_hub_set(str(path)))
    file = Path(path)
    if file.is_dir() or file.suffix.lower() != ".jsonl":
        raise InputError(f"{path} is no .jsonl file; give JSON Lines, or a hub set such as hf:REPO/CONFIG:SPLIT")
    _find_files(file)
    return _file_rows(file)


def _file_rows(path: Path) -> Iterator[textfiles.Row]:
    try:
        yield from textfiles.json_rows(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _hub_set_rows(hub_set: HubSet) -> Iterator[textfiles.Row]:
    for number, fields in enumerate(hub_rows(hub_set, None), start=1):
        yield textfiles.Row(fields, hub_set.name, number, f"row {number} of {hub_set.name}")


def text_bytes(paths: Sequence[str | Path], *, text_field: str = "text") -> int | None:
    """Estimate the bytes of text in the paths, without other columns; None if a hub set is among them.

    The sum of file sizes; for a .parquet the column's size, for a .jsonl scaled by the text's share of its first rows.

    :raises InputError: a path is missing, empty or of an unknown type, or the first rows cannot be read.
    """
    found = _find(paths)
    files = [one.path for one in found if isinstance(one, _File)]
    if len(files) < len(found):
        return None
    sample = max(1, SAMPLE_ROWS // max(1, sum(path.suffix.lower() == ".jsonl" for path in files)))
    return sum(_file_bytes(path, text_field, sample) for path in files)


def _file_bytes(path: Path, text_field: str, sample: int) -> int:
    try:
        measure = TEXT_BYTES.get(path.suffix.lower())
        return measure(path, text_field, sample) if measure else path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from None


Encode = Callable[[str], NDArray[np.int32]]
"""Maps a text to its tokens."""
EncodeWithEnds = Callable[[str], tuple[NDArray[np.int32], NDArray[np.int64]]]
"""Maps a text to its tokens, and where each ends in the text's UTF-8 bytes."""


def measured(row: Document, encode: EncodeWithEnds) -> TokenDocument:
    """Return a document's tokens with their sizes."""
    tokens, ends = encode(row.text)
    return TokenDocument(np.asarray(tokens, np.int32), row.source, row.number, Sizes.of(row.text, ends))


def tokenize(
    documents: Iterable[Document], encode: Encode, *, max_tokens: int | None = None
) -> Iterator[TokenDocument]:
    """Encode each document; documents with fewer than two tokens have nothing to predict and are skipped.

    :param max_tokens: end of the stream, possibly inside a document.
    :raises InputError: `max_tokens` is below 2, or no document has two tokens.
    """
    found = (TokenDocument(np.asarray(encode(one.text), np.int32), one.source, one.number) for one in documents)
    return _limited(found, max_tokens)


def tokenize_measured(
    documents: Iterable[Document], encode: EncodeWithEnds, *, max_tokens: int | None = None
) -> Iterator[TokenDocument]:
    """As `tokenize`, with the sizes of the tokens, which an evaluation needs."""
    return _limited((measured(one, encode) for one in documents), max_tokens)


def _limited(documents: Iterable[TokenDocument], max_tokens: int | None) -> Iterator[TokenDocument]:
    """Documents of at least two tokens, up to a number of tokens.

    :raises InputError: `max_tokens` is below 2, or no document has two tokens.
    """
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"`max_tokens` is {max_tokens}, but a token and its predecessor take at least 2")
    left, empty = max_tokens, True
    for document in documents:
        kept = document if left is None or len(document.tokens) <= left else document.part(0, left)
        if len(kept.tokens) < 2:
            continue
        empty = False
        yield kept
        left = None if left is None else left - len(kept.tokens)
        if left is not None and left < 2:
            return
    if empty:
        raise InputError("no document of the text has two tokens, so there is no next token to learn; give more text")


@dataclass(frozen=True)
class _File:
    path: Path
    named: bool
    """Named by the user, not found in a folder: then an empty file is an error."""


def _find(paths: Sequence[str | Path]) -> list[_File | HubSet]:
    """Find all files and hub sets; every error in a path is raised here, before any work."""
    if isinstance(paths, str | Path):
        paths = [paths]
    if not paths:
        raise InputError("no text was given; name a file, a folder, or a hub set such as hf:wikitext/wikitext-2-raw-v1")
    found: dict[object, _File | HubSet] = {}
    for path in map(str, paths):
        ones = [parse_hub_set(path)] if path.startswith(HUB_PREFIX) else _find_files(Path(path))
        for one in ones:
            found.setdefault(one.path.resolve() if isinstance(one, _File) else one, one)
    return list(found.values())


def _find_files(path: Path) -> list[_File]:
    try:
        if path.is_dir():
            return _files_below(path)
        check_regular(path)
        size = path.stat().st_size
    except FileNotFoundError:
        raise InputError(f"there is no file or folder {path}; check the path") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if path.suffix.lower() not in READERS:
        raise InputError(f"{path} is none of the types that can be read: {TYPES}; convert or rename it")
    if not size:
        raise InputError(f"{path} is empty (0 bytes); give a file with text")
    return [_File(path, named=True)]


def _files_below(folder: Path) -> list[_File]:
    files: list[_File] = []
    for parent, folders, names in os.walk(folder, onerror=_stop):
        # Hidden: .git and the like, and the binary ._name.txt that macOS writes beside name.txt.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
        # Skip pipes, which would block; keep broken links, which are reported.
        visible = [path for path in visible if path.is_file() or not path.exists()]
        files += [_File(path, named=False) for path in visible if path.suffix.lower() in READERS]
    for file in files:
        try:
            check_regular(file.path)
        except OSError as error:
            raise _unreadable(file.path, error) from None
    if not files:
        raise InputError(f"the folder {folder} has no file of a type that can be read: {TYPES}")
    return files


def _stop(error: OSError) -> None:
    raise _unreadable(error.filename, error) from None


def _unreadable(path: object, error: OSError) -> InputError:
    return InputError(f"cannot read {path}: {error.strerror or first_line(error)}; check the path and its permissions")


def _read(found: Iterable[_File | HubSet], text_field: str, readers: Readers) -> Iterator[Document]:
    """Every document, blank ones too; InputError if all are blank."""
    blank = True
    for one in found:
        stream = _read_file(one, text_field, readers) if isinstance(one, _File) else _read_hub_set(one, text_field)
        for document in stream:
            blank = blank and _is_blank(document)
            yield document
    if blank:
        raise InputError("there is no text in what was given, only empty documents; give a file with text")


def _is_blank(document: Document) -> bool:
    return not document.text or document.text.isspace()


def _read_file(file: _File, text_field: str, readers: Readers) -> Iterator[Document]:
    blank = True
    try:
        for number, text in readers[file.path.suffix.lower()](file.path, text_field):
            for part in _cut([text]):
                document = Document(part, file.path.name, number)
                blank = blank and _is_blank(document)
                yield document
    except OSError as error:
        raise _unreadable(file.path, error) from None
    if blank and file.named:
        raise InputError(f"{file.path} has no text, only white space or empty documents; give a file with text")


def _read_txt(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    return enumerate(_cut(textfiles.decode_blocks(path)), start=1)


def _read_txt_lines(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    parts = _cut(textfiles.decode_blocks(path))
    # Not `splitlines`, which also cuts at form feeds and Unicode's separators.
    return enumerate(itertools.chain.from_iterable(map(io.StringIO, parts)), start=1)


def _cut(blocks: Iterable[str]) -> Iterator[str]:
    """Join blocks of text and cut them again into parts of at most `DOCUMENT_CHARACTERS`."""
    text = ""
    for block in blocks:
        text += block
        while len(text) > DOCUMENT_CHARACTERS:
            border = _border(text, DOCUMENT_CHARACTERS)
            yield text[:border]
            text = text[border:]
    yield text


def _border(text: str, limit: int) -> int:
    """The last end of a paragraph, else of a line, else of a word, from half of the limit on; else the limit."""
    for mark in ("\n\n", "\n", " "):
        place = text.rfind(mark, limit // 2, limit)
        if place >= 0:
            return place + len(mark)
    return limit


def _read_jsonl(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    for row in textfiles.json_rows(path):
        yield row.number, textfiles.text_of(row.fields, text_field, row.where)


def _read_parquet(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    for number, value in enumerate(parquet.column_values(path, text_field), start=1):
        yield number, textfiles.text_of({text_field: value}, text_field, f"row {number} of {path}")


READERS: Readers = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
TYPES = ", ".join(READERS)
# The bytes of text in a file whose text is not all of it: path, text field, rows to look at.
TEXT_BYTES: Mapping[str, Callable[[Path, str, int], int]] = {
    ".jsonl": lambda path, field, rows: int(path.stat().st_size * textfiles.text_share(path, field, rows)),
    ".parquet": lambda path, field, rows: parquet.column_bytes(path, field),
}


def _read_hub_set(hub_set: HubSet, text_field: str) -> Iterator[Document]:
    for number, row in enumerate(hub_rows(hub_set, text_field), start=1):
        text = textfiles.text_of(row, text_field, f"row {number} of {hub_set.name}")
        yield from (Document(part, hub_set.name, number) for part in _cut([text]))

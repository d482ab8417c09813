"""The text column of Parquet files: its values in order, and its size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from knnlm.errors import InputError, first_line
from knnlm.regular import check_regular
from knnlm.text.textfiles import BLOCK_BYTES, no_field

ROWS_AT_ONCE = 64


def column_values(path: Path, name: str) -> Iterator[object]:
    """Yield the values of a column, with a few rows of the file in memory at a time.

    :raises InputError: no readable Parquet file, no such column or several, or a value that cannot be read.
    """
    with _open(path, name) as file:
        batches = file.iter_batches(ROWS_AT_ONCE, columns=[name])
        values = itertools.chain.from_iterable(batch.column(name) for batch in batches)
        for row, value in enumerate(values, start=1):
            yield _python_value(value, f"row {row} of {path}")


def _python_value(value: Any, where: str) -> object:  # noqa: ANN401 - pyarrow has no types here
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        message = f"{where} is not UTF-8 text: byte {error.start} is 0x{byte:02x}; convert it, or leave it out"
    except (ValueError, ArithmeticError) as error:  # dates out of Python's range
        message = f"{where} cannot be read: {first_line(error)}; mend or remove it"
    raise InputError(message)


def column_bytes(path: Path, name: str) -> int:
    """Return the uncompressed bytes of a column, dictionary-encoded values counted once per row group.

    Raises as `column_values`.
    """
    with _open(path, name) as file:
        groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
        chunks = (group.column(number) for group in groups for number in range(group.num_columns))
        return sum(int(chunk.total_uncompressed_size) for chunk in chunks if chunk.path_in_schema == name)


@contextmanager
def _open(path: Path, name: str) -> Iterator[Any]:
    """The opened file, checked for the column; errors in it become InputError."""
    import pyarrow  # here, because it takes a third of a second
    import pyarrow.parquet

    check_regular(path)
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK_BYTES) as file:
            _check_column(file.schema_arrow.names, name, path)
            yield file
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not readable Parquet: {first_line(error)}; write it again, or leave it out"
        ) from None


def _check_column(names: list[str], name: str, path: Path) -> None:
    if name not in names:
        raise no_field(name, names, str(path))
    if (count := names.count(name)) > 1:
        raise InputError(
            f"{path} has {count} columns {name!r}; write it again with one, or name another as `text_field`"
        )

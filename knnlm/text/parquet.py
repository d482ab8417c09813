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
    """The values of a column, a few rows of the file in memory at a time.

    :raises InputError: no readable Parquet, or no such column.
    """
    with _open(path, name) as file:
        batches = file.iter_batches(ROWS_AT_ONCE, columns=[name])
        yield from (value.as_py() for value in itertools.chain.from_iterable(batch.column(name) for batch in batches))


def column_bytes(path: Path, name: str) -> int:
    """What a column takes unpacked; values that are repeated in a part of the file count once. Raises as above."""
    with _open(path, name) as file:
        groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
        chunks = (group.column(number) for group in groups for number in range(group.num_columns))
        return sum(int(chunk.total_uncompressed_size) for chunk in chunks if chunk.path_in_schema == name)


@contextmanager
def _open(path: Path, name: str) -> Iterator[Any]:
    """The file, if it has the column; with one error for what is wrong in it."""
    import pyarrow  # here, because it takes a third of a second
    import pyarrow.parquet

    check_regular(path)
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK_BYTES) as file:
            if name not in file.schema_arrow.names:
                raise no_field(name, file.schema_arrow.names, str(path))
            yield file
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{path} is not readable Parquet: {first_line(error)}; write it again, or leave it out"
        ) from None

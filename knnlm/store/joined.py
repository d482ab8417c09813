"""Arrays one after the other as one: in memory while they are small, then in a mapped file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from knnlm.files import disk_errors

# Bytes up to which arrays are joined in memory: the values of 256 million keys.
LOADED_BYTES = 1 << 30


def joined(pieces: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Return the pieces as one array, a new one unless there is only one piece.

    :raises DatastoreError: the disk has no room for the temporary file, which has no name; names TMPDIR.
    """
    if len(pieces) == 1:
        return pieces[0]
    count = sum(map(len, pieces))
    if 4 * count <= LOADED_BYTES:
        return np.concatenate(pieces)
    with disk_errors(tempfile.gettempdir(), OSError, "TMPDIR"), tempfile.TemporaryFile(prefix="knnlm-") as file:
        for piece in pieces:
            file.write(np.ascontiguousarray(piece).data)
        file.flush()
        return np.memmap(file, np.int32, "r", shape=(count,))

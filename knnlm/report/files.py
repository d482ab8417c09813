"""Writing a text file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 under a temporary name, then rename it to `path`; a failure leaves `path` as it was.

    :raises OSError: the folder is missing or read-only, or the disk is full
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:  # Ctrl-C too must not leave half a file behind
        temporary.unlink(missing_ok=True)
        raise

"""Where a verb may write, found out before anything heavy is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from knnlm.errors import InputError
from knnlm.storage import refuse_existing


def check_new_folder(path: str | Path, *, overwrite: bool = False) -> None:
    """Find out before any work whether a datastore can be made here.

    :raises DatastoreExists: the folder holds something.
    :raises InputError: it lies where nothing can be written.
    """
    refuse_existing(path, overwrite=overwrite)
    _check_writable(Path(path), "--out")


def check_new_file(path: str | Path, *, option: str = "--out", overwrite: bool = False) -> None:
    """:raises InputError: before any work, that the file is there already or cannot be written; names the option."""
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{option} {file} is a folder; name a file in it")
    if file.exists() and not file.is_file():
        raise InputError(f"{option} {file} is no regular file, and would be replaced by one; choose another {option}")
    if file.exists() and not overwrite:
        raise InputError(f"{option} {file} exists; choose another {option}, or add --overwrite")
    _check_writable(file, option)


def check_report_folder(path: str | Path) -> None:
    """:raises InputError: before any work, that the folder holds something already or cannot be written."""
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"--report {folder} exists and is not an empty folder; choose another --report")
    _check_writable(folder, "--report")


def _check_writable(path: Path, option: str) -> None:
    there = next(parent for parent in path.resolve().parents if parent.exists())
    if not there.is_dir():
        raise InputError(f"{option} {path} cannot be made: {there} is a file; choose another {option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path} cannot be made: {there} cannot be written; choose another {option}")

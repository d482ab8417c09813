"""Checkpoints of a training, in OUT.checkpoints until it is over: whose they are, the last of them, what is kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from index.typed import Misfit, parse
from knnlm.errors import DatastoreExists, InputError
from knnlm.files import make_parents, remove_empty, write_json

# What tells one training from another; without it, a folder is not ours.
RECORD, FORMAT = "training.json", "knnlm-training"
# What a checkpoint has last: without it, the checkpoint was being written when the process died.
LAST_FILE = "trainer_state.json"


def checkpoints_of(out: str | Path) -> Path:
    """The folder of the checkpoints of a training whose result goes to `out`."""
    place = Path(out).resolve()
    return place.with_name(f"{place.name}.checkpoints")


def check_checkpoints(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Find out before any work whether checkpoints can lie here.

    :raises DatastoreExists: the folder holds something that is not of a training.
    :raises InputError: it holds a training that was stopped, which is neither to go on nor to be replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if _record(folder) is None:
        raise DatastoreExists(
            f"{folder} is where checkpoints would lie, but holds something else; choose another `out`, or move it"
        )
    if not (resume or overwrite):
        raise InputError(
            f"{folder} holds a training that was stopped; add `resume=True` to go on with it, or "
            "`overwrite=True` to begin anew"
        )


@contextmanager
def keep_checkpoints(
    folder: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[Path | None]:
    """Give the last whole checkpoint to go on from, if any; remove the folder when the block has ended well.

    Where the block fails, or is stopped, whole checkpoints are kept, and a note of the exception says where.

    :param identity: what two runs must share for one to go on with the other's checkpoints.
    :raises InputError: as `check_checkpoints`, or the checkpoints are of another training; says what differs.
    """
    check_checkpoints(folder, resume=resume, overwrite=overwrite)
    last = _last(folder, identity) if resume else None
    parents = make_parents(folder)
    if last is None:
        _begin(folder, identity)
    try:
        yield last
    except BaseException as error:  # Ctrl-C and SIGTERM too
        kept = _whole(folder)
        if kept:
            error.add_note(
                f"the training is kept up to step {max(kept)} in {folder}; the same training with `resume=True` goes "
                "on with it, with `overwrite=True` in its place begins anew"
            )
        else:
            shutil.rmtree(folder, ignore_errors=True)
            remove_empty(parents)
        raise
    shutil.rmtree(folder)


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record = parse((folder / RECORD).read_bytes())
    except (OSError, Misfit):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


def _begin(folder: Path, identity: Mapping[str, Any]) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    write_json(folder / RECORD, {"format": FORMAT, **identity})


def _last(folder: Path, identity: Mapping[str, Any]) -> Path | None:
    made_with = _record(folder)
    if made_with is None:
        return None
    for name, value in identity.items():
        if made_with.get(name) != value:
            raise InputError(
                f"{folder} is of another training: {name} was {made_with.get(name)}, and now is {value}; give the same "
                "arguments, or `overwrite=True` in place of `resume=True` to begin anew"
            )
    whole = _whole(folder)
    return whole[max(whole)] if whole else None


def _whole(folder: Path) -> dict[int, Path]:
    """Checkpoints that were written to their end, by step."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{LAST_FILE}")]
    return {int(path.name.split("-")[1]): path for path in found}

"""Checkpoints of a training, in OUT.checkpoints until it is finished."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from knnlm.errors import DatastoreExists, InputError
from knnlm.files import make_parents, remove_empty, write_json
from knnlm.places import read_object

# Record that identifies the training; a folder without it was not made by knnlm.
RECORD, FORMAT = "training.json", "knnlm-training"
# Last file written to a checkpoint: without it, the checkpoint is incomplete.
LAST_FILE = "trainer_state.json"
# Names of everything that a training writes here, with the record's temporary name before its rename.
OURS = re.compile(r"checkpoint-\d+|training\.json|\.training\.json\.partial-[0-9a-f]{8}")


def checkpoints_of(out: str | Path) -> Path:
    """Folder for the checkpoints of a training whose result goes to `out`."""
    place = Path(out).resolve()
    return place.with_name(f"{place.name}.checkpoints")


def check_checkpoints(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Check before any work that checkpoints can be written to a folder.

    :raises DatastoreExists: the folder holds something else.
    :raises InputError: it holds a stopped training, which is to be neither resumed nor replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if _record(folder) is None:
        raise DatastoreExists(
            f"{folder} is where checkpoints would lie, but holds something else; choose another `out`, or move it"
        )
    if others := _others(folder):
        raise DatastoreExists(
            f"{folder} holds {', '.join(others[:3])}, which knnlm did not make; move that, or choose another `out`"
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
    """Yield the last complete checkpoint to resume from, if any; remove the folder after a successful block.

    If the block fails or is stopped, complete checkpoints are kept, and a note of the exception says where.

    :param identity: values that must be equal for one run to resume from another's checkpoints.
    :raises InputError: as `check_checkpoints`; or the checkpoints are of another training, and the message says why.
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
            _remove(folder)
            remove_empty(parents)
        raise
    _remove(folder)


def _record(folder: Path) -> dict[str, Any] | None:
    record = read_object(folder / RECORD)
    return record if record is not None and record.get("format") == FORMAT else None


def _others(folder: Path) -> list[str]:
    """Names that are neither a checkpoint nor the record."""
    names = (path.name for path in sorted(folder.iterdir()))
    return [name for name in names if not OURS.fullmatch(name)]


def _remove(folder: Path) -> None:
    """Remove checkpoints and record, and the folder unless it holds anything else."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and OURS.fullmatch(path.name):
            shutil.rmtree(path)
        elif OURS.fullmatch(path.name):
            path.unlink()
    remove_empty([folder])


def _begin(folder: Path, identity: Mapping[str, Any]) -> None:
    if folder.exists():
        _remove(folder)
    folder.mkdir(exist_ok=True)
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
    """Complete checkpoints, by step."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{LAST_FILE}")]
    return {int(path.name.split("-")[1]): path for path in found}

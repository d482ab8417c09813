"""Files that are whole or absent; short names of paths."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from knnlm import files as storage
from knnlm.errors import DatastoreError, DatastoreExists
from knnlm.files import is_ours, new_folder, path_tails, refuse_existing, short_names, write_json

ROOT = Path(__file__).resolve().parents[1]


def make_ours(folder: Path) -> Path:
    folder.mkdir()
    write_json(folder / "datastore.json", {"format": "knnlm-datastore"})
    (folder / "keys").write_text("old")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# write_json


def test_json_is_strict_and_plain(tmp_path):
    write_json(
        tmp_path / "a.json", {"a": (np.int64(1), np.float32(0.5)), "b": {3: float("nan")}, "c": [np.inf, "é", None]}
    )

    def refuse(token):
        raise AssertionError(token)

    document = json.loads((tmp_path / "a.json").read_text("utf-8"), parse_constant=refuse)
    assert document == {"a": [1, 0.5], "b": {"3": None}, "c": [None, "é", None]}


def test_json_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1} and names(tmp_path) == ["a.json"]


# new_folder


@pytest.mark.parametrize("existing", [False, True])
def test_folder_appears_whole(tmp_path, existing):
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    with new_folder(out) as folder:
        assert names(tmp_path) == [f".out.partial-{os.getpid()}"] + ["out"] * existing
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert not existing or not names(out)
    assert (out / "sub" / "a").read_text() == "a" and names(tmp_path) == ["out"]


def test_missing_parents_are_made_and_unmade(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert names(tmp_path) == []
    with new_folder(tmp_path / "a" / "b" / "out"):
        pass
    assert names(tmp_path / "a" / "b") == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, FileNotFoundError])
def test_any_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "out") as folder:
        (folder / "keys").mkdir()
        (folder / "keys" / "a").write_text("a")
        raise error
    assert names(tmp_path) == []


def test_content_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(DatastoreExists, match=r"out exists and is not empty.*`out`"),
        new_folder(tmp_path / "out"),
    ):
        pytest.fail("the block ran")
    with pytest.raises(DatastoreError, match="is a file"), new_folder(tmp_path / "out" / "thesis.txt"):
        pytest.fail("the block ran")
    with pytest.raises(DatastoreExists, match="exists"):
        refuse_existing(tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["thesis.txt"]


@pytest.mark.parametrize("manifest", [None, "{}", "[]", "no json", '{"format": "other"}', '{"format": 3}', "\x00\xff"])
def test_overwrite_keeps_what_is_not_ours(tmp_path, manifest):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    if manifest is not None:
        (out / "report.json").write_text(manifest, encoding="latin-1")
        (out / "datastore.json").write_text(manifest, encoding="latin-1")
    with pytest.raises(DatastoreExists, match=r"is not a knnlm folder.*choose another `out`"):
        with new_folder(out, overwrite=True):
            pytest.fail("the block ran")
    assert (out / "thesis.txt").exists() and not is_ours(out)


def test_overwrite_replaces_ours_only_after_success(tmp_path):
    out = make_ours(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), new_folder(out, overwrite=True):
        raise KeyboardInterrupt
    assert (out / "keys").read_text() == "old" and names(tmp_path) == ["out"]
    with new_folder(out, overwrite=True) as folder:
        assert (out / "keys").read_text() == "old"
        (folder / "new").write_text("new")
    assert names(out) == ["new"] and names(tmp_path) == ["out"]


def test_overwrite_follows_a_link_and_keeps_it(tmp_path):
    real = make_ours(tmp_path / "real")
    (tmp_path / "out").symlink_to(real)
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "out").is_symlink() and names(real) == ["new"]


def test_what_appears_during_the_work_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DatastoreExists, match="not empty"), new_folder(out):
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    assert names(out) == ["thesis.txt"] and names(tmp_path) == ["out"]


def test_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out = make_ours(tmp_path / "out")
    rename = Path.rename

    def interrupted(self, target):
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(out, overwrite=True):
        pass
    assert (out / "keys").read_text() == "old" and names(tmp_path) == ["out"]


def test_run_that_died_between_its_renames_loses_nothing(tmp_path):
    make_ours(tmp_path / ".out.old-123")
    with pytest.raises(DatastoreExists, match="not empty"), new_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    assert (tmp_path / "out" / "keys").read_text() == "old" and names(tmp_path) == ["out"]


def test_old_folder_of_a_run_that_died_after_its_renames_is_removed(tmp_path):
    make_ours(tmp_path / ".out.old-123")
    make_ours(tmp_path / "out")
    with new_folder(tmp_path / "out", overwrite=True):
        pass
    assert names(tmp_path) == ["out"]


def test_only_leftovers_of_this_place_are_removed(tmp_path):
    keep = [".out.partial-abc", ".out.partial-", ".out2.partial-1", "out.partial-1", ".out.partial-1.partial-2"]
    for name in [*keep, ".out.partial-1"]:
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted([*keep, "out"])


def test_run_at_work_is_not_disturbed(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        with pytest.raises(DatastoreExists, match="another run is writing"), new_folder(tmp_path / "out"):
            pytest.fail("the block ran")
    assert names(tmp_path / "out") == ["a"]


KILLED = """
    import os, signal, sys
    from knnlm.files import new_folder
    with new_folder(sys.argv[1]) as folder:
        (folder / "a").write_text("a")
        print("working", flush=True)
        signal.pause()
"""


def test_killed_run_leaves_a_hidden_folder_that_the_next_run_removes(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "working\n"
        with pytest.raises(DatastoreExists, match="another run is writing"), new_folder(out):
            pytest.fail("the block ran")
        run.send_signal(signal.SIGKILL)
    assert names(tmp_path) == [f".out.partial-{run.pid}"]
    # The same number again, as in a container where each run has the same PID.
    (tmp_path / f".out.partial-{run.pid}").rename(tmp_path / f".out.partial-{os.getpid()}")
    with new_folder(out):
        pass
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, number):
    with pytest.raises(DatastoreError, match=r"cannot write .*out: .*choose another `out`") as caught:
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("a")
            raise OSError(number, os.strerror(number))
    assert names(tmp_path) == [] and "\n" not in str(caught.value) and "partial" not in str(caught.value)


def test_disk_that_is_full_only_when_synced_leaves_nothing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = make_ours(tmp_path / "out")
    with pytest.raises(DatastoreError, match="No space left"), new_folder(out, overwrite=True) as folder:
        (folder / "a").write_text("a")
        monkeypatch.setattr(os, "fsync", full)
    assert names(tmp_path) == ["out"] and (out / "keys").read_text() == "old"


def test_parent_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("a")
    with (
        pytest.raises(DatastoreError, match=r"cannot write .*file/out: Not a directory"),
        new_folder(tmp_path / "file" / "out"),
    ):
        pytest.fail("the block ran")
    assert names(tmp_path) == ["file"]


def test_read_only_parent_is_one_line(tmp_path, monkeypatch):
    # The tests may run as root, who can write everywhere: the system's answer is put in its place.
    def refused(self, *arguments, **named):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    with (
        pytest.raises(DatastoreError, match=r"cannot write .*out: Permission denied; choose another `out`"),
        new_folder(tmp_path / "out"),
    ):
        pytest.fail("the block ran")
    assert names(tmp_path) == []


def test_mount_point_is_refused(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "out")
    with pytest.raises(DatastoreExists, match="mount point"), new_folder(tmp_path / "out"):
        pytest.fail("the block ran")


def test_file_system_without_locks_deletes_nothing(tmp_path, monkeypatch):
    def no_locks(handle, operation):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(storage.fcntl, "flock", no_locks)
    with new_folder(tmp_path / "out"):
        pass
    (tmp_path / ".new.partial-1").mkdir()
    with pytest.raises(DatastoreExists, match=r"\.new\.partial-1"), new_folder(tmp_path / "new"):
        pytest.fail("the block ran")
    assert names(tmp_path) == [".new.partial-1", "out"]


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corpus\.txt"), new_folder(tmp_path / "out"):
        (tmp_path / "corpus.txt").read_text()


# short names


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["runs/a/final"], ["final"]),
        (["a/x", "b/x", "b/y"], ["a/x", "b/x", "y"]),
        (["x", "a/x"], ["x", "a/x"]),
        (["b/x", "a/b/x", "c/b/x"], ["b/x", "a/b/x", "c/b/x"]),
        (["/data/x", "/more/x/"], ["data/x", "more/x"]),
        ([], []),
    ],
)
def test_names_are_as_short_as_can_be(names, short):
    assert short_names(names) == short


def test_tails_begin_with_the_whole():
    assert path_tails("runs/a/final/") == ["runs/a/final", "a/final", "final"]

"""Files that are whole or absent; short names of paths."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest

from knnlm import files as storage
from knnlm.errors import DatastoreError, DatastoreExists, InputError
from knnlm.files import all_or_none, new_folder, path_tails, short_names, temporary_folder, write_json, write_text
from knnlm.locks import LOCK, lock_folder
from knnlm.places import UNFINISHED, check_new_file, is_ours, mark_unfinished, refuse_existing, remove_ours

ROOT = Path(__file__).resolve().parents[1]


def make_ours(folder: Path) -> Path:
    """A datastore of one array; what it holds is of no interest here."""
    folder.mkdir()
    one = {"file": "keys"}
    document = {"format": "knnlm-datastore", "version": 1, "documents": one, "values": [one], "layers": {}}
    write_json(folder / "datastore.json", document)
    (folder / "keys").write_text("old")
    return folder


def make_leftover(folder: Path) -> Path:
    """What a dead run left: its lock file, which nobody holds."""
    folder.mkdir(exist_ok=True)
    os.close(lock_folder(folder))
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
        assert names(tmp_path) == [".out.partial"] + ["out"] * existing
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
        pytest.raises(DatastoreExists, match=r"out exists and is not empty; choose another `out`$"),
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
    with pytest.raises(
        DatastoreExists, match=r"is no datastore and is kept .* holds (.*, )*thesis.txt; choose another `out`"
    ):
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
        if target == out:
            raise KeyboardInterrupt
        return rename(self, target)

    def came_back(self, target):
        return rename(self, target) if self.name == ".out.old" else interrupted(self, target)

    monkeypatch.setattr(storage, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", came_back)
    with pytest.raises(KeyboardInterrupt), new_folder(out, overwrite=True):
        pass
    assert (out / "keys").read_text() == "old" and names(tmp_path) == ["out"]


def test_run_that_died_between_its_renames_loses_nothing(tmp_path):
    make_leftover(make_ours(tmp_path / ".out.old"))
    with pytest.raises(DatastoreExists, match="not empty"), new_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    assert (tmp_path / "out" / "keys").read_text() == "old" and names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["datastore.json", "keys"]


def test_old_folder_of_a_run_that_died_after_its_renames_is_removed(tmp_path):
    make_leftover(make_ours(tmp_path / ".out.old"))
    make_ours(tmp_path / "out")
    with new_folder(tmp_path / "out", overwrite=True):
        pass
    assert names(tmp_path) == ["out"]


def test_only_leftovers_of_this_place_are_removed(tmp_path):
    keep = [".out.partial-abc", ".out.partial-7", ".out.old", "out.partial", ".out.partial-8", ".out.partial-link"]
    for name in keep[:-1]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / ".out.partial-8" / LOCK).write_text("mine too")  # not our words
    make_leftover(tmp_path / "elsewhere")
    (tmp_path / ".out.partial-link").symlink_to(tmp_path / "elsewhere")
    make_leftover(tmp_path / ".out2.partial")
    for name in (".out.partial", ".out.partial-0123456789abcdef"):
        make_leftover(tmp_path / name)
    with new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted([*keep, ".out2.partial", "elsewhere", "out"])
    assert names(tmp_path / "elsewhere") == [LOCK] and names(tmp_path / ".out.partial-7") == ["mine"]


@pytest.mark.parametrize("kind", ["folder", "file", "fifo", "link"])
def test_what_has_the_name_of_a_leftover_and_is_not_ours_is_kept(tmp_path, kind):
    place = tmp_path / ".out.partial"
    if kind == "folder":
        place.mkdir()
        (place / "mine").write_text("mine")
    elif kind == "file":
        place.write_text("mine")
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to(make_leftover(tmp_path / "elsewhere"))
    before = names(tmp_path)
    with pytest.raises(DatastoreExists, match=r"\.out\.partial is in the way, and knnlm did not make it; move it"):
        with new_folder(tmp_path / "out"):
            pytest.fail("the block ran")
    assert names(tmp_path) == before


def test_lock_file_that_is_a_fifo_does_not_hang(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    os.mkfifo(tmp_path / ".out.partial" / LOCK)
    with pytest.raises(DatastoreExists, match="is in the way"), new_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    assert names(tmp_path / ".out.partial") == [LOCK]


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
    assert names(tmp_path) == [".out.partial"]
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

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with new_folder(tmp_path / "out"):
        pass
    make_leftover(tmp_path / ".new.partial")
    with pytest.raises(DatastoreExists, match=r"\.new\.partial"), new_folder(tmp_path / "new"):
        pytest.fail("the block ran")
    assert names(tmp_path) == [".new.partial", "out"]


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corpus\.txt"), new_folder(tmp_path / "out"):
        (tmp_path / "corpus.txt").read_text()


@pytest.mark.parametrize("exchange", [True, False])
def test_nothing_is_missing_while_one_folder_replaces_another(tmp_path, monkeypatch, exchange):
    """With an exchange of names there is a whole folder at each moment; else the old one is known by its lock file."""
    out = make_ours(tmp_path / "out")
    seen = []

    def spy(old, manifest):
        seen.append((old.name, names(out), LOCK in names(old)))

    monkeypatch.setattr(storage, "remove_ours", spy)
    if not exchange:
        monkeypatch.setattr(storage, "_exchange", lambda *_: False)
    with new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert seen == [(".out.partial" if exchange else ".out.old", [LOCK, "new"], True)]
    assert names(out) == ["new"]


KILLED_IN_SWAP = """
    import os, signal, sys
    from knnlm import files
    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "rename":
        files._exchange = lambda *_: False
        files.remove_ours = kill
    elif sys.argv[2] == "between":
        files._exchange = lambda *_: False
        renamed = files.Path.rename
        files.Path.rename = lambda self, target: kill() if self.name == ".out.partial" else renamed(self, target)
    elif sys.argv[2] == "before":
        files._exchange = kill
    else:
        files.remove_ours = kill
    with files.new_folder(sys.argv[1], overwrite=True) as folder:
        (folder / "new").write_text("new")
"""


@pytest.mark.parametrize(
    ("moment", "left"), [("before", "keys"), ("exchange", "new"), ("rename", "new"), ("between", None)]
)
def test_kill_while_one_folder_replaces_another(tmp_path, moment, left):
    out = make_ours(tmp_path / "out")
    command = [sys.executable, "-c", textwrap.dedent(KILLED_IN_SWAP), str(out), moment]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert out.exists() == (left is not None) and (left is None or (out / left).exists())
    if left != "new":
        with new_folder(out, overwrite=True):
            assert (out / "keys").read_text() == "old"  # also where it had to be brought back
    else:
        with pytest.raises(DatastoreExists, match="no datastore"), new_folder(out, overwrite=True):
            pytest.fail("the block ran")
        assert (out / "new").exists()
    # What is in the place is no datastore: it may be the user's, so the old one is kept beside it.
    assert names(tmp_path) == ([".out.old", "out"] if moment == "rename" else ["out"])


def test_old_folder_goes_where_the_new_one_is_in_place(tmp_path):
    make_leftover(make_ours(tmp_path / ".out.old"))
    make_ours(tmp_path / "out")
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]


def test_old_folder_that_cannot_come_back_is_named(tmp_path, monkeypatch):
    out = make_ours(tmp_path / "out")
    rename = Path.rename

    def refused(self, target):
        if target == out:
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(storage, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(DatastoreError) as raised, new_folder(out, overwrite=True):
        pass
    assert raised.value.__notes__ == [f"what was there before is in {tmp_path / '.out.old'}"]
    assert names(tmp_path) == [".out.old"] and (tmp_path / ".out.old" / "keys").exists()


def test_of_two_that_start_at_once_one_works(tmp_path):
    """Eight processes, which begin at one moment: one gets the place, the others learn it before their work."""
    code = """
        import sys
        from knnlm.errors import DatastoreExists
        from knnlm.files import new_folder
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            with new_folder(sys.argv[1]) as folder:
                print("works", flush=True)
                (folder / "a").write_text(sys.argv[2])
                sys.stdin.readline()
        except DatastoreExists:
            print("refused", flush=True)
    """
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out"), f"{number}"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 8
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    said = [run.stdout.readline().strip() for run in runs]  # before the one that works may end
    assert sorted(said) == ["refused"] * 7 + ["works"]
    assert [run.communicate("end\n", timeout=60)[0] for run in runs] == [""] * 8
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "a").read_text() == f"{said.index('works')}"


# What is whole, though not complete


@pytest.mark.parametrize("error", [KeyboardInterrupt, DatastoreError])
def test_what_is_whole_is_kept_where_nothing_else_is(tmp_path, error):
    out = tmp_path / "out"
    with pytest.raises(error) as raised, new_folder(out) as folder:
        (folder / "keys").write_text("hours of work")
        mark_unfinished(folder, "work")
        raise error(f"no room in {folder}/index")
    assert names(tmp_path) == ["out"] and names(out) == ["keys", UNFINISHED]
    assert str(raised.value) == f"no room in {out}/index"
    assert f"{out} is a whole datastore, though without all" in raised.value.__notes__[0]


def test_old_folder_wins_over_one_that_is_whole_but_not_complete(tmp_path):
    out = make_ours(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt) as raised, new_folder(out, overwrite=True) as folder:
        mark_unfinished(folder, "work")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"] and (out / "keys").read_text() == "old"
    assert raised.value.__notes__ == [f"{out} is as it was, and nothing half-written was left behind"]


def test_same_work_replaces_what_it_left_unfinished_and_other_work_does_not(tmp_path):
    out = make_ours(tmp_path / "out")
    mark_unfinished(out, "work")
    for other in ("", "other work"):
        with pytest.raises(DatastoreExists, match="not empty"), new_folder(out, work=other):
            pytest.fail("the block ran")
    (out / "mine").write_text("mine")
    with pytest.raises(DatastoreExists, match="holds mine, which knnlm did not make"), new_folder(out, work="work"):
        pytest.fail("the block ran")
    (out / "mine").unlink()
    with new_folder(out, work="work") as folder:
        assert (out / "keys").exists()
        assert names(folder) == [LOCK, "datastore.json", "keys", UNFINISHED]  # the work goes on with what is there
        (folder / "new").write_text("new")
        mark_unfinished(folder, "work")
    assert names(tmp_path) == ["out"] and names(out) == ["datastore.json", "keys", "new"]


def test_overwrite_goes_on_with_nothing(tmp_path):
    out = make_ours(tmp_path / "out")
    mark_unfinished(out, "work")
    with new_folder(out, work="work", overwrite=True) as folder:
        assert names(folder) == [LOCK]
    assert names(tmp_path) == ["out"] and names(out) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_finished_parts_stay_under_the_hidden_name(tmp_path, error):
    out = tmp_path / "out"
    with pytest.raises(error) as caught, new_folder(out, work="work") as folder:
        mark_unfinished(folder, "work", whole=False)
        write_json(folder / "datastore.json", {"parts": 1})
        raise error
    assert names(tmp_path) == [".out.partial"]
    assert caught.value.__notes__ == ["what is finished is kept: the same command goes on with it"]
    with new_folder(out, work="work") as folder:
        assert names(folder) == [LOCK, "datastore.json", UNFINISHED]
    assert names(tmp_path) == ["out"] and names(out) == ["datastore.json"]


@pytest.mark.parametrize(("work", "overwrite"), [("other work", False), ("", False), ("work", True)])
def test_other_work_and_overwrite_begin_anew(tmp_path, work, overwrite):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), new_folder(out, work="work") as folder:
        mark_unfinished(folder, "work", whole=False)
        write_json(folder / "datastore.json", {"parts": 1})
        raise KeyboardInterrupt
    with new_folder(out, work=work, overwrite=overwrite) as folder:
        assert names(folder) == [LOCK]
    assert names(tmp_path) == ["out"] and names(out) == []


KILLED_WHEN_WHOLE = """
    import os, signal, sys
    from knnlm.files import new_folder
    from knnlm.places import mark_unfinished
    with new_folder(sys.argv[1]) as folder:
        (folder / "keys").write_text("hours of work")
        mark_unfinished(folder, "work")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_had_made_whole_is_brought_to_its_place(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(KILLED_WHEN_WHOLE), str(out)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert names(tmp_path) == [".out.partial"]
    with pytest.raises(DatastoreExists, match="not empty"), new_folder(out):
        pytest.fail("the block ran")
    assert names(tmp_path) == ["out"] and (out / "keys").read_text() == "hours of work"


# Files


def test_fifo_with_the_name_of_a_temporary_file_is_let_be(tmp_path):
    os.mkfifo(tmp_path / f".a.json.partial-{os.getpid()}")
    write_json(tmp_path / "a.json", {"a": 1})
    assert names(tmp_path) == [f".a.json.partial-{os.getpid()}", "a.json"]


def test_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as raised:
        write_text(tmp_path / "a.txt", "a")
    assert raised.value.filename == str(tmp_path / "a.txt")


def test_files_of_one_block_are_there_together_or_not_at_all(tmp_path):
    one, other = tmp_path / "a" / "b" / "one", tmp_path / "a" / "b" / "other"
    with pytest.raises(KeyboardInterrupt), all_or_none(one, other):
        write_text(one, "1")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with all_or_none(one, other):
        write_text(one, "1")
    with pytest.raises(KeyboardInterrupt), all_or_none(one, other):
        write_text(other, "2")
        raise KeyboardInterrupt
    assert names(one.parent) == ["one"]


# Temporary folders


def test_temporary_folders_of_the_dead_are_removed_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "knnlm-queries-mine").mkdir()
    make_leftover(tmp_path / "knnlm-queries-dead")
    make_leftover(tmp_path / "other-dead")
    with temporary_folder("knnlm-queries-") as one, temporary_folder("knnlm-queries-") as other:
        assert one.is_dir() and other.is_dir()
        assert {one.name, other.name, "knnlm-queries-mine", "other-dead"} == set(names(tmp_path))
    assert names(tmp_path) == ["knnlm-queries-mine", "other-dead"]


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


# What a review with fresh eyes found


def test_an_old_store_outlives_a_folder_that_was_made_in_its_place(tmp_path: Path) -> None:
    # A run died between its two renames, and the user made a folder of that name.
    old = make_leftover(make_ours(tmp_path / ".x.old"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("mine")
    with pytest.raises(DatastoreExists), new_folder(tmp_path / "x"):
        pass
    assert (old / "keys").read_text() == "old" and (tmp_path / "x" / "notes.txt").read_text() == "mine"


def test_a_whole_store_whose_place_is_taken_meanwhile_is_kept_beside_it(tmp_path: Path) -> None:
    with pytest.raises(DatastoreExists) as found, new_folder(tmp_path / "x") as folder:
        (folder / "keys").write_text("hours")
        mark_unfinished(folder, "work")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "notes.txt").write_text("mine")
    (kept,) = tmp_path.glob("x-*")
    assert (kept / "keys").read_text() == "hours" and str(kept) in "\n".join(found.value.__notes__)
    assert (tmp_path / "x" / "notes.txt").read_text() == "mine"


def test_a_lock_goes_last_when_an_old_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, gone = make_leftover(make_ours(tmp_path / "x")), []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (gone.append(path.name), unlink(path, **options))[1])
    remove_ours(folder, "datastore.json")
    assert gone == ["keys", "datastore.json", LOCK] and not folder.exists()


def test_dead_folder_of_another_place_is_not_swept(tmp_path: Path) -> None:
    other = make_leftover(tmp_path / ".x.partial-two.partial")
    with new_folder(tmp_path / "x") as folder:
        (folder / "a").touch()
    assert other.is_dir()


def test_a_users_own_unfinished_json_is_foreign(tmp_path: Path) -> None:
    store = make_ours(tmp_path / "x")
    assert is_ours(store)
    (store / "unfinished.json").write_text('{"mine": 1}')
    assert not is_ours(store)


def test_a_link_to_nothing_is_no_new_file(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "gone.json")
    with pytest.raises(InputError, match="is a link to nothing"):
        check_new_file(tmp_path / "link.json")


def test_an_old_folder_that_cannot_be_removed_does_not_fail_a_finished_run(tmp_path, monkeypatch):
    make_ours(tmp_path / "out")

    def refuse(folder: Path, manifest: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(folder))

    monkeypatch.setattr(storage, "remove_ours", refuse)
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path / "out") == ["new"]

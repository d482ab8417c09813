"""Output never destroys what was there: killed and concurrent runs, places of what is read, FIFOs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from knnlm.files import new_folder
from knnlm.locks import LOCK
from tests.cli.refusals import RUN, check_complete, tree

ROOT = Path(__file__).resolve().parents[2]

KILLED = """
    import os, signal, sys
    from functools import partial
    from importlib import import_module
    module, name = sys.argv.pop(1).rsplit(".", 1)
    holder = import_module(module)
    setattr(holder, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    from knnlm.cli import main
    main()
"""
# moment of `run --overwrite`: whether the new one is in place by then
KILLS = {
    "knnlm.store.changeable.write_json": False,
    "knnlm.report.html.write_text": False,
    "knnlm.files.remove_ours": True,
}


@pytest.mark.parametrize("moment", KILLS)
def test_kill_leaves_the_old_datastore_complete_or_the_new_one(
    moment: str, call, store_folder: Path, gpt2_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(store_folder, out)
    before = tree(out)
    options = ("--model", gpt2_folder, "--text", text_file, "--out", out, "--layers", "-1.ffn_input", "--overwrite")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), moment, *map(str, (*RUN, *options))]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out"]
    (out / LOCK).unlink(missing_ok=True)
    if KILLS[moment]:
        (tmp_path / ".out.partial").rename(tmp_path / "aside")
        (tmp_path / "aside").rename(tmp_path.parent / f"{tmp_path.name}-aside")
        check_complete(call, tmp_path)
    else:
        assert tree(out) == before
        again = call(*RUN, *options)
        assert again.status == 0, again.errors
        check_complete(call, tmp_path)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["run", "build", "train"])
def test_run_that_comes_second_is_told_before_a_model_is_loaded(
    command: str, check_refused, text_file, tmp_path
) -> None:
    options = ("--model", "any", "--text", text_file, "--out", tmp_path / "out", "--overwrite")
    with new_folder(tmp_path / "out"):
        check_refused(command, *options, words=("another run is writing", "wait for it, or choose another --out"))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("out", "relation"), [("here", "is"), (".", "holds"), ("here/out", "lies in")])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("run", "--model"), ("run", "--text"), ("run", "--eval-text"), ("build", "--model"), ("build", "--text")),
        *(("train", "--model"), ("train", "--text"), ("train", "--other-text")),
    ],
)
def test_output_never_takes_the_place_of_what_is_read(
    option: str, out: str, relation: str, command: str, check_refused, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.txt").write_text("mine")
    given = {"--model": "any", "--text": text_file} | {option: tmp_path / "here"}
    options = [word for pair in given.items() for word in pair]
    words = (f"{tmp_path / out} {relation} {tmp_path / 'here'}, which is read", "choose another --out")
    check_refused(command, *options, "--out", tmp_path / out, "--overwrite", words=words)


def test_scores_never_take_the_place_of_what_is_read(check_refused, text_file: Path, tmp_path: Path) -> None:
    text = shutil.copy(text_file, tmp_path / "a.jsonl")
    options = ("score", "--model", "any", "--text", text, "--out", text, "--overwrite")
    check_refused(*options, words=("is", "a.jsonl, which is read", "choose another --out"))


# FIFOs: whoever opens one waits for a writer, for ever


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a FIFO; a test that waits for one is stopped."""

    def make(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)
        return path

    def late(*_given: object) -> None:
        raise TimeoutError("waited for a FIFO")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield make
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "folder/a.jsonl"])
@pytest.mark.parametrize("verb", ["run", "build", "score", "eval"])
def test_fifo_for_text(
    verb: str, name: str, fifo, check_refused, store_folder: Path, text_file, tmp_path: Path
) -> None:
    path = fifo(name)
    given = path.parent if "folder" in name else path
    # In a folder what cannot be read is left alone.
    words = ("has no file of a type that can be read",) if "folder" in name else (str(path), "no regular file")
    if verb == "eval":
        check_refused(verb, store_folder, "--eval-text", given, words=words)
    else:
        place = () if verb == "score" else ("--out", tmp_path / "out")
        check_refused(verb, "--model", "any", "--text", given, *place, words=words)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_fifo_in_a_model(name: str, fifo, run_refused, gpt2_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2_folder, tmp_path / "model", ignore=shutil.ignore_patterns(name))
    fifo(f"model/{name}")
    run_refused(f"model/{name} is a FIFO", "no regular file", model=tmp_path / "model")


@pytest.mark.parametrize("option", ["--vectors", "--labels"])
def test_fifo_for_vectors(option: str, fifo, check_refused, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 3), np.float32))
    given = {"--vectors": tmp_path / "a.npy"} | {option: fifo("b.npy")}
    check_refused("score", *(word for pair in given.items() for word in pair), words=("b.npy", "no regular file"))


@pytest.mark.usefixtures("no_model")
def test_fifo_for_questions(fifo, check_refused) -> None:
    check_refused("slices", "--model", "any", "--questions", fifo("a.jsonl"), words=("a.jsonl", "no regular file"))


@pytest.mark.usefixtures("no_model")
def test_fifo_for_output(fifo, check_refused, text_file: Path, tmp_path: Path) -> None:
    given = ("--model", "any", "--text", text_file, "--overwrite", "--out")
    check_refused("build", *given, fifo("out"), words=("out is a file",))
    check_refused("score", *given, fifo("a.json"), words=("a.json is no regular file",))
    (tmp_path / "old").mkdir()
    fifo("old/datastore.json")
    check_refused("build", *given, tmp_path / "old", words=("old is no datastore and is kept",))


def test_folders_and_fifos_beside_the_output_are_let_be(fifo, call, gpt2_folder, text_file, tmp_path: Path) -> None:
    """`.q.knn.partial-7` was the name of a leftover once."""
    (tmp_path / ".q.knn.partial-7").mkdir()
    (tmp_path / ".q.knn.partial-7" / "mine").write_text("mine")
    others = [tmp_path / ".q.knn.partial-7" / "mine", fifo(".q.knn.partial-8"), fifo(".q.knn.old-9")]
    options = ("--model", gpt2_folder, "--text", text_file, "--layers", "-1.ffn_input", "--context", 32)
    assert call("build", *options, "--out", tmp_path / "q.knn").status == 0
    assert all(path.exists() for path in others)


def test_a_file_that_somebody_made_during_the_run_is_kept(call, monkeypatch, gpt2_folder, text_file, tmp_path) -> None:
    scores, tail = tmp_path / "scores.json", tmp_path / "tail.jsonl"

    def somebody(place: Path, verb: str) -> None:
        module = import_module(f"knnlm.cli.{verb}")
        show = "show_scores" if verb == "score" else "_show"
        ours = getattr(module, show)
        monkeypatch.setattr(module, show, lambda *args: (place.write_text("mine"), ours(*args))[1])

    for verb, place, options in (
        ("score", scores, ("--text", text_file, "--out", scores)),
        ("slices", tail, ("--cloze", text_file, "--tail", 2, "--tail-out", tail)),
    ):
        for overwrite in ((), ("--overwrite",)):
            place.unlink(missing_ok=True)
            somebody(place, verb)
            done = call(verb, "--model", gpt2_folder, *options, *overwrite)
            assert done.status == 2, done.errors
            assert place.read_text() == "mine"

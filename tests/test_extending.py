"""The five changes that CONTRIBUTING.md shows, made to a copy of the code and used from its command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from knnlm.text import corpus
from tests.evaluation.test_evaluate_oracle import texts
from tests.source_files import ROOT

Run = Callable[..., str]
KINDS = ("A label-free score", "A text format", "An index kind", "A verb", "A study")
# Must not reach the model.
COMMENT = "% A comment, 30 per cent of nothing."


@cache
def diff(heading: str) -> str:
    """The change under a heading of CONTRIBUTING.md."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^### {heading}\n.*?^```diff\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return found


def files(change: str) -> dict[str, list[list[str]]]:
    """The hunks of a change, by file."""
    parts = re.split(r"^--- \S+\n\+\+\+ b/(\S+)\n", change, flags=re.MULTILINE)[1:]
    return {
        name: [hunk.splitlines() for hunk in re.split(r"^@@.*\n", lines, flags=re.MULTILINE)[1:]]
        for name, lines in zip(parts[::2], parts[1::2], strict=True)
    }


def apply(change: str, tree: Path) -> None:
    """Write the new files; in the others, replace the lines of each hunk, which stand there once."""
    for name, hunks in files(change).items():
        path = tree / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for hunk in hunks:
            old, new = (side(hunk, sign) for sign in "-+")
            assert not text or text.count(old) == 1, f"{name}: stands there {text.count(old)} times:\n{old}"
            text = text.replace(old, new) if text else new
        path.write_text(text, encoding="utf-8")


def side(hunk: list[str], sign: str) -> str:
    """The lines of a hunk before (-) or after (+) the change."""
    return "".join(f"{line[1:]}\n" for line in hunk if line[:1] in (sign, " ", ""))


@pytest.mark.parametrize("kind", KINDS)
def test_change_is_one_line_and_new_files(kind: str) -> None:
    (hunks,) = (hunks for name, hunks in files(diff(kind)).items() if (ROOT / name).exists())
    added = [line for hunk in hunks for line in hunk if line.startswith("+")]
    imports = [line for line in added if re.fullmatch(r"\+(from .* import .*|    \w+,)", line)]
    assert len(added) - len(imports) == 1 and len(imports) <= 1
    assert len(files(diff(kind))) == (3 if kind == "A study" else 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The command line of a copy with all five changes."""
    tree = tmp_path_factory.mktemp("extended")
    for package in ("knnlm", "index"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for kind in KINDS:
        apply(diff(kind), tree)

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "knnlm", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("papers")
    for number, text in enumerate(texts(0, 24)):
        (folder / f"{number:02}.tex").write_text(f"{COMMENT}\n{text}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def store(run: Run, papers: Path, gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main job on the new format, with an index of the new kind."""
    out = tmp_path_factory.mktemp("run") / "papers.knn"
    options = ("--context", 32, "--stride", 16, "--layers", "*.ffn_input,final_norm", "--index", "graph")
    printed = run("run", "--model", gpt2_folder, "--text", papers, "--out", out, *options, "--show", "mean_cosine")
    assert "mean cos." in printed
    return out


def test_new_score_is_the_one_that_the_file_computes(run: Run, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32) + 1
    np.save(tmp_path / "vectors.npy", vectors)
    scores = json.loads(run("score", "--vectors", tmp_path / "vectors.npy", "--json"))
    mean = sum(vectors.astype(float)) / len(vectors)
    cosines = [row @ mean / np.sqrt((row @ row) * (mean @ mean)) for row in vectors.astype(float)]
    assert scores["layers"][0]["mean_cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-6)


def test_new_score_is_in_the_documents_and_the_report(store: Path) -> None:
    document = json.loads((store / "report.json").read_text(encoding="utf-8"))
    assert all(0 < layer["mean_cosine"] < 1 for layer in document["layers"])
    assert "mean_cosine" in {one["score"] for one in document["correlations"]}
    page = (store / "report.html").read_text(encoding="utf-8")
    assert "Mean cosine</" in page and "Mean cosine of a key with their mean" in page


def test_new_format_is_read_and_its_size_known(run: Run, store: Path, papers: Path) -> None:
    part = json.loads(next((store / "parts").glob("*/part.json")).read_text(encoding="utf-8"))
    assert {source.rpartition(".")[2] for source in part["sources"]} == {"tex"}
    found = json.loads(run("lengths", "--text", papers, "--json"))
    # Without the comment, but with the end of its line.
    assert found == {"documents": 24, "median": np.median([len(f"\n{text}\n") for text in texts(0, 24)])}


def test_size_of_a_new_format_is_that_of_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(corpus.READERS, ".toy", lambda path, field: [(1, path.read_text(encoding="utf-8").upper())])
    for name, text in (("a.toy", "one"), ("b.TOY", "three"), ("c.other", "left alone")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert [document.text for document in corpus.read_documents([tmp_path])] == ["ONE", "THREE"]
    assert corpus.text_bytes([tmp_path]) == 8


def test_long_document_of_a_new_format_is_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus, "DOCUMENT_CHARACTERS", 10)
    monkeypatch.setitem(corpus.READERS, ".toy", lambda path, field: [(7, "one two three four")])
    (tmp_path / "a.toy").write_text("x", encoding="utf-8")
    found = [(document.number, document.text) for document in corpus.read_documents([tmp_path / "a.toy"])]
    assert found == [(7, "one two "), (7, "three four")]


def test_new_index_kind_is_built(store: Path) -> None:
    manifest = json.loads((store / "datastore.json").read_text(encoding="utf-8"))
    (index,) = manifest["indexes"].values()
    assert index["spec"] == "HNSW32,Flat"


def test_new_verbs_are_listed_and_run(run: Run, store: Path) -> None:
    listed = run("--help")
    assert "How many keys a datastore has." in listed and "How long the documents of a text are." in listed
    count = json.loads((store / "datastore.json").read_text(encoding="utf-8"))["count"]
    assert run("count", store).strip() == f"{count:,} keys"

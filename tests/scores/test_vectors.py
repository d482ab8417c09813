"""Vectors from elsewhere: the same scores as everywhere, from .npy files."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from knnlm.errors import InputError
from knnlm.scores.vectors import score_vectors
from tests.scores.test_dispersion import pairwise
from tests.source_files import ROOT


def saved(folder, name: str, array) -> str:
    np.save(folder / name, array)
    return str(folder / name)


def normal(*shape: int):
    return np.random.default_rng(0).normal(1, 1, shape)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_are_scored_as_by_definition(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("knnlm.scores.vectors.BLOCK", 70)  # blocks of 14 rows, so that borders count
    vectors = normal(40, 5).astype(dtype)
    (score,) = score_vectors([saved(tmp_path, "a.npy", vectors)]).layers
    assert score.layer == "a"
    assert score.dispersion == pytest.approx(pairwise(vectors.astype(np.float32)), abs=1e-6)
    assert score.interval.low < score.dispersion < score.interval.high
    assert math.isnan(score.dispersion_within)
    assert math.isnan(score.probe)


def test_segments_are_the_second_axis(tmp_path):
    vectors = normal(6, 9, 5)
    (score,) = score_vectors([saved(tmp_path, "a.npy", vectors)]).layers
    within = np.mean([pairwise(segment.astype(np.float32)) for segment in vectors])
    assert score.dispersion_within == pytest.approx(within, abs=1e-6)


def test_labels_are_what_the_probe_compares(tmp_path):
    """Two clouds far apart, sorted by label, as people save images: rows of one's own label count as neighbours."""
    vectors = np.concatenate([normal(50, 4) + 100, normal(50, 4) - 100])
    labels = saved(tmp_path, "labels.npy", np.repeat([7, 8], 50))
    (score,) = score_vectors([saved(tmp_path, "a.npy", vectors)], labels=labels).layers
    assert score.probe == 1
    mixed = saved(tmp_path, "mixed.npy", np.tile([7, 8], 50))
    (score,) = score_vectors([saved(tmp_path, "a.npy", vectors)], labels=mixed).layers
    assert 0.3 < score.probe < 0.7


def test_several_files_in_their_order(tmp_path):
    files = [saved(tmp_path, f"{name}.npy", normal(9, 3)) for name in "ba"]
    assert [score.layer for score in score_vectors(files).layers] == ["b", "a"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(6), r"int64 \[6\]; vectors are floats"),
        (normal(1, 3), r"float64 \[1, 3\]; .* at least 2 rows"),
        (normal(2, 0), r"\[2, 0\]; vectors are floats"),
        (np.array([[1.0, 2], [math.nan, 1], [1, 1]]), "row 1 of a is not finite; leave it out"),
        (np.array([[1.0, 2], [3, 1], [0, 0]]), "row 2 of a is zero"),
    ],
)
def test_what_cannot_be_scored(tmp_path, array, message):
    with pytest.raises(InputError, match=message):
        score_vectors([saved(tmp_path, "a.npy", array)])


@pytest.mark.parametrize("scale", [1e-50, 1e50, 1e-320])
def test_vectors_of_a_size_that_float32_lacks(tmp_path, scale):
    vectors = normal(9, 3)
    vectors[4] *= scale
    largest = np.abs(vectors[4]).max()
    message = f"row 4 of a has {re.escape(f'{largest:.3g}')} for its largest number, .* multiply all vectors by one"
    with pytest.raises(InputError, match=message):
        score_vectors([saved(tmp_path, "a.npy", vectors)])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_unit_of_vectors_changes_no_score(tmp_path, scale):
    labels = saved(tmp_path, "labels.npy", np.arange(40) % 3)
    one, other = (
        score_vectors([saved(tmp_path, "a.npy", normal(40, 5) * unit)], labels=labels).layers[0] for unit in (1, scale)
    )
    for name in ("dispersion", "dispersion_standardized", "effective_rank", "intrinsic_dimension", "probe"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4), name


def test_files_that_are_no_arrays_and_labels_that_do_not_fit(tmp_path):
    vectors = saved(tmp_path, "a.npy", normal(4, 3))
    (tmp_path / "text.npy").write_text("not an array")
    np.savez(tmp_path / "several.npz", a=normal(2, 2))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name, message in (("text.npy", "no .npy file"), ("several.npz", "archive"), ("objects.npy", "no .npy file")):
        with pytest.raises(InputError, match=message):
            score_vectors([tmp_path / name])
    with pytest.raises(InputError, match="4 rows, but there are 3 labels"):
        score_vectors([vectors], labels=saved(tmp_path, "l.npy", np.arange(3)))
    with pytest.raises(InputError, match=r"float64 \[3\]; labels are integers"):
        score_vectors([vectors], labels=saved(tmp_path, "l.npy", np.ones(3)))
    with pytest.raises(InputError, match="two files alike"):
        score_vectors([vectors, vectors])


# The command line


def test_score_of_vectors_is_a_table_and_json(call, tmp_path):
    files = [saved(tmp_path, f"{name}.npy", normal(40, 5)) for name in "ab"]
    labels = saved(tmp_path, "labels.npy", np.arange(40) % 3)
    arguments = ("score", "--vectors", *files, "--labels", labels, "--seed", 4)
    expected = score_vectors(files, labels=labels, seed=4)
    table, document = call(*arguments), json.loads(call(*arguments, "--json", "--out", tmp_path / "out.json").out)
    assert (table.status, table.errors) == (0, ())
    for score, row in zip(expected.layers, document["layers"], strict=True):
        assert re.search(rf" {score.layer} .* {score.dispersion:.4f} .* {score.probe:.3f} ", table.out)
        assert (row["layer"], row["intrinsic_dimension"]) == (score.layer, score.intrinsic_dimension)
    assert (document["kind"], document["rows"], document["vectors"]) == ("vectors", 80, 80)
    assert document == json.loads((tmp_path / "out.json").read_text())


def test_score_of_vectors_loads_no_language_model(tmp_path):
    code = f"""
import sys
from knnlm.cli import main
sys.argv = ["knnlm", "score", "--vectors", {saved(tmp_path, "a.npy", normal(20, 5))!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code
print(*({{"transformers", "datasets", "faiss"}} & set(sys.modules)), "loaded")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--vectors", "a.npy", "--model", "m", "--text", "t", "--stop-early"),
            "leave out --model, --text, --stop",
        ),
        (("--model", "m"), "needs --model and --text, or --vectors alone"),
        ((), "needs --model and --text, or --vectors alone"),
        (("--model", "m", "--text", "t", "--labels", "l.npy"), "--labels l.npy are of --vectors, which are missing"),
        (("--vectors", "a.npy", "--show", "rank"), "--show 'rank' is no score; there are all, dispersion, within,"),
        (("--vectors", "a.npy"), "there is no file a.npy; give a .npy file"),
    ],
)
def test_score_refuses_what_does_not_go_together(call, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    done = call("score", *arguments)
    assert (done.status, done.out, len(done.errors)) == (2, "", 1)
    assert words in done.errors[0]

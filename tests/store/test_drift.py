"""How far later keys are from those of the frame, against float64 over the vectors themselves."""

from __future__ import annotations

import os

import numpy as np
import pytest

from knnlm.store import drift
from knnlm.store.changes import compact, merge, remove
from knnlm.store.datastore import Datastore
from tests.store.test_changes import LAYERS, add, build


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def document(source, number, rows, *, mean=0.0, scale=1.0):
    """A document of vectors around `mean`, none of which is like another document's."""
    rng = np.random.default_rng((number, rows, len(source)))
    vectors = {
        layer: (mean + scale * rng.normal(size=(rows, dim)) * np.arange(1, dim + 1)).astype(np.float32)
        for layer, dim in LAYERS.items()
    }
    return source, number, rng.integers(0, 50, rows + 1).astype(np.int32), vectors


FIRST = [document("a.txt", number, 30 + number, mean=5.0) for number in (1, 2, 3)]
LATER = [document("b.txt", number, 20 + number, mean=7.0, scale=1.5) for number in (1, 2)]


def figures(first, later, layer):
    """Shift and spread from their definition (docs/usage.md)."""
    built, came = (np.concatenate([one[3][layer] for one in part]).astype(np.float64) for part in (first, later))
    unit = np.mean(np.linalg.norm(built - built.mean(0), axis=1) ** 2)
    shift = np.linalg.norm(came.mean(0) - built.mean(0)) / np.sqrt(unit)
    return len(came), shift, np.mean(np.linalg.norm(came - built.mean(0), axis=1) ** 2) / unit


def check(store, first, later):
    told = Datastore.open(store.folder).describe()
    for layer in LAYERS:
        found = told["drift"][layer]
        assert (found["keys"], found["shift"], found["spread"]) == pytest.approx(figures(first, later, layer), rel=1e-5)
    (line,) = [line for line in told["stale"] if line.startswith("Drift")]
    furthest = max(LAYERS, key=lambda layer: told["drift"][layer]["shift"])
    assert f" of {furthest}: shift {told['drift'][furthest]['shift']:.2f}, spread" in line and "`knnlm.build`" in line


def test_figures_are_those_of_the_definition_whatever_the_history(tmp_path):
    store = build(tmp_path / "store", FIRST, part_rows=40)
    assert set(store.describe()["drift"].values()) == {None}
    store = add(store, LATER, part_rows=15)
    check(store, FIRST, LATER)
    assert figures(FIRST, LATER, "final_norm")[1] > 0.5
    store = compact(store, part_rows=1000)  # the border is inside of a part
    check(store, FIRST, LATER)
    store = remove(store, [("a.txt", 2)])
    check(store, [FIRST[0], FIRST[2]], LATER)
    more = [document("c.txt", 1, 12, mean=5.0)]
    store = add(store, more)
    check(store, [FIRST[0], FIRST[2]], [*LATER, *more])
    store = remove(store, [("b.txt", 1), ("a.txt", 1)], purge=True)
    check(store, FIRST[2:], [LATER[1], *more])
    other = build(tmp_path / "other", LATER[:1], frame=store)
    (tmp_path / "merged").mkdir()
    check(merge([store, other], tmp_path / "merged"), FIRST[2:], [LATER[1], *more, LATER[0]])
    left = remove(store, ["a.txt"]).describe()
    assert set(left["drift"].values()) == {None} and left["stale"][0].startswith("No key is left")


def test_the_same_text_again_has_no_drift(tmp_path):
    store = add(build(tmp_path / "store", FIRST), FIRST)
    assert store.describe()["drift"]["final_norm"] == {
        "keys": sum(len(one[2]) - 1 for one in FIRST),
        "shift": pytest.approx(0, abs=1e-6),
        "spread": pytest.approx(1, abs=1e-6),
    }


def test_some_rows_are_enough(tmp_path, monkeypatch):
    first = [document("a.txt", number, 400) for number in (1, 2, 3)]
    later = [document("b.txt", number, 400, mean=2.0) for number in (1, 2)]
    store = add(build(tmp_path / "store", first), later)
    monkeypatch.setattr(drift, "MOST_ROWS", 300)
    found = store.describe()["drift"]["final_norm"]
    keys, shift, spread = figures(first, later, "final_norm")
    assert found["keys"] == keys == 800
    assert found["shift"] == pytest.approx(shift, abs=0.2) and found["spread"] == pytest.approx(spread, rel=0.2)
    assert found["shift"] != shift

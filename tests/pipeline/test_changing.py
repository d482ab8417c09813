"""Documents added, removed, merged with a model and an index: figures are those of a fresh build."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.errors import DatastoreError, DatastoreMismatch, InputError
from knnlm.extraction import collect as collecting
from knnlm.knn import renewing
from knnlm.knn.indexing import verify_store
from knnlm.locks import locked
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import add, build, changing, compact, evaluate, merge, remove
from knnlm.progress import Silent
from knnlm.store import writer as store_writer
from knnlm.store.datastore import Datastore
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import tiny_model, tiny_tokenizer

SETTINGS = Settings(
    text=TextConfig(context=32, stride=16),
    layers=LayerConfig(layers="1.ffn_input,2.ffn_input", select="2.ffn_input"),
    knn=KNNConfig(index="IVF4,Flat", max_k=16),
    key_dtype="float32",
)
EXACT = Settings(evaluation=EvalConfig(eval_tokens=200, examples=1), knn=KNNConfig(index="exact", max_k=16))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="tiny")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(store_writer, "PART_ROWS", 600)


@pytest.fixture
def text(tmp_path):
    """Files of documents, by their first and their number."""
    (tmp_path / "text").mkdir()
    return lambda first, count: write_jsonl(tmp_path / "text" / f"{first}.jsonl", texts(first, count))


def perplexities(lm, store, text):
    return [one.perplexity for one in evaluate(lm, store, [text], settings=EXACT).layers]


def test_any_history_has_the_perplexity_of_a_fresh_build(lm, text, tmp_path):
    held_out = text(80, 4)
    store = build(lm, [text(0, 8)], tmp_path / "store", settings=SETTINGS, eval_text=[held_out])
    store = add(lm, store, [text(20, 8)])
    store = remove(store, [("0.jsonl", 3), ("20.jsonl", 1)])
    store = compact(store)
    other = build(lm, [text(40, 4)], tmp_path / "other", settings=SETTINGS, frame=store, eval_text=[held_out])
    merged = merge([store, other], tmp_path / "merged")
    left = [*texts(0, 8)[:2], *texts(0, 8)[3:], *texts(20, 8)[1:], *texts(40, 4)]
    fresh = build(
        lm,
        [write_jsonl(tmp_path / "left.jsonl", left)],
        tmp_path / "fresh",
        settings=SETTINGS,
        frame=store,
        eval_text=[held_out],
    )
    assert np.array_equal(merged.values, fresh.values) and merged.verify() == ()
    assert perplexities(lm, merged, held_out) == pytest.approx(perplexities(lm, fresh, held_out), rel=1e-6)
    for one in (store, merged):
        (entry,) = one.manifest.indexes.values()
        assert entry["recall"] > 0.9 and one.describe()["stale"]


def test_purged_text_is_nowhere(lm, text, tmp_path):
    store = build(lm, [text(0, 8), text(20, 8)], tmp_path / "store", settings=SETTINGS)
    row = int(store.documents[3, 0])
    size = int(store.documents[4, 0]) - row
    tokens = store.values[row : row + size].tobytes()
    keys = [store.keys(layer).read(row, row + size) for layer in store.layers]
    (store.folder / "report.json").write_text('{"format": "knnlm-report"}')

    def found(needle):
        return [path.name for path in store.folder.rglob("*") if path.is_file() and needle in path.read_bytes()]

    assert found(tokens) and all(found(one[5].tobytes()) for one in keys)
    hidden = remove(store, [("0.jsonl", 4)])
    assert hidden.count == store.count - size and found(tokens)
    gone = remove(hidden, ["20.jsonl"], purge=True)
    assert found(tokens) == [] and found(b"20.jsonl") == []
    assert not (store.folder / "report.json").exists()
    # The same tokens before a key give the same key: the first ones may be another document's too.
    others = {row.tobytes() for layer in gone.layers for row in gone.keys(layer).read(0, gone.count)}
    own = [row.tobytes() for one in keys for row in one if row.tobytes() not in others]
    assert len(own) > size and not any(map(found, own))
    assert gone.verify() == () and set(gone.manifest.indexes) == {"2.ffn_input"} and len(gone.documents) == 7


def test_a_killed_add_goes_on_and_nobody_sees_half_of_it(lm, text, tmp_path, monkeypatch):
    before = build(lm, [text(0, 8)], tmp_path / "store", settings=SETTINGS)
    more, passes, forward = text(20, 16), [], collecting.forward

    def counted(*given, **named):
        passes.append(1)
        if len(passes) == stop:
            raise Killed
        return forward(*given, **named)

    monkeypatch.setattr(collecting, "forward", counted)
    stop = 0
    same = build(lm, [text(0, 8)], tmp_path / "other", settings=SETTINGS)
    passes.clear()
    expected = add(lm, same, [more])
    all_passes = stop = len(passes)
    passes.clear()
    with pytest.raises(Killed):
        add(lm, before, [more])
    now = Datastore.open(before.folder)
    assert now.manifest == before.manifest and now.verify() == ()
    stop = 0
    passes.clear()
    done = add(lm, now, [more])
    assert 0 < len(passes) < all_passes
    assert [part.name for part in done.manifest.parts] == [part.name for part in expected.manifest.parts]
    assert not (done.folder / "unfinished.json").exists() and np.array_equal(done.values, expected.values)


class Killed(BaseException):
    """Nothing is done after it."""


def killed(*given):
    raise Killed


CHANGES = {
    "add": lambda lm, store, more: add(lm, store, [more]),
    # So few that the index keeps the keys of what is removed.
    "remove": lambda lm, store, more: remove(store, [("0.jsonl", 2)]),
    "purge": lambda lm, store, more: remove(store, [("0.jsonl", 2), ("0.jsonl", 5)], purge=True),
    "compact": lambda lm, store, more: compact(store),
}


def contents(folder):
    """All files; of an index's manifest, which tells how long a search took, the name only."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.name == "index.json" or path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_killed_before_its_indexes_ends_as_if_it_had_not_been(name, lm, text, tmp_path, monkeypatch):
    more, place = text(20, 8), tmp_path / "killed"
    before = build(lm, [text(0, 8)], tmp_path / "store", settings=SETTINGS)
    (before.folder / "report.json").write_text('{"format": "knnlm-report"}')
    shutil.copytree(before.folder, place)
    expected = CHANGES[name](lm, before, more)
    with monkeypatch.context() as patch:
        patch.setattr(changing, "renew_indexes", killed)
        with pytest.raises(Killed):
            CHANGES[name](lm, place, more)
    now = Datastore.open(place)
    assert now.verify() == () and now.count == expected.count and now.describe()["stale"]
    assert (place / "report.json").exists() == (name != "purge")
    assert verify_store(place, Silent()) == ()
    shown = evaluate(lm, now, [more], settings=replace(EXACT, knn=KNNConfig(max_k=16)), dry_run=True)
    assert len(shown.layers) == 2
    for _ in range(2):  # and once more, when all is done
        if name in ("remove", "purge"):
            with pytest.raises(InputError, match=r"has no document 2 of 0\.jsonl"):
                CHANGES[name](lm, place, more)
        else:
            CHANGES[name](lm, place, more)
        assert contents(place) == contents(expected.folder)


def test_documents_that_are_there_already_are_not_added_again(lm, text, tmp_path):
    store, notes = build(lm, [text(0, 8)], tmp_path / "store", settings=SETTINGS), []
    more = text(20, 8)
    progress = Silent()
    progress.note = notes.append
    once = add(lm, store, [more], progress=progress)
    assert once.count > store.count and not [one for one in notes if "nothing was added" in one]
    again = add(lm, once, [more], progress=progress)
    assert again.manifest == once.manifest and notes[-1] == (
        f"nothing was added: {store.folder} has all these documents already"
    )
    # Documents that were removed since are added again.
    fewer = remove(again, [("20.jsonl", 3)])
    assert add(lm, fewer, [more]).count == fewer.count + once.count - store.count


def test_what_cannot_be_is_one_line(lm, text, tmp_path):
    store = build(lm, [text(0, 8)], tmp_path / "store", settings=SETTINGS)
    other = build(lm, [text(20, 8)], tmp_path / "other", settings=SETTINGS)
    with pytest.raises(DatastoreMismatch, match="differ in layers, centres or scales"):
        merge([store, other], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    for name in ("nowhere.txt", ("0.jsonl", 99)):
        with pytest.raises(InputError, match=r"has no (source nowhere|document 99 of 0)"):
            remove(store, [("0.jsonl", 1), name])
    with pytest.raises(InputError, match="nothing would be left"):
        remove(store, ["0.jsonl"])
    with pytest.raises(InputError, match="`context` and `stride` are those of the datastore"):
        add(lm, store, [text(40, 4)], settings=replace(SETTINGS, text=TextConfig(context=16, stride=8)))
    with locked(store.folder), pytest.raises(DatastoreError, match="is being changed by another process"):
        remove(store, [("0.jsonl", 1)])
    assert Datastore.open(store.folder).manifest == store.manifest


def test_a_name_that_never_was_measures_no_recall(lm, text, tmp_path, monkeypatch):
    store = remove(build(lm, [text(0, 8)], tmp_path / "store", settings=SETTINGS), [("0.jsonl", 2)])
    measured, measure = [], renewing.measure_recall
    monkeypatch.setattr(
        renewing, "measure_recall", lambda *given, **more: (measured.append(1), measure(*given, **more))[1]
    )
    for name in ("nowhere.txt", ("0.jsonl", 99)):
        with pytest.raises(InputError, match="has no"):
            remove(store, iter([name]))
    assert not measured
    with pytest.raises(InputError, match=r"has no document 2 of 0\.jsonl"):
        remove(store, iter([("0.jsonl", 2)]))  # its removal may have been killed before the indexes
    assert measured == [1]


def test_a_reader_keeps_its_generation(lm, text, tmp_path):
    store = build(lm, [text(0, 8)], tmp_path / "store", settings=SETTINGS)
    keys = store.keys("2.ffn_input").read(0, store.count)
    remove(store, [("0.jsonl", 2)], purge=True)
    compact(store)
    assert np.array_equal(store.keys("2.ffn_input").read(0, store.count), keys) and store.verify() == ()
    assert Path(store.folder).exists()

"""A build that is killed goes on by the same call: nothing finished is computed again, and the bytes are the same."""

from __future__ import annotations

import os
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.errors import DatastoreError, DatastoreExists
from knnlm.extraction import collect as collecting
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import build, run, steps
from knnlm.progress import Silent
from knnlm.store import writer as store_writer
from knnlm.store.datastore import Datastore
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXT = TextConfig(context=32, stride=16)
NAMED = Settings(text=TEXT, layers=LayerConfig(layers="1.ffn_input,final_norm", select="final_norm"))
CHOSEN = Settings(text=TEXT, knn=KNNConfig(index="IVF4,Flat"))
RUN = replace(NAMED, knn=KNNConfig(max_k=16), evaluation=EvalConfig(eval_tokens=200, examples=2))
PART_ROWS = 400
# These tell how long it took.
TIMED = ("report.json", "report.html", "index.json")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.from_model(tiny_model("gpt2"), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of all lengths; one fills several parts."""
    long = " ".join(texts(40, 8))
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "text.jsonl", [*texts(0, 12), long, *texts(20, 12)])


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "PART_ROWS", PART_ROWS)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


VERBS = {
    "build": lambda lm, corpus, out, **more: build(lm, [corpus], out, settings=NAMED, **more),
    "build, by a sample": lambda lm, corpus, out, **more: build(lm, [corpus], out, settings=CHOSEN, **more),
    "run": lambda lm, corpus, out, **more: run(lm, [corpus], out, settings=RUN, **more),
}


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in TIMED]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


class Snapshots:
    """The folder as a kill would leave it, at every moment at which something is made durable."""

    def __init__(self, place: Path, kept: Path) -> None:
        self.place, self.kept, self.moments, self.lock = place, kept, [], threading.Lock()

    def __call__(self, handle: int) -> None:
        with self.lock:  # several threads sync files
            self.keep()

    def keep(self) -> None:
        moment = self.kept / f"{len(self.moments):04d}"
        shutil.copytree(self.place, moment, symlinks=True)
        now = contents(moment)
        if self.moments and contents(self.moments[-1]) == now:
            shutil.rmtree(moment)
        else:
            self.moments.append(moment)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch):
    """Counts tokens that go through the model for keys, and passes that score layers."""
    seen = {"tokens": 0, "samples": 0}
    forward, scores = collecting.forward, steps.score_layers

    def count(lm, batch, *rest, **more):
        seen["tokens"] += sum(len(window.targets) - window.first for window in batch.windows)
        return forward(lm, batch, *rest, **more)

    def sample(*given, **more):
        seen["samples"] += 1
        return scores(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(collecting, "forward", count)
        patch.setattr(steps, "score_layers", sample)
        yield seen


@pytest.mark.parametrize("name", VERBS)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(name, lm, corpus, tmp_path, monkeypatch):
    place, kept = tmp_path / "place", tmp_path / "kept"
    place.mkdir()
    kept.mkdir()
    snapshots = Snapshots(place, kept)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", snapshots)
        VERBS[name](lm, corpus, place / "store")
    expected = contents(place)
    assert Datastore.open(place / "store").verify() == ()
    parts = len(Datastore.open(place / "store").manifest.parts)
    assert parts > 4 and len(snapshots.moments) > 6 * parts
    rng = np.random.default_rng(0)
    chosen = {len(snapshots.moments) - 2, *rng.choice(len(snapshots.moments) - 1, 4, replace=False).tolist()}
    for number in sorted(chosen):
        moment = snapshots.moments[number]
        if (moment / "store").exists() and not (moment / "store" / "unfinished.json").exists():
            continue  # it is complete
        done = len(list((moment / ".store.partial" / "parts").glob("0*")))
        with counted(monkeypatch) as seen:
            VERBS[name](lm, corpus, moment / "store")
        assert contents(moment) == expected, number
        total = Datastore.open(place / "store").count
        if name != "run":  # which then evaluates
            # A document that fills a part may make it nearly twice as large, and the last part may be the one lost.
            assert seen["tokens"] <= max(total - (done - 1) * PART_ROWS, 0) + 2 * PART_ROWS * seen["samples"], number
        begun = (moment / "again").exists() or done
        assert not (begun and seen["samples"]), number


@pytest.mark.parametrize("name", ["build", "run"])
def test_parts_change_nothing_but_rounding(name, lm, corpus, tmp_path, monkeypatch):
    VERBS[name](lm, corpus, tmp_path / "many")
    monkeypatch.setattr(store_writer, "PART_ROWS", 1 << 20)
    VERBS[name](lm, corpus, tmp_path / "one")
    many, one = Datastore.open(tmp_path / "many"), Datastore.open(tmp_path / "one")
    assert len(one.manifest.parts) == 1 < len(many.manifest.parts)
    assert np.array_equal(many.values, one.values) and np.array_equal(many.documents, one.documents)
    assert many.manifest.corpus == one.manifest.corpus and many.sources == one.sources
    for layer in one.layers:
        ours, theirs = many.keys(layer), one.keys(layer)
        difference = ours.read(0, many.count) + ours.centre - theirs.read(0, one.count) - theirs.centre
        assert np.abs(difference).max() < 4e-3  # float16, and batches of other shapes


class Stop(Silent):
    """Ctrl-C in the middle of a stage."""

    def __init__(self, name: str, done: int) -> None:
        self.name, self.least = name, done

    @contextmanager
    def stage(self, name, unit):
        def advance(done, total):
            if name == self.name and done >= self.least:
                raise KeyboardInterrupt

        yield advance


@pytest.mark.parametrize("name", ["build", "run"])
def test_ctrl_c_keeps_finished_parts(name, lm, corpus, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt) as caught:
        VERBS[name](lm, corpus, tmp_path / "a" / "store", progress=Stop("extracting keys", 2500))
    assert caught.value.__notes__ == ["what is finished is kept: the same command goes on with it"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".store.partial"]
    VERBS[name](lm, corpus, tmp_path / "a" / "store")
    VERBS[name](lm, corpus, tmp_path / "b" / "store")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_ctrl_c_before_the_first_part_leaves_nothing(lm, corpus, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        VERBS["build"](lm, corpus, tmp_path / "store", progress=Stop("extracting keys", 1))
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_has_changed_is_refused_and_overwrite_begins_anew(lm, corpus, tmp_path):
    text = Path(shutil.copy(corpus, tmp_path / "text.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        VERBS["build"](lm, text, tmp_path / "out", progress=Stop("extracting keys", 2500))
    text.write_text(text.read_text().replace("a", "b", 1))
    with pytest.raises(DatastoreError, match=r"changed since part 00000-.* begin anew with `overwrite=True`"):
        VERBS["build"](lm, text, tmp_path / "out")
    store = VERBS["build"](lm, text, tmp_path / "out", overwrite=True)
    assert store.verify() == () and not list(tmp_path.glob(".*"))
    with pytest.raises(DatastoreExists):
        VERBS["build"](lm, text, tmp_path / "out")


def test_progress_counts_what_is_there(lm, corpus, tmp_path):
    told = []

    class Tell(Silent):
        @contextmanager
        def stage(self, name, unit):
            yield lambda done, total: told.append(done) if name == "extracting keys" else None

    with pytest.raises(KeyboardInterrupt):
        VERBS["build"](lm, corpus, tmp_path / "out", progress=Stop("extracting keys", 2500))
    store = VERBS["build"](lm, corpus, tmp_path / "out", progress=Tell())
    assert told == sorted(told) and told[-1] == store.count

"""Documents that come and go: whatever the history, a datastore is that of the same documents."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from index.exact import ExactIndex
from knnlm.errors import InputError
from knnlm.places import is_ours
from knnlm.store import changeable
from knnlm.store.appender import DatastoreAppender
from knnlm.store.changes import compact, merge, remove
from knnlm.store.datastore import Datastore
from knnlm.store.writer import DatastoreWriter

FRAME = {"fingerprint": {"config": "a", "weights": "b", "tokenizer": "c"}, "context": 8, "stride": 4}
LAYERS = {"0.ffn_input": 3, "final_norm": 2}
SOURCES = ("a.txt", "b.txt")


def document(source, number, tokens, seed):
    """First token, name, values, and a vector of each layer for each value."""
    rng = np.random.default_rng(seed)
    vectors = {layer: rng.normal(size=(len(tokens) - 1, dim)).astype(np.float32) for layer, dim in LAYERS.items()}
    return source, number, np.array(tokens, np.int32), vectors


def write(writer, documents, chunk=3):
    for source, number, tokens, vectors in documents:
        writer.begin_document(tokens[0], source, number)
        for start in range(0, len(tokens) - 1, chunk):
            writer.append_values(tokens[1:][start : start + chunk])
            for layer, rows in vectors.items():
                writer.append_keys(layer, rows[start : start + chunk])


def build(folder, documents, *, frame=None, part_rows=4):
    folder.mkdir()
    with DatastoreWriter(folder, LAYERS, key_dtype="float32", part_rows=part_rows, frame=frame, **FRAME) as writer:
        write(writer, documents)
        writer.finish()
    return Datastore.open(folder)


def add(store, documents, part_rows=4):
    with store.writing() as newest, DatastoreAppender(newest, part_rows=part_rows) as writer:
        write(writer, documents)
        writer.commit()
    return Datastore.open(store.folder)


def check_same(store, fresh):
    """Everything that a reader can ask for."""
    assert store.count == fresh.count and np.array_equal(store.values, fresh.values)
    assert store.documents.tolist() == fresh.documents.tolist() and store.sources == fresh.sources
    rows = range(store.count)
    assert [store.document_of(row) for row in rows] == [fresh.document_of(row) for row in rows]
    for row in rows:
        assert store.context(row, 9).tolist() == fresh.context(row, 9).tolist()
        assert store.continuation(row, 9).tolist() == fresh.continuation(row, 9).tolist()
    queries = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)
    for metric in ("l2", "cosine", "ip"):
        ours, theirs = (one.keys("final_norm").for_metric(metric) for one in (store, fresh))
        assert np.array_equal(ours.read(0, store.count), theirs.read(0, store.count))
        ids = np.random.default_rng(2).integers(0, store.count, 20)
        assert np.array_equal(ours.take(ids), theirs.read(0, store.count)[ids])
        prepared = ours.prepare_queries(queries)
        one, other = ExactIndex(ours, "l2").search(prepared, 4), ExactIndex(theirs, "l2").search(prepared, 4)
        assert np.array_equal(one.ids_QK, other.ids_QK) and np.array_equal(one.distances_QK, other.distances_QK)


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


class Killed(BaseException):
    """Stands for SIGKILL: nothing is done after it."""


DRAWN = st.lists(
    st.tuples(st.sampled_from(SOURCES), st.integers(1, 3), st.integers(2, 11), st.integers(0, 9)),
    min_size=1,
    max_size=4,
)


NAMED = st.one_of(st.sampled_from(SOURCES), st.tuples(st.sampled_from(SOURCES), st.integers(1, 3)))


def documents_of(drawn):
    return [
        document(source, number, np.random.default_rng(seed).integers(0, 50, length), seed)
        for source, number, length, seed in drawn
    ]


class Histories(RuleBasedStateMachine):
    """A datastore, and the lists of its documents, and of those that are removed but still in its files, in memory."""

    def __init__(self):
        super().__init__()
        self.place = Path(os.path.realpath(os.environ["KNNLM_TEST_PLACE"])) / str(id(self))
        self.place.mkdir()
        self.number = 0

    def teardown(self):
        shutil.rmtree(self.place)

    @initialize(drawn=DRAWN)
    def begin(self, drawn):
        self.documents, self.hidden = documents_of(drawn), []
        self.first = list(self.documents)
        self.store = build(self.place / "store", self.documents)
        self.frame = build(self.place / "frame", self.documents)

    def fresh(self, documents, part_rows=100):
        self.number += 1
        return build(self.place / f"fresh-{self.number}", documents, frame=self.frame, part_rows=part_rows)

    @rule(drawn=DRAWN, part_rows=st.integers(1, 9))
    def add(self, drawn, part_rows):
        more = documents_of(drawn)
        self.store = add(self.store, more, part_rows)
        self.documents += more

    def without(self, name):
        return [one for one in self.documents if name not in (one[0], one[:2])]

    @rule(
        name=st.one_of(st.sampled_from(SOURCES), st.tuples(st.sampled_from(SOURCES), st.integers(1, 3))),
        purge=st.booleans(),
    )
    def remove(self, name, purge):
        left = self.without(name)
        gone = [one[:2] for one in self.documents if name in (one[0], one[:2])]
        known = gone or (purge and any(name in (source, (source, number)) for source, number in self.hidden))
        if not known or not left:
            with pytest.raises(InputError):
                remove(self.store, [name], purge=purge)
        else:
            self.store = remove(self.store, [name], purge=purge)
            self.documents, self.hidden = left, [] if purge else self.hidden + gone

    @rule(part_rows=st.sampled_from([1, 5, 20]))
    def compact(self, part_rows):
        self.store, self.hidden = compact(self.store, part_rows=part_rows), []
        assert not any(part.removed for part in self.store.manifest.parts)

    @rule(drawn=DRAWN)
    def merge(self, drawn):
        more = documents_of(drawn)
        other, into = self.fresh(more, part_rows=4), self.place / f"merged-{self.number}"
        into.mkdir()
        self.store = merge([self.store, other], into)
        self.documents += more

    @rule()
    def reopen(self):
        self.store = Datastore.open(self.store.folder)

    @rule(drawn=DRAWN, what=st.sampled_from(["add", "remove", "purge", "compact"]))
    def kill_between_write_and_rename(self, drawn, what):
        def kill(*_):
            raise Killed

        names = [one[:2] for one in self.documents]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(changeable, "write_json", kill)
            try:
                if what == "add":
                    add(self.store, documents_of(drawn))
                elif what == "compact":
                    compact(self.store, part_rows=20)
                else:
                    remove(self.store, names[:1], purge=what == "purge")
            except (Killed, InputError):
                pass
        assert is_ours(self.store.folder)

    @invariant()
    def is_the_datastore_of_its_documents(self):
        if not hasattr(self, "store"):
            return
        fresh = self.fresh(self.documents)
        check_same(Datastore.open(self.store.folder), fresh)
        shutil.rmtree(fresh.folder)
        left = [tokens for _, _, tokens, vectors in self.documents if any(vectors is one[3] for one in self.first)]
        assert self.store.manifest.built_keys == sum(len(tokens) - 1 for tokens in left)


@pytest.fixture
def _place(tmp_path, monkeypatch):
    monkeypatch.setenv("KNNLM_TEST_PLACE", str(tmp_path))


TestHistories = pytest.mark.usefixtures("_place")(Histories.TestCase)
TestHistories.settings = settings(max_examples=8, stateful_step_count=8, deadline=None, phases=[Phase.generate])

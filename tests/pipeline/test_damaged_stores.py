"""A store that is damaged or replaced never gives another perplexity in silence."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from index.errors import VectorIndexError
from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.errors import DatastoreCorrupt, KNNLMError
from knnlm.inference.model import KNNLM
from knnlm.knn.indexing import check_before_use, verify_store
from knnlm.model.loading import load_model
from knnlm.pipeline import evaluate, run
from knnlm.progress import Silent
from knnlm.store.datastore import Datastore
from tests.damage import damaged_documents, files_of, flip_bit, rewrite
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl

LAYERS = ("1.ffn_input", "2.ffn_input")
SETTINGS = Settings(
    text=TextConfig(context=32, stride=16),
    layers=LayerConfig(layers=",".join(LAYERS), select="2.ffn_input"),
    knn=KNNConfig(index="IVF8,Flat", max_k=32),
)
EVALUATION = Settings(evaluation=EvalConfig(eval_tokens=200, examples=2), knn=KNNConfig(max_k=32))


@pytest.fixture(scope="module")
def lm(gpt2_folder):
    return load_model(gpt2_folder)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("held-out") / "text.jsonl", texts(50, 3))


@pytest.fixture(scope="module")
def whole(lm, held_out, tmp_path_factory):
    """As `run` leaves it: keys of two layers, the index of one, what was fitted."""
    folder = tmp_path_factory.mktemp("damaged")
    text = write_jsonl(folder / "text.jsonl", texts(0, 6))
    run(lm, [text], folder / "store", eval_text=[held_out], settings=SETTINGS)
    return folder / "store"


@pytest.fixture
def store(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "store"))


@pytest.fixture
def outcome(lm, held_out):
    """What an evaluation of a folder, or of an opened store, shows."""

    def evaluated(store, progress=None):
        store = store if isinstance(store, Datastore) else Datastore.open(store)
        found = evaluate(lm, store, [held_out], settings=EVALUATION, progress=progress)
        return [(one.layer, one.perplexity, one.k) for one in found.layers], found.helped, found.hurt

    return evaluated


def problems_of(store):
    try:
        return verify_store(store, Silent())
    except KNNLMError as error:
        return (str(error),)


def test_no_flipped_bit_changes_a_perplexity_unseen(store, outcome):
    """Refused in one line, found by verify, or without effect; three of each file, in its header and anywhere."""
    expected, rng, files, refused = outcome(store), random.Random(0), files_of(store), 0
    for path in files * 3:
        data = path.read_bytes()
        flip_bit(path, rng, within=rng.choice((160, None)))
        found = problems_of(store)
        assert all(problem.isprintable() for problem in found)
        try:
            assert outcome(store) == expected or found, path
        except (KNNLMError, VectorIndexError) as error:
            assert str(error).isprintable() and found, path
            refused += 1
        path.write_bytes(data)
    assert refused >= 3 * (len(files) - 2)  # all but the keys of two layers
    assert not problems_of(store)


def test_what_verify_calls_whole_can_be_used(store, outcome):
    """Of wrong values in datastore.json and index.json, with right checksums."""
    rng, usable = random.Random(1), 0
    for path in (store / "datastore.json", store / "index" / "2.ffn_input" / "index.json"):
        data = path.read_text()
        for text in damaged_documents(json.loads(data), rng, 60):
            path.write_text(text)
            found = problems_of(store)
            try:
                json.dumps(Datastore.open(store).describe())
                outcome(store)
                usable += not found
            except (KNNLMError, VectorIndexError) as error:
                # Another model than the store's is no damage.
                assert found or "was made with another model" in str(error), error
        path.write_text(data)
    assert usable


def test_an_index_of_which_the_store_does_not_tell_is_refused(store):
    rewrite(store / "datastore.json", lambda one: one["indexes"]["2.ffn_input"].update(spec="IVF9,Flat"))
    (problem,) = problems_of(store)
    assert "its spec is IVF8,Flat, but IVF9,Flat is wanted" in problem


def test_a_damaged_index_is_an_error_of_the_datastore(store, lm):
    """All errors of `KNNLM` are KNNLMError: also what the explorer catches when it opens another layer."""
    for name in ("index.faiss", "lists.bin", "index.json", "centre.npy"):
        path = store / "index" / "2.ffn_input" / name
        data = path.read_bytes()
        flip_bit(path, random.Random(0))
        with pytest.raises(DatastoreCorrupt, match=name):
            KNNLM.from_store(store, "2.ffn_input", lm=lm)
        path.write_bytes(data)


def numbers_in(store, name, place, number):
    """Put a number into an array of the only part, with right checksums everywhere."""
    (path,) = store.glob(f"parts/*/{name}")
    array, data = np.load(path), path.read_bytes()
    header, flat = data[: len(data) - array.nbytes], array.reshape(-1).copy()
    flat[place] = number
    path.write_bytes(header + flat.tobytes())
    old, new = (hashlib.sha256(one.tobytes()).hexdigest() for one in (array, flat))
    part = path.parent / "part.json"
    before = json.loads(part.read_text())["checksum"]
    rewrite(part, lambda one: one.update(json.loads(json.dumps(one).replace(old, new))))
    after = json.loads(part.read_text())["checksum"]
    rewrite(store / "datastore.json", lambda one: one.update(json.loads(json.dumps(one).replace(before, after))))


@pytest.mark.parametrize(
    ("name", "place", "number", "message"),
    [
        ("documents.npy", 2, 99, "documents.npy does not fit the values"),
        ("documents.npy", 2, -1, "documents.npy does not fit the values"),
        ("documents.npy", 1, -7, "its documents hold -7, which is no token"),
        ("values.npy", slice(None), -3, "its values hold -3, which is no token"),
        ("values.npy", slice(None), 10**9, "its values hold 1000000000, which is no token of the model's 288"),
    ],
)
def test_numbers_that_cannot_be_have_right_checksums(name, place, number, message, store, lm, outcome):
    numbers_in(store, name, place, number)
    with pytest.raises(DatastoreCorrupt, match=message):
        KNNLM.from_store(store, "2.ffn_input", 8, 1.0, 0.5, lm=lm)
    with pytest.raises(DatastoreCorrupt, match=message):
        outcome(store)
    # How many tokens the model has is not in the datastore.
    assert len(problems_of(store)) == (number != 10**9)


def test_a_gate_beyond_all_bounds_is_refused(store):
    gate = {"offset": 1e308, "distance": -1e308, "different": 0.0}
    rewrite(store / "datastore.json", lambda one: one["fitted"]["2.ffn_input"].update(gate=gate))
    (problem,) = problems_of(store)
    assert "offset is 1e+308, but a logit of lambda is at most 1e+06" in problem


class Doing(Silent):
    """Something happens when a stage begins."""

    def __init__(self, stage, act):
        self.waited_for, self.act = stage, act

    @contextmanager
    def stage(self, name, unit):
        if name == self.waited_for:
            self.act()
        with super().stage(name, unit) as advance:
            yield advance


@pytest.mark.parametrize("stage", ["evaluation text through the model", "evaluating", "finding examples"])
def test_a_store_that_is_replaced_while_it_is_evaluated(stage, store, outcome, lm, held_out, tmp_path):
    expected = outcome(store)
    text = write_jsonl(tmp_path / "text.jsonl", texts(90, 6))
    run(lm, [text], tmp_path / "b", eval_text=[held_out], settings=SETTINGS)
    assert outcome(tmp_path / "b") != expected

    def replace():
        shutil.rmtree(store)
        (tmp_path / "b").rename(store)

    assert outcome(store, Doing(stage, replace)) == expected


def test_a_store_that_is_written_to_while_it_is_evaluated(store, outcome):
    path = next((store / "parts").glob("*/keys/1.ffn_input.npy"))

    def write():
        with path.open("r+b") as file:
            file.seek(200)
            file.write(b"\0" * 64)

    with pytest.raises(DatastoreCorrupt, match="written to while it was read"):
        outcome(store, Doing("finding examples", write))


def test_a_kept_model_keeps_its_store(store, lm):
    model, other = KNNLM.from_store(store, lm=lm), KNNLM.from_store(store, lm=lm)
    tokens = lm.tokenizer("The nurse", return_tensors="pt").input_ids
    expected = other(tokens).logits
    shutil.rmtree(store)
    assert (model(tokens).logits == expected).all()


def test_check_before_use_reads_what_will_be_read(store, lm):
    def damage(name):
        flip_bit(store / name, random.Random(0))

    def check(layers, **options):
        check_before_use(Datastore.open(store), layers, Silent(), **options)

    check(LAYERS)
    path = next((store / "parts").glob("*/keys/1.ffn_input.npy"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    check(["2.ffn_input"])
    with pytest.raises(DatastoreCorrupt, match=r"1\.ffn_input\.npy has changed"):
        check(LAYERS)
    damage("index/2.ffn_input/index.faiss")
    check(["2.ffn_input"], exact=True)
    with pytest.raises(DatastoreCorrupt, match=r"index\.faiss was changed"):
        check(["2.ffn_input"])
    with pytest.raises(DatastoreCorrupt, match=r"has changed.* \(and 1 more: knnlm verify names them\)"):
        check(LAYERS)

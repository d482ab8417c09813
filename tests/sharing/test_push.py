"""A push to the hub: whole or not visible, resumed, never over something else; through the real huggingface_hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

from knnlm.config import KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.documents import to_document
from knnlm.errors import DatastoreCorrupt, DatastoreError, DatastoreExists, InputError
from knnlm.files import write_json
from knnlm.knn.indexing import index_layer
from knnlm.model.loading import load_model
from knnlm.pipeline import build
from knnlm.places import DATASTORE, REPORTS, mark_unfinished
from knnlm.sharing import upload
from knnlm.sharing.push import push
from knnlm.store.datastore import Datastore
from tests.hub_server import TOKEN, Hub, Stored, fill
from tests.sample_results import sample_result
from tests.source_files import ROOT

REPO = "ann/nursing"
NAME = f"hf:{REPO}"
CARD, GIT = "README.md", ".gitattributes"
FITTED = {"2.ffn_input": {"k": 8, "temperature": 4.0, "lambda": 0.5}}

# huggingface_hub gives raw bytes to httpx2 in an older way.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def shared_folder(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore with an index of FAISS, fitted settings and a report."""
    folder = shutil.copytree(store_folder, tmp_path_factory.mktemp("shared") / "store")
    index_layer(folder, "1.ffn_input", Settings(knn=KNNConfig(index="IVF4,Flat")))
    Datastore.open(folder).update_manifest(fitted=FITTED)
    write_json(folder / REPORTS[0], to_document(sample_result()))
    (folder / REPORTS[1]).write_text("<p>")
    return folder


@pytest.fixture
def folder(shared_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(shared_folder, tmp_path / "store")


@pytest.fixture(scope="module")
def other_folder(gpt2_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another datastore, of fewer tokens and of one other layer."""
    layers = LayerConfig(layers="1.ffn_input,final_norm")
    settings = Settings(text=TextConfig(context=32, stride=16, max_tokens=2000), layers=layers)
    return build(
        load_model(gpt2_folder), [text_file], tmp_path_factory.mktemp("other") / "store", settings=settings
    ).folder


def on_hub(hub: Hub) -> dict[str, bytes]:
    return {name: one.data for name, one in hub.repos[REPO].files.items()}


def on_disk(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in REPORTS}


def test_what_was_pushed_is_fetched_again(hub, folder):
    name = push(folder, NAME, license="cc-by-4.0")
    assert name == f"{NAME}@{hub.repos[REPO].refs['main']}"
    there = on_hub(hub)
    assert {one: there[one] for one in there.keys() - {CARD, GIT}} == on_disk(folder)
    store = Datastore.open(name)
    assert store.manifest == Datastore.open(folder).manifest and store.verify() == ()
    store.saved_index("1.ffn_input").check_files()
    # A datastore that was fetched can be pushed on.
    push(name, "hf:bob/nursing", license="cc-by-4.0")
    assert Datastore.open("hf:bob/nursing").manifest == store.manifest


def test_large_files_go_by_their_checksum_and_in_parts(hub, folder, monkeypatch):
    monkeypatch.setattr("tests.hub_server.PART_BYTES", 1 << 12)
    push(folder, NAME, license="mit")
    large = {name for name, one in hub.repos[REPO].files.items() if one.large}
    assert any(name.endswith("index.faiss") for name in large) and max(map(len, on_disk(folder).values())) > 1 << 13
    assert all(hub.sent[one.sha256] == len(one.data) for one in hub.repos[REPO].files.values() if one.large)


def test_a_push_is_private_only_if_that_is_asked_for(hub, folder):
    push(folder, NAME, license="mit")
    push(folder, "hf:ann/secret", license="mit", private=True)
    assert [hub.repos[name].private for name in (REPO, "ann/secret")] == [False, True]
    assert Datastore.open("hf:ann/secret").verify() == ()


# The card


def test_the_card_tells_what_the_datastore_is(hub, folder):
    push(folder, NAME, license="cc-by-4.0")
    card = DatasetCard(on_hub(hub)[CARD].decode())
    assert card.data.license == "cc-by-4.0" and card.data.pretty_name == "nursing"
    store, rows = Datastore.open(folder), dict(re.findall(r"^\| (.*?) \| (.*) \|$", card.text, re.MULTILINE))
    fingerprint = store.manifest.fingerprint
    assert rows["model"] == f"`{Path(fingerprint['model']).name}`" and fingerprint["model"] not in card.text
    assert rows["layer"] != "" and rows["keys of each layer"] == f"{store.count:,}"
    assert rows["documents"] == f"{len(store.documents)}" and rows["licence of the text"] == "cc-by-4.0"
    assert rows["size"] == f"{sum(map(len, on_disk(folder).values())) / 1e6:,.1f} MB"
    assert rows["weights"] == f"`{fingerprint['weights']}`"
    lines = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in card.text.splitlines()}
    measured = {one.layer: f"{one.perplexity:.3f}" for one in sample_result().layers}
    assert lines["2.ffn_input"][5:] == ["8", "0.500", "4", measured["2.ffn_input"]]
    assert lines["1.ffn_input"][3] == "IVF4,Flat (l2)" and lines["1.ffn_input"][5:8] == ["–"] * 3
    assert rows["perplexity of the model alone"].startswith(f"{sample_result().lm.perplexity:.3f} on ")
    # The model is a folder of this machine, which others have elsewhere.
    assert f"model = knnlm.KNNLM.from_store(\"{NAME}\", lm=knnlm.load_model('gpt2'))" in card.text


def test_a_card_without_evaluation_has_no_figures_of_one(hub, store_folder):
    push(store_folder, NAME, license="other")
    card = on_hub(hub)[CARD].decode()
    assert "perplexity of the model alone" not in card and card.count("| – |\n") == 2


# Resumed


def test_what_is_there_is_not_sent_again(hub, folder):
    first = push(folder, NAME, license="mit")
    sent, commits = dict(hub.sent), len(hub.repos[REPO].commits)
    hub.calls.clear()
    assert push(folder, NAME, license="mit") == first
    assert hub.sent == sent and len(hub.repos[REPO].commits) == commits
    assert not [one for one in hub.calls if one.endswith("/objects/batch")]  # not even asked for
    # Nor when something else has changed.
    Datastore.open(folder).update_manifest(fitted={})
    assert push(folder, NAME, license="mit") != first
    assert hub.sent == sent and Datastore.open(NAME).manifest.fitted == {}


def kill_at(write: int, child: Callable[[], subprocess.Popen[str]]) -> Callable[[int], None]:
    return lambda count: os.kill(child().pid, signal.SIGKILL) if count == write else None


CHILD = "import knnlm.sharing.upload as upload; upload.PART_FILES = 2; from knnlm.cli import main; main()"


def test_a_push_that_is_killed_goes_on_where_it_was(hub, folder):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    arguments = [sys.executable, "-c", CHILD, "push", folder, NAME, "--license", "mit", "--json"]
    large = {one for name, one in on_disk(folder).items() if not name.endswith(".json")}
    children: list[subprocess.Popen[str]] = []
    writes = 0
    for after in (4, 9, 14, None):
        hub.on_write = kill_at(after, lambda: children[-1]) if after else lambda count: None
        hub.writes = 0
        children.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
        out, _ = children[-1].communicate(timeout=120)
        assert children[-1].returncode == (-signal.SIGKILL if after else 0)
        writes += hub.writes
        assert (DATASTORE in on_hub(hub)) == (after is None)
        if after:
            with pytest.raises(DatastoreError, match="not all of it was sent"):
                Datastore.open(NAME)
    assert json.loads(out) == {"store": str(folder), "name": f"{NAME}@{hub.repos[REPO].refs['main']}"}
    assert Datastore.open(NAME).verify() == ()
    # Each kill lost one file's upload at most: what had arrived was not sent again.
    again = sum(hub.sent.values()) - sum(map(len, large))
    assert 0 <= again <= 3 * max(map(len, large)) and len(hub.repos[REPO].commits) > 4


def test_a_stop_tells_what_stays(hub, folder, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(upload, "_commit", stopped)
    with pytest.raises(KeyboardInterrupt) as stop:
        push(folder, NAME, license="mit")
    assert stop.value.__notes__ == ["what was sent stays on the hub: the same push goes on from there"]


# Replaced


def test_readers_see_the_old_datastore_until_the_new_one_is_whole(hub, folder, other_folder, monkeypatch):
    monkeypatch.setattr(upload, "PART_FILES", 1)
    push(folder, NAME, license="mit")
    hub.repos[REPO].commit("a reader's", hub.repos[REPO].files | {"LICENSE": Stored(b"mine", large=False)})
    known = len(hub.repos[REPO].commits)
    push(other_folder, NAME, license="mit")
    *between, last = list(hub.repos[REPO].commits)[known - 1 :]
    assert len(between) > 2  # keys of the new layer came before the manifest
    for commit in between:
        assert Datastore.open(f"{NAME}@{commit}").manifest == Datastore.open(folder).manifest
    assert Datastore.open(f"{NAME}@{last}").manifest == Datastore.open(other_folder).manifest
    # Gone is what only the old one had; what is not knnlm's stays.
    assert on_hub(hub).keys() - {CARD, GIT, "LICENSE"} == on_disk(other_folder).keys()
    assert any("2.ffn_input" in name for name in on_disk(folder).keys() - on_hub(hub).keys())


def test_a_data_set_that_is_no_datastore_is_kept(hub, folder, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.jsonl").write_text("{}")
    before = fill(hub, REPO, text)
    with pytest.raises(DatastoreExists, match=rf"^{NAME} is no datastore, and holds train\.jsonl; choose another name"):
        push(folder, NAME, license="mit")
    assert hub.repos[REPO].refs["main"] == before and not hub.sent


def test_two_pushes_at_once_do_not_mix(hub, folder, monkeypatch):
    real = upload._commit

    def overtaken(*given: object) -> str:
        repo = hub.repos[REPO]
        repo.commit("somebody else's", repo.files | {"x.npy": Stored(b"x", large=True)})
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(upload, "_commit", overtaken)
    with pytest.raises(DatastoreError, match=rf"^{NAME} was changed on the hub meanwhile; push again\b"):
        push(folder, NAME, license="mit")


def test_a_datastore_that_changes_while_it_is_sent_is_told(hub, folder, monkeypatch):
    real = upload._parts

    def changed(files):
        yield from real(files)
        Datastore.open(folder).update_manifest(fitted={})

    monkeypatch.setattr(upload, "_parts", changed)
    with pytest.raises(DatastoreError, match="was changed while it was sent; push it again"):
        push(folder, NAME, license="mit")
    assert DATASTORE not in on_hub(hub)


# Refused before anything is sent


def test_what_cannot_be_pushed_is_refused_before_the_hub_is_changed(hub, folder, monkeypatch):
    def refused(kind: type[Exception], line: str, target: str = NAME, license: str | None = "mit") -> None:
        with pytest.raises(kind, match=rf"^{line}[^\n]*$"):
            push(folder, target, license=license)
        assert not hub.repos and not hub.sent

    refused(InputError, "`license` of the text is missing", license=None)
    refused(InputError, "`license` is 'my own: x', which is no name of a licence", license="my own: x")
    refused(InputError, "`license` is 'gpl-99', which the hub does not take; take a name", license="gpl-99")
    refused(InputError, "'nursing' is no datastore on the hub; write hf:USER/NAME", target="nursing")
    refused(InputError, f"{NAME}@v1 names a revision, but the newest is sent; write {NAME}$", target=f"{NAME}@v1")
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        refused(InputError, r"there is no token of the hub; log in \(hf auth login\)")
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_aWrongToken")
        refused(DatastoreError, f"{NAME}: the hub's client says: .*401")
    mark_unfinished(folder, "a" * 64)
    refused(DatastoreError, f"{folder} is unfinished; give the command that makes it again, then push it")
    (folder / "unfinished.json").unlink()
    keys = next(path for path in folder.rglob("*.npy") if "keys" in path.parts)
    keys.write_bytes(keys.read_bytes()[:-1] + b"x")
    refused(DatastoreCorrupt, f"{keys} has changed")


def test_the_command_line_tells_the_name(hub, folder, call):
    done = call("push", folder, NAME, "--license", "mit")
    assert done.status == 0 and done.out == f"Sent: {NAME}@{hub.repos[REPO].refs['main']}\n"
    assert any("was loaded from" in line for line in done.errors)
    done = call("push", folder, NAME)
    assert done.status == 2 and done.errors == (
        "knnlm: --license of the text is missing, which others can read back from the datastore; "
        "name it as the hub does, such as cc-by-4.0, mit or other",
    )

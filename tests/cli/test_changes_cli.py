"""The verbs that change a datastore, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def told(done) -> dict:
    """The document of a command that succeeded."""
    assert done.status == 0, done
    return json.loads(done.out)


def test_documents_go_and_come(call, gpt2_folder: Path, store_folder: Path, text_file: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(store_folder, tmp_path / "store"))
    before = told(call("info", store, "--json"))
    name = text_file.name
    refused = call("remove", store, "--document", f"{name}:9999")
    assert refused.status == 2 and f"has no document 9999 of {name}" in refused.errors[0]
    assert call("remove", store).status == 2
    removed = told(call("remove", store, "--document", f"{name}:1", "--document", f"{name}:2", "--json"))
    assert removed["documents"] == before["documents"] - 2 and removed["removed"] > 0 and removed["stale"]
    compacted = told(call("compact", store, "--json"))
    assert (compacted["removed"], compacted["keys"]) == (0, removed["keys"])
    added = told(call("add", store, "--text", text_file, "--model", gpt2_folder, "--json"))
    assert added["keys"] > compacted["keys"] and added["parts"] == 2
    assert call("verify", store).status == 0 and call("info", store).status == 0
    merged = told(call("merge", store, store_folder, "--out", tmp_path / "both", "--json"))
    assert merged["keys"] == added["keys"] + before["keys"]
    assert call("verify", tmp_path / "both").status == 0

"""What tests of the command line share: a run that would go well, a folder's tree, a datastore that is whole."""

from __future__ import annotations

import json
from pathlib import Path

RUN = ("run", "--context", "32", "--stride", "16", "--eval-tokens", "600")
# What comes before an error is what the user is told anyway.
PLAN = "keys of "


def tree(folder: Path) -> dict[Path, bytes | None]:
    """Every path below, hidden ones too, with the content of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def check_whole(call, folder: Path) -> None:
    """The datastore `out` is whole and works, and nothing else is in the folder."""
    assert [path.name for path in folder.iterdir()] == ["out"]
    out = folder / "out"
    assert [path.name for path in out.rglob("*") if path.name.startswith(".")] == []
    assert call("verify", out).status == 0


def check_complete(call, folder: Path) -> None:
    """Whole, and nothing is missing: the index, what was fitted, the reports."""
    check_whole(call, folder)
    there = {path.name for path in (folder / "out").iterdir()}
    assert there == {
        "datastore.json",
        "frame",
        "index",
        "parts",
        "report.html",
        "report.json",
    }
    manifest = json.loads((folder / "out" / "datastore.json").read_text())
    assert manifest["indexes"] and manifest["fitted"]

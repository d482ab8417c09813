"""Material of the campaign: a tiny random model, three texts, and files that stand for the user's own."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from forks import fork

BOOK = Path(__file__).parents[1] / "demo_data" / "rust-book.jsonl"
# Characters of each of the three texts.
TEXT_CHARACTERS = 10_000


@dataclass(frozen=True)
class Workshop:
    """Places in one folder."""

    folder: Path

    @property
    def model(self) -> Path:
        """A tiny Llama with a tokenizer of 288 tokens."""
        return self.folder / "model"

    def text(self, name: str) -> Path:
        """One of the texts `first`, `second` and `evaluation`."""
        return self.folder / f"{name}.jsonl"

    @property
    def place(self) -> Path:
        """A folder with things of the user's, in which stores are made."""
        return self.folder / "place"

    @property
    def store(self) -> Path:
        """Where stores are made."""
        return self.place / "book.knn"

    @property
    def parents(self) -> tuple[Path, Path]:
        """Two stores to merge, beside that folder."""
        return self.folder / "one.knn", self.folder / "other.knn"


def make(folder: Path) -> Workshop:
    """Create the model, the texts and the files."""
    shop = Workshop(folder)
    made = fork(lambda: _save_model(shop.model))
    if made.status:
        raise SystemExit(made.output)
    lines = BOOK.read_text(encoding="utf-8").splitlines()
    for number, name in enumerate(("first", "second", "evaluation")):
        shop.text(name).write_text(_some(lines[number * 30 :]), encoding="utf-8")
    shop.place.mkdir()
    (shop.place / "notes.txt").write_text("the user's own notes\n", encoding="utf-8")
    own = shop.place / ".book.knn.partial-7"
    own.mkdir()
    (own / "thesis.tex").write_text("the user's own thesis\n", encoding="utf-8")
    return shop


def _save_model(folder: Path) -> None:
    from tests.tiny_models import save_tiny

    save_tiny("llama", folder)


def _some(lines: list[str]) -> str:
    """Documents with a bounded total of characters; long ones are cut."""
    found, left = [], TEXT_CHARACTERS
    for line in lines:
        text = json.loads(line)["text"][: TEXT_CHARACTERS // 8]
        if left < len(text):
            break
        left -= len(text)
        found.append(json.dumps({"text": text}))
    return "\n".join(found) + "\n"


# Files whose content differs from one run to the next: they tell how long it took.
REPORTS = ("report.json", "report.html")


def digest(path: Path) -> str:
    """A hash of a file, or of all names and files in a folder; without what tells how long something took."""
    found = hashlib.sha256()
    if path.is_dir():
        for parent, folders, names in os.walk(path):
            folders.sort()
            for name in sorted(names):
                file = Path(parent, name)
                found.update(f"{file.relative_to(path)}\0".encode() + hashlib.sha256(_content(file)).digest())
    else:
        found.update(path.read_bytes())
    return found.hexdigest()


def _content(file: Path) -> bytes:
    if file.name in REPORTS:
        return b""
    if file.name != "index.json":
        return file.read_bytes()
    document = json.loads(file.read_text(encoding="utf-8"))
    for of, name in ((document, "checksum"), (document["recall"] or {}, "milliseconds_per_query")):
        of.pop(name, None)
    return json.dumps(document, sort_keys=True).encode()


def digest_of_listed(store: Path) -> str:
    """A hash of a store's manifest and of all files that it lists."""
    text = (store / "datastore.json").read_bytes()
    manifest = json.loads(text)
    indexes = [one.get("folder") or layer for layer, one in manifest["indexes"].items() if one.get("parts") != []]
    places = ["frame", *(f"parts/{one['name']}" for one in manifest["parts"]), *(f"index/{name}" for name in indexes)]
    return hashlib.sha256(text + "".join(digest(store / place) for place in places).encode()).hexdigest()

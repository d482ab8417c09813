"""The documentation against the code: the command line, the files on disk, and links that lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import typer

from index.manifest import FORMAT as INDEX_FORMAT
from index.manifest import IndexManifest, Recall, SavedFile
from index.typed import CHECKSUM
from knnlm.cli.entry import FOREIGN, app
from knnlm.store.manifest import FORMAT, VERSION, LayerKeys, Manifest, PartEntry
from knnlm.store.part import FORMAT as PART_FORMAT
from knnlm.store.part import Part, Shard
from tests.source_files import ROOT
from tests.test_architecture import MAY_IMPORT

DOCS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = typer.main.get_command(app).commands
PAGES = {path.name for path in DOCS if path.parent == ROOT / "docs"}
# Not written down one by one: every command has it.
HELP = "--help"


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def usage() -> str:
    return text(ROOT / "docs" / "usage.md")


def options() -> dict[str, dict[str, object]]:
    """For each option, the commands that take it, with its default there."""
    found: dict[str, dict[str, object]] = {}
    for command, described in COMMANDS.items():
        for parameter in described.params:
            for name in parameter.opts:
                if name.startswith("-") and name != HELP:
                    found.setdefault(name, {})[command] = parameter.default
    return found


def table_of_options() -> dict[str, tuple[list[str], str]]:
    """The rows of the table in docs/usage.md: option, commands, default."""
    part = usage().split("\n## Options\n")[1].split("\n## ")[0]
    rows = [re.split(r" *\| *", line) for line in part.splitlines() if line.startswith("| `--")]
    return {row[1].strip("`"): (row[2].split(", "), row[3]) for row in rows}


def shown(default: object) -> str:
    """A default as the table has it: nothing where it is found out or has to be given."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "" if default is None or callable(default) or str(default) == "Ellipsis" else str(default)


def test_options_were_found():
    assert {"run", "eval"} <= COMMANDS.keys() and {"run", "eval", "generate"} <= options()["--lambda"].keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_a_part_with_an_example(command):
    (part,) = re.findall(rf"^### `knnlm {command}`.*?(?=^##)", usage(), re.MULTILINE | re.DOTALL)
    assert re.search(rf"^knnlm {command} \S", part, re.MULTILINE)


def test_table_has_every_option_and_no_other():
    assert set(table_of_options()) == set(options())


@pytest.mark.parametrize("option", options())
def test_table_knows_the_commands_and_the_default(option):
    commands, default = table_of_options()[option]
    assert set(commands) == set(options()[option])
    # A verb may find out what another has a default for.
    assert {shown(value) for value in options()[option].values()} - {""} == {default} - {""}


def test_options_in_examples_exist():
    for line in re.findall(r"^(?:\.venv/bin/)?knnlm .*(?:\\\n.*)*", "\n".join(map(text, DOCS)), re.MULTILINE):
        command = line.split()[1]
        if command in COMMANDS.keys() - FOREIGN:
            known = {name for name, commands in options().items() if command in commands}
            assert set(re.findall(r" (--[a-z-]+)", line)) - known == set(), line


# Links


def links(path: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text(path), flags=re.MULTILINE | re.DOTALL))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(markdown: str) -> Iterator[str]:
    """Names of headings, as GitHub makes them."""
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_relative_links_resolve(path):
    for link in links(path):
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.is_relative_to(ROOT) and target.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(text(target)), f"{path.name}: {link}"


def test_links_were_found():
    assert "format.md" in links(ROOT / "docs" / "usage.md")


@pytest.mark.parametrize("path", [path for path in DOCS if path.name in PAGES], ids=lambda path: path.name)
def test_anchors_are_those_of_the_site_too(path):
    # The site drops the hyphens at the ends of a heading's name, GitHub keeps them.
    assert [anchor for anchor in anchors(text(path)) if anchor != anchor.strip("-")] == []


def pages_linked_from(names: set[str]) -> set[str]:
    found = {link.partition("#")[0] for name in names for link in links(ROOT / "docs" / name)}
    return names | {name for name in found if name in PAGES}


def test_every_page_is_two_clicks_from_the_index():
    assert pages_linked_from(pages_linked_from({"index.md"})) == PAGES
    assert "docs/index.md" in links(ROOT / "README.md")


def test_site_has_every_page_in_its_menu():
    # Without a reader of YAML, which only the extra `docs` brings: `  - Title: page.md` and `      - page.md`.
    menu = text(ROOT / "mkdocs.yml").split("\nnav:\n")[1]
    listed = re.findall(r"^ +- (?:[\w ]+: )?(\S+\.md)$", menu, re.MULTILINE)
    assert sorted(listed) == sorted(PAGES)


def test_menu_and_index_group_the_pages_alike():
    menu = text(ROOT / "mkdocs.yml").split("\nnav:\n")[1]
    grouped = {
        heading: re.findall(r"^      - (\S+)$", part, re.MULTILINE)
        for heading, part in re.findall(r"^  - ([\w' ]+):\n((?:      - .*\n)+)", menu, re.MULTILINE)
    }
    parts = re.split(r"^## (.*)$", text(ROOT / "docs" / "index.md"), flags=re.MULTILINE)[1:]
    assert grouped == {
        heading: re.findall(r"\]\((\S+\.md)\)", part) for heading, part in zip(parts[::2], parts[1::2], strict=True)
    }


def test_site_loads_nothing_from_elsewhere():
    assert re.search(r"^  font: false\b", text(ROOT / "mkdocs.yml"), re.MULTILINE)
    assert not re.search(r"https?:", text(ROOT / "mkdocs.yml"))


def test_pages_link_to_nothing_that_the_site_lacks():
    # It has docs/ only: what lies beside that is named, not linked.
    for path in DOCS:
        if path.name in PAGES:
            assert [link for link in links(path) if link.startswith("../")] == [], path.name


@pytest.mark.parametrize(
    "path", [ROOT / "docs" / name for name in ("format.md", "usage.md", "metrics.md")], ids=lambda p: p.name
)
def test_files_that_are_named_exist(path):
    for name in re.findall(r"`((?:knnlm|index|tests|scripts|docs)/[\w/]+\.\w+)`", text(path)):
        assert (ROOT / name).exists(), name


# Files on disk


def part_of_format(heading: str) -> str:
    return text(ROOT / "docs" / "format.md").split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_every_field_of_the_manifest_is_described():
    names = {
        "format",
        "version",
        CHECKSUM,
        *(field.name for kind in (Manifest, LayerKeys, Shard, PartEntry) for field in fields(kind)),
    }
    part = part_of_format("The manifest")
    assert {name for name in names if f"`{name}`" not in part} == set()
    assert f'`"{FORMAT}"`' in part and f"integer, {VERSION} |" in part


def test_every_field_of_a_part_is_described():
    part = part_of_format("A part")
    assert {field.name for field in fields(Part) if f"`{field.name}`" not in part} == set()
    assert f'`"{PART_FORMAT}"`' in part


def test_every_field_of_an_index_is_described():
    names = {CHECKSUM, *(field.name for kind in (IndexManifest, SavedFile, Recall) for field in fields(kind))}
    part = part_of_format("An index")
    assert {name for name in names if f"`{name}`" not in part} == set()
    assert f'`"{INDEX_FORMAT}"`' in part


def test_manifest_table_has_no_field_that_is_gone():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", part_of_format("The manifest"), re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"\w+", row)}
    assert told == {"format", "version", CHECKSUM, *(field.name for field in fields(Manifest))}


def test_rooms_are_told_in_the_order_of_the_data():
    table = text(ROOT / "docs" / "architecture.md").split("\n## The rooms\n")[1].split("\n## ")[0]
    told = [
        "root" if row == "the root" else row.strip("`/") for row in re.findall(r"^\| (the root|`\w+/`) \|", table, re.M)
    ]
    assert sorted(told) == sorted(MAY_IMPORT)
    assert [name for name in told if name != "root"] == [name for name in MAY_IMPORT if name != "root"]


def test_way_of_a_token_names_files_that_exist():
    way = text(ROOT / "docs" / "architecture.md").split("\n## The way of one token\n")[1].split("\n## ")[0]
    named = re.findall(r"`(\w+/\w+\.py)`", way)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / "knnlm" / name).exists()] == []

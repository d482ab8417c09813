"""What `pip install` would take along, and what has to agree between files. Nothing is built."""

from __future__ import annotations

import os
import re
import tomllib
from importlib import import_module

import pytest

import knnlm
from tests.source_files import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
DEPENDENCIES = [*PROJECT["project"]["dependencies"], *(name for names in EXTRAS.values() for name in names)]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)


def normal(name: str) -> str:
    """The form in which package names are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def packages() -> set[str]:
    files = [path for top in ("knnlm", "index") for path in (ROOT / top).rglob("*.py")]
    return {".".join(path.parent.relative_to(ROOT).parts) for path in files}


def test_every_folder_with_modules_is_a_package():
    # setuptools leaves out, silently, a folder without __init__.py.
    assert {name for name in packages() if not ROOT.joinpath(*name.split("."), "__init__.py").is_file()} == set()


def test_packages_are_found_and_nothing_else():
    patterns = SETUPTOOLS["packages"]["find"]["include"]
    assert patterns == ["knnlm*", "index*"]
    others = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"knnlm", "index"}
    assert not [name for name in others if name.startswith(("knnlm", "index"))]


@pytest.mark.parametrize("package", ["knnlm", "index"])
def test_package_says_that_it_is_typed(package):
    assert "py.typed" in SETUPTOOLS["package-data"]["*"]
    assert (ROOT / package / "py.typed").is_file()


def test_data_patterns_and_data_files_match():
    matched = set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns if package != "*" else []:
            files = {path for path in ROOT.joinpath(*package.split(".")).glob(pattern) if path.is_file()}
            assert files, f"{package}: {pattern} matches no file"
            matched |= files
    data = {
        path
        for top in ("knnlm", "index")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != "py.typed"
    }
    assert data == matched


def test_version_stands_in_one_place_and_the_changelog_agrees():
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "knnlm.version.__version__"}
    assert "version" not in PROJECT["project"] and PROJECT["project"]["dynamic"] == ["version"]
    newest = re.search(r"^## \[(\d.*?)\] - (Unreleased|\d{4}-\d\d-\d\d)$", changelog(), re.MULTILINE)
    assert newest and newest[1] == knnlm.__version__


def changelog() -> str:
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_console_script_is_there():
    module, function = PROJECT["project"]["scripts"]["knnlm"].split(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("requirement", DEPENDENCIES)
def test_dependency_is_pinned_within_its_bound(requirement):
    name, bound = requirement.split(">=")
    pins = {normal(name): version for name, version in PINS.items()}
    assert numbers(pins[normal(name)]) >= numbers(bound)


def test_pins_hold_on_every_machine():
    # A local tag (2.13.0+cpu), a path or a host would bind the set to the machine that wrote it.
    assert [version for version in PINS.values() if not re.fullmatch(r"[\w.]+", version)] == []


@pytest.mark.parametrize("script", ["scripts/install", "scripts/test", "scripts/demo"])
def test_script_can_be_run(script):
    assert os.access(ROOT / script, os.X_OK)


def test_what_the_demo_ships_is_small_and_attributed():
    folder = ROOT / "scripts" / "demo_data"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20_000_000
    credits_text = (folder / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in folder.iterdir() if path.name != "README.md" and path.name not in credits_text]

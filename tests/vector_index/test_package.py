"""The names that the package offers, and what importing them costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module

import pytest

from tests.source_files import ROOT, syntax

PACKAGE = import_module("index")
HEAVY = {"faiss", "torch", "numpy", "knnlm", "transformers", "datasets"}


def loaded_by(code):
    report = f"import sys\n{code}\nprint(*(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing():
    assert loaded_by("import index") == set()


@pytest.mark.parametrize("module", ["spec", "errors", "metric"])
def test_specs_and_errors_need_no_library(module):
    assert loaded_by(f"import index.{module}") == set()


def test_searching_loads_faiss_and_numpy_only():
    assert loaded_by("from index.build import build_index") == {"faiss", "numpy"}


def test_all_is_sorted_and_is_what_type_checkers_see():
    assert PACKAGE.__all__ == sorted(set(PACKAGE.__all__))
    block = next(node for node in syntax(ROOT / "index" / "__init__.py").body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == {name: f"index.{module}" for name, module in PACKAGE._MODULE_OF.items()}
    assert sorted(typed) == PACKAGE.__all__


@pytest.mark.parametrize("name", PACKAGE.__all__)
def test_name_is_the_one_of_its_module_and_documented(name):
    value = getattr(PACKAGE, name)
    assert value is getattr(import_module(f"index.{PACKAGE._MODULE_OF[name]}"), name)
    assert value.__doc__


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'IndexSpecs'"):
        PACKAGE.IndexSpecs  # noqa: B018

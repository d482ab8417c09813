"""The names that `knnlm` offers: sorted, importable in any order of imports, documented, known to type checkers."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import subprocess
import sys
from importlib import import_module
from operator import attrgetter

import pytest

import knnlm
from tests.source_files import ROOT, modules, syntax

LAZY = sorted(knnlm._MODULE_OF)


def test_names_for_type_checkers_are_the_names_at_run_time():
    block = next(node for node in syntax(ROOT / "knnlm" / "__init__.py").body if isinstance(node, ast.If))
    *found, exported = block.body
    typed = {alias.name: node.module for node in found for alias in node.names}
    assert typed == {name: f"knnlm.{module}" for name, module in knnlm._MODULE_OF.items()}
    assert ast.literal_eval(exported.value) == sorted((*LAZY, "__version__"))


@pytest.mark.parametrize("name", LAZY)
def test_name_is_the_one_of_its_module(name):
    value = getattr(knnlm, name)
    assert value is getattr(import_module(f"knnlm.{knnlm._MODULE_OF[name]}"), name)
    assert callable(value)


@pytest.mark.parametrize("name", LAZY)
def test_name_is_documented(name):
    text = getattr(knnlm, name).__doc__
    # A dataclass without a docstring of its own gets its signature for one.
    assert text and not text.startswith(f"{name}(")


@pytest.mark.parametrize("module", ["errors", "results", "config"])
def test_every_error_result_and_setting_is_public(module):
    defined = {
        node.name
        for node in syntax(ROOT / "knnlm" / f"{module}.py").body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }
    assert defined <= set(LAZY)


def test_no_name_is_a_module_too():
    # Whoever imports the module knnlm.x puts it into the package as `knnlm.x`, over a function of that name.
    assert not {f"knnlm.{name}" for name in LAZY} & set(modules("knnlm"))


def test_all_names_are_the_same_after_every_module_is_imported():
    code = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
import knnlm
print([name for name in knnlm._MODULE_OF if not callable(getattr(knnlm, name))])
"""
    names = [name for name in modules("knnlm") if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'perplexitty'"):
        _ = knnlm.perplexitty


def test_dir_lists_the_names():
    assert dir(knnlm) == sorted((*LAZY, "__version__"))


def test_help_is_short_and_has_every_name_in_a_group():
    text = pydoc.render_doc(knnlm, renderer=pydoc.plaintext)
    assert text.count("\n") < 75 and "CLASSES" not in text and "FUNCTIONS" not in text
    groups = text[text.index("models ") : text.index("PACKAGE CONTENTS")]
    assert set(LAZY) <= set(re.findall(r"\w+", groups))


@pytest.mark.parametrize("name", LAZY)
def test_signature_is_short_and_shows_no_settings(name):
    shown = getattr(knnlm, name)
    if inspect.isroutine(shown):
        assert len(str(inspect.signature(shown))) < 400
    members = vars(shown).values() if inspect.isclass(shown) else [shown]
    for member in (getattr(one, "__func__", one) for one in members):
        if inspect.isfunction(member) and member.__name__ != "__init__":
            assert not re.search(r"(Config|Settings)\(", str(inspect.signature(member)))


@pytest.mark.parametrize("name", [*LAZY, "KNNLM.from_store"])
def test_a_store_may_be_given_by_its_folder(name):
    shown = attrgetter(name)(knnlm)
    taken = inspect.signature(shown).parameters.get("store") if inspect.isroutine(shown) else None
    assert taken is None or taken.annotation in ("str | Path | Datastore", "GivenStores")


def sentences(path):
    """The text of a module that is no docstring: neither of a function nor of an attribute."""
    tree = syntax(path)
    docs = {id(one.value) for one in ast.walk(tree) if isinstance(one, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def test_what_a_message_names_is_public():
    every = modules("knnlm") | modules("index")
    named = {
        found
        for path in every.values()
        for text in sentences(path)
        if text not in every
        for found in re.findall(r"\bknnlm\.(\w[\w.]*\w)", text)
    }
    assert "index_layer" in named and {name.split(".")[0] for name in named} <= set(LAZY)

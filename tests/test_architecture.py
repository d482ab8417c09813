"""The arrows between modules, what an import costs, and the size of functions and files (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.source_files import ROOT, imports, modules, syntax, tracked_files

# The rooms of knnlm/ in the order in which data flows (docs/architecture.md): what each may import besides itself. The
# root's modules are named: they are the vocabulary that all may use.
ROOT_MODULES = (
    *(
        "config",
        "documents",
        "errors",
        "files",
        "json_text",
        "layer_names",
        "locks",
        "memory",
        "places",
        "progress",
        "regular",
        "results",
        "shown",
        "statistics",
        "utf8",
        "version",
    ),
)
MAY_IMPORT = {
    "text": {"root"},
    "model": {"root"},
    "scores": {"root", "index"},
    "store": {"root", "index"},
    "knn": {"root", "store", "index"},
    "sharing": {"root", "store", "knn"},
    "extraction": {"root", "text", "model", "scores", "store"},
    "cluster": {"root", "text", "model", "store", "knn", "extraction", "index"},
    "evaluation": {"root", "text", "model", "scores", "store", "knn", "extraction"},
    "pipeline": {"root", "text", "model", "scores", "store", "knn", "extraction", "cluster", "evaluation"},
    "inference": {"root", "model", "store", "knn"},
    "server": {"root", "model", "knn", "inference"},
    "report": {"root"},
    "studies": {
        *("root", "text", "model", "scores", "store", "knn", "extraction", "evaluation", "pipeline"),
        *("report", "index"),
    },
    "cli": {
        "root",
        "text",
        "model",
        "scores",
        "store",
        "knn",
        "sharing",
        "cluster",
        "pipeline",
        "inference",
        "server",
        "studies",
        "report",
        "index",
    },
    "root": {"index"},
}
HEAVY = {"torch", "transformers", "datasets", "huggingface_hub", "faiss", "lm_eval", "fastapi", "uvicorn", "ray"}
ONLY_IN = {
    "faiss": {"index/faiss_index.py", "index/faiss_lists.py"},
    "transformers": {"knnlm/model/lm.py", "knnlm/model/loading.py", "knnlm/studies/train/trainer.py"},
    "datasets": {"knnlm/text/hub.py"},
    "huggingface_hub": {"knnlm/model/hub.py", "knnlm/sharing/upload.py", "knnlm/store/hub.py"},
    "peft": {"knnlm/model/adapters.py"},
    "gguf": {"knnlm/model/gguf_files.py"},
    "lm_eval": {"knnlm/inference/harness.py"},  # a subclass needs its base
    "fastapi": {"knnlm/server/app.py", "knnlm/server/run.py", "knnlm/server/explorer/routes.py"},
    "pydantic": {"knnlm/server/wire.py", "knnlm/server/chat_wire.py", "knnlm/server/explorer/wire.py"},
    "uvicorn": {"knnlm/server/run.py"},
    "ray": {"knnlm/cluster/core.py"},
}
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 450

KNNLM, INDEX = modules("knnlm"), modules("index")
OURS = KNNLM | INDEX


def top(name: str) -> str:
    return name.split(".")[0]


def room(name: str) -> str:
    """`knnlm.text.corpus` is of text, `knnlm.config` of the root, and all of `index` is one room."""
    parts = name.split(".")
    if parts[0] == "index":
        return "index"
    return parts[1] if len(parts) > 2 or OURS[name].name == "__init__.py" else "root"


def imported(name: str) -> set[str]:
    """Our own modules that a module imports."""
    return {other for other in imports(OURS[name]) if other in OURS}


# `knnlm` itself has lazy names and no imports, and `__main__` starts the command line.
IN_ROOMS = [name for name in KNNLM if name not in ("knnlm", "knnlm.__main__")]


@pytest.mark.parametrize("name", IN_ROOMS)
def test_module_imports_what_its_room_may(name):
    own = room(name)
    assert own in MAY_IMPORT, f"{name} is in no room of MAY_IMPORT"
    wrong = {other for other in imported(name) if room(other) not in MAY_IMPORT[own] | {own}}
    assert not wrong, f"{own} may import {sorted(MAY_IMPORT[own])}, but {name} imports {sorted(wrong)}"


def test_root_has_the_modules_that_are_named():
    # A new module belongs in a room; what all rooms use takes its place in ROOT_MODULES.
    assert {name.split(".")[1] for name in IN_ROOMS if room(name) == "root"} == set(ROOT_MODULES)


def test_every_arrow_is_in_use():
    for own, others in MAY_IMPORT.items():
        used = {room(other) for name in IN_ROOMS if room(name) == own for other in imported(name)}
        assert others <= used, f"{own} does not import {sorted(others - used)}: take the arrow away"


def test_package_itself_is_imported_by_nobody_below_the_command_line():
    # `import knnlm` inside knnlm/ would reach every module through its lazy names.
    assert not {name for name in IN_ROOMS if "knnlm" in imports(KNNLM[name]) and room(name) != "cli"}


@pytest.mark.parametrize("name", OURS)
def test_private_names_stay_in_their_file(name):
    for node in ast.walk(syntax(OURS[name])):
        if isinstance(node, ast.ImportFrom) and top(node.module or "") in ("knnlm", "index"):
            assert not [alias.name for alias in node.names if re.match(r"_[^_]", alias.name)], node.module


def test_no_two_public_classes_have_the_same_name():
    homes: dict[str, list[str]] = {}
    for home in OURS:
        for node in ast.walk(syntax(OURS[home])):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(home)
    assert len(homes) > 100
    assert not {name: where for name, where in homes.items() if len(where) > 1}


def test_imports_have_no_cycle():
    graph = {name: imported(name) - {name} for name in OURS if name != "knnlm"}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' -> '.join(error.args[1])}")
    assert len(order) >= len(graph)


@pytest.mark.parametrize("name", [name for name in IN_ROOMS if room(name) == "report"])
def test_report_needs_nothing_heavy(name):
    assert not {top(other) for other in imports(KNNLM[name])} & HEAVY


@pytest.mark.parametrize("name", INDEX)
def test_index_knows_vectors_only(name):
    seen = {top(other) for other in imports(INDEX[name])}
    assert not seen & {"knnlm", "transformers", "datasets", "tests"}
    assert "torch" not in seen or name in ("index.int8", "index.scan", "index.torch_threads")


@pytest.mark.parametrize("name", OURS)
def test_nobody_imports_the_index_package_as_a_name(name):
    # A variable called `index` would hide it: always `from index.x import Y`.
    for node in ast.walk(syntax(OURS[name])):
        assert not (isinstance(node, ast.Import) and any(top(alias.name) == "index" for alias in node.names))
        assert not (isinstance(node, ast.ImportFrom) and node.module == "index")


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_has_one_door(library):
    users = {path.relative_to(ROOT).as_posix() for path in OURS.values() if library in {top(i) for i in imports(path)}}
    assert users == ONLY_IN[library]


def test_no_test_folder_hides_the_index_package():
    # tests/index/ would be found before index/ itself.
    assert not (ROOT / "tests" / "index").exists() and (ROOT / "tests" / "__init__.py").exists()


def loaded_by(code: str) -> set[str]:
    """Which of the heavy libraries a new Python has loaded after it ran some code."""
    report = f"import sys\n{code}\nprint('loaded:', *(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_loaded_by_sees_a_heavy_library():
    assert "faiss" in loaded_by("import faiss")


@pytest.mark.parametrize(
    "module",
    [
        *("knnlm", "index", "knnlm.report.view", "knnlm.store.datastore"),
        *(f"knnlm.{name}" for name in ROOT_MODULES if name != "statistics"),
    ],
)
def test_import_loads_nothing_heavy(module):
    assert loaded_by(f"import {module}") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = f"""
from knnlm.cli import main
sys.argv = ["knnlm", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    assert loaded_by(code) == set()


@pytest.mark.parametrize("name", OURS)
def test_functions_and_files_are_short(name):
    text = OURS[name].read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(syntax(OURS[name])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{name}.{node.name}"


# The root of a path on somebody's machine, unless it ends a longer path or an address.
MACHINE_PATH = re.compile(r"(?:(?<=file://)|(?<![\w.~/-]))/(?:work|home|root|tmp|Users)/[\w.-]+")
TEXT = {"", ".cff", ".css", ".html", ".j2", ".js", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}


def is_ours(path: Path) -> bool:
    return path.suffix in TEXT and "demo_data/model" not in path.as_posix()


def test_no_path_of_a_machine_is_committed():
    files = [path for path in tracked_files() if is_ours(path)]
    if not files:
        pytest.skip("not a git checkout")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files
        for match in MACHINE_PATH.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize("text", ["{}home/ann", "--out {}tmp/x", "file://{}root/x"])
def test_a_path_of_a_machine_is_recognised(text):
    assert MACHINE_PATH.search(text.format("/"))


@pytest.mark.parametrize("text", ["../home/x", "https://example.org/home/x", "a/work/b", "~/work/x", "/usr/bin/env"])
def test_a_harmless_path_is_let_be(text):
    assert not MACHINE_PATH.search(text)


def test_json_of_others_is_parsed_in_one_place():
    # Elsewhere deep nesting would be a RecursionError. The other two read what a tokenizer itself has just written.
    own = {"index/typed.py", "knnlm/model/fingerprint.py", "knnlm/model/encoding.py"}
    found = {
        path.relative_to(ROOT).as_posix()
        for path in OURS.values()
        if re.search(r"\bjson\.loads?\(", path.read_text("utf-8"))
    }
    assert found == own

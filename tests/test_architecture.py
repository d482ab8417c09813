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

# A module of knnlm/ sees modules of its own line and of the lines above it, never of those below.
LEVELS = (
    {"version", "errors", "names"},
    {"config", "results", "progress", "storage", "places", "npy", "half", "memory", "textfiles", "parquet"},
    {"layers", "head", "hardware", "encoding", "fingerprint", "training.push_away"},
    {"windows", "corpus", "overlap", "statistics", "probability"},
    {"dispersion", "sample", "correlation", "scores", "manifest", "keys", "datastore", "datastore_writer"},
    {"lm", "scoring", "choose", "search", "checkpoints.output_matrix", "checkpoints.token_sets", "checkpoints.figures"},
    {
        "queries",
        "serving.evidence",
        "serving.retrieval",
        "serving.sampling",
        "slices.questions",
        "slices.statistics",
        "training.trainer",
        "training.checkpoints",
    },
    {"collect", "plan", "job", "indexing", "vectors", "checkpoints.ranking", "training.text"},
    {"serving.model", "slices.likelihoods", "slices.sets"},
    {"parts", "serving.text", "serving.batch", "serving.continuing", "serving.explain", "serving.harness"},
    {"segments", "correlate.clusters"},
    {"correlate.measure", "slices.items"},
    {"evaluation", "slices.measure"},
    {"examples", "server.limits", "server.refusals", "server.wire", "server.metrics", "server.choices"},
    {"pipeline", "correlate.study", "training.train", "tables", "screen", "server.batching", "server.waiting"},
    {"correlate.document", "slices.document", "checkpoints.document", "server.service", "server.completions"},
    {"server.gate", "server.app", "server.run", "explorer.wire", "explorer.routes"},
    {"cli"},
    {"__main__"},
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
# report/ is beside the levels: it sees what a run found and how files are written; from `pipeline` on it is seen.
REPORT_SEES = {"knnlm.results", "knnlm.errors", "knnlm.names", "knnlm.version", "knnlm.storage"}
# Their __init__ holds nothing but a sentence, in server/ what is missing, or in knnlm/ itself lazy names.
PACKAGES = ("__init__", "checkpoints", "correlate", "explorer", "server", "serving", "slices", "training")
# The command line only names the errors.
INDEX_SEEN_BY = {"knnlm.correlate.clusters", "knnlm.search", "knnlm.indexing", "knnlm.cli.entry"}
HEAVY = {"torch", "transformers", "datasets", "faiss", "lm_eval", "fastapi", "uvicorn"}
ONLY_IN = {
    "faiss": {"index/faiss_index.py"},
    "transformers": {"knnlm/lm.py", "knnlm/training/trainer.py"},  # a subclass needs its base
    "datasets": {"knnlm/corpus.py"},
    "peft": {"knnlm/training/train.py"},
    "lm_eval": {"knnlm/serving/harness.py"},  # a subclass needs its base
    "fastapi": {"knnlm/server/app.py", "knnlm/server/run.py", "knnlm/explorer/routes.py"},
    "pydantic": {"knnlm/server/wire.py", "knnlm/explorer/wire.py"},
    "uvicorn": {"knnlm/server/run.py"},
}
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 450

KNNLM, INDEX = modules("knnlm"), modules("index")
OURS = KNNLM | INDEX


def top(name: str) -> str:
    return name.split(".")[0]


def short(name: str) -> str:
    """`knnlm.lm` is lm, `knnlm.training.text` is training.text; report/ and cli/ are one each."""
    parts = name.split(".")[1:] or ["__init__"]
    return parts[0] if parts[0] in ("report", "cli") else ".".join(parts)


def seen_by(name: str, package: str) -> set[str]:
    return {other for other in imports(OURS[name]) if top(other) == package}


@pytest.mark.parametrize("name", [name for name in KNNLM if short(name) not in ("report", *PACKAGES)])
def test_module_sees_no_module_above_its_level(name):
    assert short(name) in LEVEL_OF, f"{name} has no place in LEVELS yet"
    own = LEVEL_OF[short(name)]
    for other in seen_by(name, "knnlm"):
        if short(other) == "report":
            assert own >= LEVEL_OF["pipeline"], f"{name} imports {other}"
        elif short(other) not in PACKAGES:
            assert LEVEL_OF.get(short(other), own + 1) <= own, f"{name} imports {other}"


def test_package_itself_is_imported_by_nobody_below_the_command_line():
    # `import knnlm` inside knnlm/ would reach every module through its lazy names.
    offenders = {name for name in KNNLM if "knnlm" in imports(KNNLM[name]) and short(name) not in ("cli", "__main__")}
    assert not offenders


def test_levels_are_all_in_use():
    assert {short(name) for name in KNNLM} >= set(LEVEL_OF) - {"__main__"}


def test_imports_have_no_cycle():
    graph = {name: seen_by(name, top(name)) & set(OURS) - {name} for name in OURS if name != "knnlm"}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' -> '.join(error.args[1])}")
    assert len(order) >= len(graph)


@pytest.mark.parametrize("name", [name for name in KNNLM if short(name) == "report"])
def test_report_sees_results_only(name):
    others = {other for other in seen_by(name, "knnlm") if short(other) != "report"}
    assert others <= REPORT_SEES
    assert not imports(KNNLM[name]) & {"index"} and not {top(other) for other in imports(KNNLM[name])} & HEAVY


@pytest.mark.parametrize("name", INDEX)
def test_index_knows_vectors_only(name):
    seen = {top(other) for other in imports(INDEX[name])}
    assert not seen & {"knnlm", "transformers", "datasets", "tests"}
    assert "torch" not in seen or name == "index.int8"


def test_index_is_seen_where_vectors_are_searched_only():
    assert {name for name in KNNLM if seen_by(name, "index")} <= INDEX_SEEN_BY


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


def test_nobody_imports_the_command_line():
    users = {name for name in OURS if "knnlm.cli" in {other[:9] for other in imports(OURS[name])}}
    assert {name for name in users if short(name) not in ("cli", "__main__")} == set()


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
        *("knnlm", "index", "knnlm.report.data", "knnlm.errors", "knnlm.config", "knnlm.places", "knnlm.results"),
        "knnlm.datastore",
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

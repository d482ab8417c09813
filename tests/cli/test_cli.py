"""The command line: its help, what each command prints and writes, and that options arrive where they work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm.cli.entry import _spread
from knnlm.cli.screen import Screen
from tests.damage import rewrite

COMMANDS = ("run", "score", "build", "eval", "info", "verify", "correlate")
WINDOWS = ("--context", "32", "--stride", "16")
SHORT = ("--eval-tokens", "600", "--layers", "*.ffn_input")


@pytest.mark.parametrize(
    ("given", "spread"),
    [
        ("run --text a b --out c", "run --text a --text b --out c"),
        ("run --text a --out c --eval-text d e f", "run --text a --out c --eval-text d --eval-text e --eval-text f"),
        ("eval store --eval-text a b --json", "eval store --eval-text a --eval-text b --json"),
        ("run --text a --text b --k 3", "run --text a --text b --k 3"),
        ("info store", "info store"),
        ("", ""),
    ],
)
def test_texts_may_follow_one_option(given: str, spread: str) -> None:
    assert _spread(given.split()) == spread.split()


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, call) -> None:
    asked = call(command, "--help")
    assert (asked.status, asked.errors) == (0, ())
    assert f"Example: knnlm {command}" in asked.out


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_lists_the_commands(arguments: tuple[str, ...], call) -> None:
    asked = call(*arguments)
    assert asked.status == 0
    assert all(f"\n  {command} " in asked.out for command in COMMANDS)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['knnlm', '--help']\n"
        "from knnlm.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'faiss', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in found.stdout for command in COMMANDS)
    assert found.stdout.strip().splitlines()[-1] == "[]"


# What comes out. `--json`: json.loads takes one document and nothing beside it.


def test_run_prints_a_table_and_writes_both_reports(call, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    done = call("run", "--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out", *WINDOWS, *SHORT)
    assert done.status == 0
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    for row in document["layers"]:
        assert f"{row['perplexity']:.3f}" in done.out
    assert f"Chosen: {document['selected']}" in done.out
    assert done.out.splitlines()[-1] == f"Report: {tmp_path / 'out' / 'report.html'}"
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    assert done.errors[0].startswith("keys of 3 layers x about 6,")


def test_run_as_json_is_the_report(call, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out", *WINDOWS, *SHORT)
    done = call("run", *options, "--json")
    document = json.loads(done.out)
    assert done.status == 0
    assert document == json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"lm", "layers", "selected", "best", "regret", "settings", "versions"} <= set(document)
    assert document["lm"]["perplexity"] > 1
    fields = {"layer", "dispersion", "dispersion_within", "interval", "probe", "perplexity", "k", "lambda"}
    assert all(fields | {"temperature"} <= set(row) for row in document["layers"])
    assert [row["layer"] for row in document["layers"]] == ["0.ffn_input", "1.ffn_input", "2.ffn_input"]


def test_score_writes_nothing_unless_told(
    call, gpt2_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("score", "--model", gpt2_folder, "--text", text_file, *WINDOWS)
    assert done.status == 0
    assert all(f"{block}.{part}" in done.out for block in range(3) for part in ("attn_input", "block_output"))
    assert "final_norm" in done.out
    assert "Chosen: " in done.out
    assert list(tmp_path.iterdir()) == []


def test_score_writes_what_it_prints_as_json(call, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.json"
    done = call("score", "--model", gpt2_folder, "--text", text_file, *WINDOWS, "--out", out, "--json")
    document = json.loads(done.out)
    assert document == json.loads(out.read_text())
    assert len(document["layers"]) == 16
    assert document["selected"] in [row["layer"] for row in document["layers"]]


def test_build_prints_what_it_made(call, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = call("build", "--model", gpt2_folder, "--text", text_file, "--out", store, *WINDOWS, "--json")
    built = json.loads(done.out)
    assert built == json.loads(call("info", store, "--json").out)
    assert (built["folder"], built["model"]) == (str(store), str(gpt2_folder))
    assert (built["context"], built["stride"], built["documents"]) == (32, 16, 22)  # two were kept back
    assert done.errors[-1].startswith("perplexity on ")
    assert list(built["layers"]) == [built["choice"]["layer"]] == list(built["indexes"])
    assert any(built["choice"]["reason"] in line for line in done.errors)


def test_eval_prints_a_table(call, store_folder: Path, text_file: Path) -> None:
    done = call("eval", store_folder, "--eval-text", text_file, "--eval-tokens", 600, "--dry-run")
    assert (done.status, done.errors) == (0, ())
    assert "1.ffn_input" in done.out
    assert "2.ffn_input" in done.out
    assert "13-grams also stand in the datastore" in " ".join(done.out.split())


@pytest.mark.parametrize("command", ["run", "score", "eval"])
def test_show_picks_the_scores_in_the_table(
    command: str, call, gpt2_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    given = ("--model", gpt2_folder, "--text", text_file, *WINDOWS, "--layers", "-1.ffn_input")
    if command != "score":
        given = (*given, "--out", tmp_path / "store", "--eval-tokens", 600)
    if command == "eval":
        assert call("run", *given).status == 0
        given = (tmp_path / "store", "--eval-text", text_file, "--eval-tokens", 600)
    shown = call(command, *given, "--show", "intrinsic_dimension,standardized")
    assert shown.status == 0
    assert "intr. dim." in shown.out and "standardised" in shown.out
    assert "within" not in shown.out.split("Chosen")[0]
    refused = call(command, *given, "--show", "rank")
    assert (refused.status, refused.out, len(refused.errors)) == (2, "", 1)
    assert "'rank' is no score; there are all, dispersion, within" in refused.errors[0]


def test_eval_as_json_and_its_report(call, store_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--eval-text", text_file, "--eval-tokens", 600, "--layers", "-1.ffn_input")
    done = call("eval", store_folder, *options, "--dry-run", "--report", tmp_path / "a" / "b", "--json")
    document = json.loads(done.out)
    assert [row["layer"] for row in document["layers"]] == ["2.ffn_input"]
    assert document == json.loads((tmp_path / "a" / "b" / "report.json").read_text())
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["report.html", "report.json"]


def test_eval_of_a_store_without_scores(call, store_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """As Python code writes it through DatastoreWriter.finish: nothing was chosen, everything else is told."""
    shutil.copytree(store_folder, tmp_path / "copy")
    rewrite(tmp_path / "copy" / "datastore.json", lambda one: one.update(scores=None))
    options = ("--eval-text", text_file, "--eval-tokens", 600, "--report", tmp_path / "report")
    done = call("eval", tmp_path / "copy", *options, "--dry-run")
    assert (done.status, done.errors) == (0, ())
    assert "–" in done.out
    document = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (document["selected"], document["choice"], document["regret"]) == (None, None, None)
    assert document["layers"][0]["dispersion"] is None
    assert document["layers"][0]["perplexity"] > 0
    assert call("info", tmp_path / "copy").status == 0


def test_info_shows_the_datastore(call, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Whatever docs/usage.md promises, of a datastore that `run` made."""
    options = ("--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out", "--index", "IVF4,Flat")
    assert call("run", *options, *WINDOWS, *SHORT).status == 0
    shown, told = call("info", tmp_path / "out"), json.loads(call("info", tmp_path / "out", "--json").out)
    assert (shown.status, shown.errors) == (0, ())
    lines = shown.out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: ")
    assert f"Model: {gpt2_folder}" in lines
    assert f"Keys of each layer: {told['keys']:,} (documents: 22, sources: 1)" in lines
    assert "Windows: 32 tokens, of which 16 are new" in lines
    assert f"Chosen: {told['choice']['reason']}." in lines
    gated = any(one["gate"] for one in told["fitted"].values())
    assert gated == any(line.startswith("λ by query: ") for line in lines)
    assert any(line.startswith("Made with: python ") for line in lines)
    rows = {
        line.split()[0]: line.split()
        for line in lines
        if line.startswith(tuple(f" {name} " for name in told["layers"]))
    }
    assert list(rows) == list(told["layers"])
    for layer, cells in rows.items():
        chosen, index, fitted = layer == told["choice"]["layer"], told["indexes"].get(layer), told["fitted"][layer]
        middle = ["IVF4,Flat", "(l2)", f"{index['recall']:.4f}", f"@{index['k']}"] if index else ["–", "–"]
        ends = [str(fitted["k"]), f"{fitted['lambda']:.3f}", f"{fitted['temperature']:.4g}"]
        size = f"{told['layers'][layer]['bytes'] / 1000:.1f}"
        assert cells == [layer, *["◀", "chosen"][: 2 * chosen], "32", "float16", size, "kB", *middle, *ends]
        keys = (tmp_path / "out" / "parts").glob(f"*/keys/{layer}.npy")
        assert told["layers"][layer]["bytes"] == sum(path.stat().st_size - 128 for path in keys)  # without headers
    assert list(told["indexes"]) == [told["choice"]["layer"]]
    assert told["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_info_of_a_datastore_without_index_and_scores(call, tmp_path: Path) -> None:
    from knnlm.store.writer import DatastoreWriter

    with DatastoreWriter(tmp_path, {"final_norm": 2}, fingerprint={"model": "mine"}, context=8, stride=4) as writer:
        writer.begin_document(0, "text.txt", 1)
        writer.append_values(np.array([1, 2, 3], np.int32))
        writer.append_keys("final_norm", np.eye(3, 2, dtype=np.float32))
        writer.finish()
    lines = call("info", tmp_path).out.splitlines()
    assert ["final_norm", "2", "float16", "12", "bytes", *["–"] * 5] in [line.split() for line in lines]
    assert not any(line.startswith(("Chosen", "Note", "λ by query")) for line in lines)


# Progress

STAGES = {
    "run": (
        "loading the model",
        "extracting keys",
        "pilots and other scores",
        "looking for the evaluation text in the datastore",
        "evaluation text through the model",
        "evaluating",
        "finding examples",
        "indexing",
        "tuning the index",
        "measuring recall",
        "perplexity through the index",
        "writing the report",
    ),
    "build": (
        "loading the model",
        "scoring layers",
        "pilots and other scores",
        "extracting keys",
        "evaluation text through the model",
        "indexing",
        "tuning the index",
        "measuring recall",
        "evaluating",
    ),
    "eval": (
        "loading the model",
        "reading the evaluation text",
        "looking for the evaluation text in the datastore",
        "evaluation text through the model",
        "evaluating",
        "finding examples",
    ),
}
WITHOUT_TOTAL = {
    "loading the model",
    "finding examples",
    "tuning the index",
    "measuring recall",
    "perplexity through the index",
    "writing the report",
}


@pytest.mark.parametrize("command", STAGES)
def test_every_phase_is_shown(
    command: str, call, store_folder: Path, gpt2_folder: Path, text_file: Path, tmp_path: Path, monkeypatch
) -> None:
    """In this order, and with the time left wherever it can be known."""
    stages: dict[str, list[int | None]] = {}

    @contextmanager
    def stage(self: Screen, name: str, unit: str) -> Iterator[Callable[[int, int | None], None]]:
        totals = stages.setdefault(name, [])
        yield lambda done, total: totals.append(total)

    monkeypatch.setattr(Screen, "stage", stage)
    made = ("--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out", "--index", "IVF4,Flat", *WINDOWS)
    options = {
        "run": (*made, "--layers", "2.ffn_input", "--eval-tokens", 600),
        "build": (*made, "--candidates", "2.ffn_input"),
        "eval": (store_folder, "--eval-text", text_file, "--eval-tokens", 600, "--dry-run"),
    }
    assert call(command, *options[command]).status == 0
    assert tuple(stages) == STAGES[command]
    for name, totals in stages.items():
        assert all(total is None for total in totals) if name in WITHOUT_TOTAL else totals and all(totals), name


def test_eval_verifies_first_where_it_is_asked_to(call, store_folder: Path, text_file: Path, tmp_path: Path) -> None:
    asked = ("--eval-text", text_file, "--eval-tokens", 600, "--verify", "--dry-run")
    assert call("eval", store_folder, *asked).status == 0
    shutil.copytree(store_folder, tmp_path / "store")
    keys = next((tmp_path / "store" / "parts").glob("*/keys/1.ffn_input.npy"))
    keys.write_bytes(keys.read_bytes()[:-2] + b"\x01\x02")
    assert call("eval", tmp_path / "store", *asked, "--layers", "2.ffn_input").status == 0
    done = call("eval", tmp_path / "store", *asked)
    assert (done.status, done.out) == (2, "")
    (line,) = done.errors
    assert line.startswith(f"knnlm: {keys} has changed")


NASTY = "x\x1b]0;title\x07\x9b31m\x7f"


def test_control_characters_of_a_manifest_reach_no_terminal(call, store_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(store_folder, tmp_path / "store")
    path = tmp_path / "store" / "datastore.json"

    def nasty(one: dict[str, Any]) -> None:
        one["fingerprint"]["model"] = one["versions"]["torch"] = NASTY
        one["scores"]["choice"]["reason"] = NASTY
        one["indexes"]["2.ffn_input"]["spec"] = NASTY  # in a table

    rewrite(path, nasty)
    done = call("info", tmp_path / "store")
    assert done.status == 0
    assert re.findall(r"[^\n\x20-\x7e\xa0-\uffff]", done.out) == []
    assert done.out.count(r"x\x1b]0;title") == 4
    done = call("info", tmp_path / "store", "--json")
    assert re.findall(r"[^\n\x20-\x7e\xa0-\uffff]", done.out) == []
    assert json.loads(done.out)["model"] == NASTY
    rewrite(path, lambda one: one["layers"].update({NASTY: None}))
    done = call("info", tmp_path / "store")
    assert (done.status, len(done.errors)) == (2, 1)
    assert done.errors[0].isprintable()


def test_verify_says_whole(call, store_folder: Path) -> None:
    done = call("verify", store_folder)
    assert (done.status, done.out, done.errors) == (0, f"{store_folder} is whole\n", ())
    document = json.loads(call("verify", store_folder, "--json").out)
    assert document == {"store": str(store_folder), "whole": True, "problems": []}


def test_verify_names_what_is_damaged(call, store_folder: Path, tmp_path: Path) -> None:
    """One byte in the keys, and one in the index: both are named, and the status is 2."""
    store = tmp_path / "[a] store"  # square brackets are markup to rich
    shutil.copytree(store_folder, store)
    keys = next((store / "parts").glob("*/keys/1.ffn_input.npy"))
    index = store / "index" / "2.ffn_input" / "index.json"
    keys.write_bytes(keys.read_bytes()[:-1] + b"\x01")
    index.write_text("{}")
    done = call("verify", store)
    assert done.status == 2
    assert [str(path) in line for path, line in zip((keys, index), done.out.splitlines(), strict=True)] == [True, True]
    done = call("verify", store, "--json")
    document = json.loads(done.out)
    assert (done.status, document["whole"], len(document["problems"])) == (2, False, 2)


DAMAGE = {
    "parts/*/keys/1.ffn_input.npy": (b"cut", ("1.ffn_input.npy cannot be read", "values.npy is missing")),
    "parts/*/part.json": (b"{}", ("part.json cannot be read",)),
    "datastore.json": (b'{"format": "knnlm-datastore", "version": 2}', ("datastore.json is damaged",)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_names_all_that_keeps_a_datastore_from_being_opened(
    name: str, call, store_folder: Path, tmp_path: Path
) -> None:
    content, words = DAMAGE[name]
    shutil.copytree(store_folder, tmp_path / "store")
    next((tmp_path / "store" / "parts").glob("*/values.npy")).unlink()
    next((tmp_path / "store").glob(name)).write_bytes(content)
    done = call("verify", tmp_path / "store", "--json")
    document = json.loads(done.out)
    assert (done.status, done.errors) == (2, ())
    assert (document["store"], document["whole"]) == (str(tmp_path / "store"), False)
    assert len(document["problems"]) == len(words)
    assert all(any(word in problem for problem in document["problems"]) for word in words)


# Options


def test_options_arrive(call, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    given = {
        "--layers": "*.ffn_input,final_norm",
        "--candidates": "*.ffn_input",
        "--select": "0.ffn_input",
        "--k": 7,
        "--temperature": 2.5,
        "--lambda": 0.25,
        "--metric": "cosine",
        "--index": "IVF4,Flat",
        "--context": 24,
        "--stride": 8,
        "--max-tokens": 3000,
        "--eval-tokens": 500,
        "--dtype": "float32",
        "--device": "cpu",
        "--batch-size": 3,
        "--key-dtype": "float32",
        "--seed": 5,
    }
    pairs = [part for pair in given.items() for part in pair]
    done = call("run", "--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out", *pairs, "--json")
    document = json.loads(done.out)
    settings = document["settings"]
    names = {name.removeprefix("--").replace("-", "_"): value for name, value in given.items()}
    renamed = {"lam": names.pop("lambda"), "dtype": f"torch.{names.pop('dtype')}", "windows": names.pop("batch_size")}
    assert {name: settings[name] for name in names | renamed} == names | renamed
    assert {(row["k"], row["temperature"], row["lambda"]) for row in document["layers"]} == {(7, 2.5, 0.25)}
    assert (document["selected"], document["choice"]["candidates"]) == (
        "0.ffn_input",
        ["0.ffn_input", "1.ffn_input", "2.ffn_input"],
    )
    assert (document["index"]["layer"], document["index"]["spec"]) == ("0.ffn_input", "IVF4,Flat")
    stored = json.loads(call("info", tmp_path / "out", "--json").out)
    assert stored["layers"]["final_norm"]["dtype"] == "float32"
    assert stored["keys"] < 3000


def test_several_texts_after_one_option(call, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("The ward is quiet at night, and the nurse reads what was written. " * 20)
    done = call(
        "build", "--model", gpt2_folder, "--text", text_file, tmp_path / "more.txt", "--out", tmp_path / "s", *WINDOWS
    )
    assert done.status == 0, done.errors
    assert json.loads(call("info", tmp_path / "s", "--json").out)["sources"] == 2


def test_overwrite_replaces_what_knnlm_made(call, store_folder: Path, gpt2_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(store_folder, store)
    (tmp_path / "other.txt").write_text("The ward is quiet at night, and the nurse reads what was written. " * 20)
    options = ("--text", tmp_path / "other.txt", "--layers", "0.ffn_input", *WINDOWS)
    done = call("build", "--model", gpt2_folder, "--out", store, *options, "--overwrite")
    assert done.status == 0, done.errors
    assert list(json.loads(call("info", store, "--json").out)["layers"]) == ["0.ffn_input"]
    assert not (store / "keys" / "1.ffn_input").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "store"]

"""The study of the choice of a layer: its search against float64 distances, its rules by hand, and a whole case."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.source_files import ROOT
from tests.tiny_models import BLOCKS, save_tiny

TOKENS, CLUSTERS = 400, 20
LAYERS = ("0.attn_input", "0.ffn_input", "1.ffn_input", "2.ffn_input", "3.ffn_input")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch):
    """Imports a study script."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "studies"))
    return importlib.import_module


def write_case(folder: Path, losses: dict[str, float], pilots: dict[str, float], dispersion: dict[str, float]) -> Path:
    """A case whose layers lose that much on every token of the second half of the text, and 1 less on the first."""
    folder.mkdir()
    tuning = np.arange(TOKENS) < TOKENS // 2
    clusters = np.arange(TOKENS) * CLUSTERS // TOKENS
    # Clusters differ, and by less than layers do.
    wobble = 1e-3 * np.sin(np.arange(TOKENS))
    common = {"lm": np.full(TOKENS, -4.0), "tuning": tuning, "fitting": ~tuning, "clusters": clusters}
    np.savez(folder / "common.npz", keys=1000, **common)
    for name, loss in losses.items():
        of_token = loss + wobble - tuning
        np.savez(folder / f"layer-{name}.npz", losses=of_token, tuning_loss=loss - 1, swapped_loss=loss)
    np.savez(folder / "pilots.npz", cluster=clusters, **{name: loss + wobble for name, loss in pilots.items()})
    scores = [{"layer": name, "dispersion": value, "probe": 0.1} for name, value in dispersion.items()]
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


def numbers(*values: float) -> dict[str, float]:
    return dict(zip(LAYERS, values, strict=True))


def test_regret_compares_with_the_layer_that_is_best_on_the_other_half(tmp_path: Path, study) -> None:
    """`0.attn_input` is best on the first half and `0.ffn_input` on the second, so each is compared on the other."""
    folder = write_case(tmp_path / "case", numbers(3, 3.1, 4, 4, 4), numbers(4, 4, 4, 4, 4), numbers(1, 1, 1, 1, 1))
    tuning = np.arange(TOKENS) < TOKENS // 2
    for name, sign in (("0.attn_input", 1), ("0.ffn_input", -1)):
        found = dict(np.load(folder / f"layer-{name}.npz"))
        of_token = 3 + np.where(tuning, -0.2, 0.2) * sign
        found |= {"losses": of_token, "tuning_loss": of_token[0], "swapped_loss": of_token[-1]}
        np.savez(folder / f"layer-{name}.npz", **found)
    case = study("layer_rules").read_case(folder, all_keys=True)
    # On the first half 0.ffn_input serves as the best (3.2), on the second 0.attn_input (3.2).
    assert case.regret("3.ffn_input")[0] == pytest.approx(math.expm1((3 + 4) / 2 - 3.2), abs=1e-3)
    assert case.regret("0.attn_input")[0] == pytest.approx(math.expm1(3.0 - 3.2), abs=1e-3)


def test_each_rule_takes_what_it_says(tmp_path: Path, study, capsys: pytest.CaptureFixture[str]) -> None:
    losses, pilots = numbers(3.5, 3.4, 3.3, 3.2, 3.1), numbers(3.9, 3.05, 3.4, 3.3, 3.2)
    folder = write_case(tmp_path / "case", losses, pilots, numbers(0.9, 0.8, 0.6, 0.7, 0.69))
    rules = study("layer_rules")
    assert rules.read_case(folder, all_keys=True).choices() == {
        "dispersion, upper half": "2.ffn_input",
        "deepest within 5 % of it": "3.ffn_input",
        "probe, all layers": "0.attn_input",
        "pilot, all layers": "0.ffn_input",
        "pilot, `ffn_input`": "0.ffn_input",
        "judge of dispersion": "0.ffn_input",
        "judge of the deepest within 5 %": "0.ffn_input",
        "deepest as good as the best pilot": "0.ffn_input",
        "judge of the last `ffn_input`": "0.ffn_input",
        "the last `ffn_input`, unless a pilot is better": "0.ffn_input",
        "the last `ffn_input`": "3.ffn_input",
    }
    rules_printed = printed(rules, folder, capsys, "--all-keys")
    assert "| the last `ffn_input` | +0.00% | +0.00% | 0 of 1 |" in rules_printed
    assert "| pilot, all layers | +34.99% | +34.99% | 1 of 1 |" in rules_printed


def test_the_judge_keeps_what_is_proposed_unless_another_is_better_beyond_the_interval(tmp_path: Path, study) -> None:
    folder = write_case(
        tmp_path / "case", numbers(3, 3, 3, 3, 3), numbers(3.9, 3.05, 3.4, 3.3, 3.2), numbers(0.9, 0.8, 0.6, 0.7, 0.5)
    )
    case = study("layer_rules").read_case(folder, all_keys=True)
    case.pilots["0.ffn_input"] = 3.05 + np.random.default_rng(0).normal(0, 8, CLUSTERS)[case.cluster]
    case.pilots["0.ffn_input"] += 3.05 - case.pilots["0.ffn_input"].mean()
    assert case.judged("2.ffn_input", LAYERS) == "3.ffn_input"  # the noisy one has the lowest mean, and is left
    assert case.judged("3.ffn_input", LAYERS) == "3.ffn_input"
    assert case.deepest(LAYERS[1:]) == "3.ffn_input"


def test_a_layer_that_was_not_evaluated_is_said_and_not_counted(
    tmp_path: Path, study, capsys: pytest.CaptureFixture[str]
) -> None:
    pilots, dispersion = numbers(3.9, 3.05, 3.4, 3.3, 3.2), numbers(0.9, 0.8, 0.6, 0.7, 0.69)
    folder = write_case(tmp_path / "case", numbers(3.5, 3.4, 3.3, 3.2, 3.1), pilots, dispersion)
    (folder / "layer-0.ffn_input.npz").unlink()
    told = printed(study("layer_rules"), folder, capsys, "--all-keys")
    assert "| case | pilot, all layers | 0.ffn_input | (not evaluated) | | |" in told
    assert "\n| pilot, all layers |" not in told
    assert "\n| dispersion, upper half |" in told


def printed(rules: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    sys.argv = ["layer_rules.py", str(folder), *options]
    rules.main()
    return capsys.readouterr().out


def test_search_finds_the_nearest_of_all_keys(study) -> None:
    keys, queries, k = torch.randn(403, 16), torch.randn(300, 16), 24
    found = study("layer_pilots")._blocks(keys, queries, k)
    distances, ids = (torch.cat(column).numpy() for column in zip(*found, strict=True))
    exact = ((queries.double()[:, None] - keys.double()) ** 2).sum(2).numpy()
    assert np.array_equal(ids, np.argsort(exact, axis=1)[:, :k])
    assert np.allclose(distances, np.sort(exact, axis=1)[:, :k], atol=1e-4)


def test_a_case_has_all_layers_scored_and_goes_on_where_it_was_stopped(
    tmp_path: Path, study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole case on a random model, stopped at its second layer; smaller stores lie in larger ones."""
    pilots, sizes = study("layer_pilots"), study("layer_sizes")
    text, out, svg = tmp_path / "text.jsonl", tmp_path / "case", tmp_path / "sizes.svg"
    documents = [" ".join(f"{number * place % 97}" for place in range(120)) for number in range(1, 60)]
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    rows, passes = {}, []
    real = {name: getattr(pilots, name) for name in ("nested_rows", "make_store", "fitted")}

    def stop(search, queries):
        if len(list(out.glob("layer-*"))) == 1:
            raise KeyboardInterrupt
        return real["fitted"](search, queries)

    monkeypatch.setattr(
        pilots, "nested_rows", lambda store, size: rows.setdefault(size, real["nested_rows"](store, size))
    )
    monkeypatch.setattr(pilots, "make_store", lambda *args: passes.append(args) or real["make_store"](*args))
    options = ["--layers", "*.ffn_input,final_norm", "--keys", "3000", "--eval-tokens", "400", "--sizes", "300", "1000"]
    model = save_tiny("llama", tmp_path / "model")
    words = ["--model", str(model), "--text", str(text), "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", ["layer_pilots.py", *words])
    monkeypatch.setattr(pilots, "fitted", stop)
    with pytest.raises(KeyboardInterrupt):
        pilots.main()
    monkeypatch.setattr(pilots, "fitted", real["fitted"])
    pilots.main()
    assert len(passes) == 1
    assert len(set(rows[300])) == 300
    assert set(rows[300]) < set(rows[1000])
    assert {path.name for path in out.glob("layer-*")} == {
        *(f"layer-{block}.ffn_input.npz" for block in range(BLOCKS)),
        "layer-final_norm.npz",
    }
    assert len(json.loads((out / "scores.json").read_text())) == 5 * BLOCKS + 1
    assert not (out / "store").exists()
    sample = study("layer_sample")
    monkeypatch.setattr(sys, "argv", ["layer_sample.py", "--model", str(model), str(out)])
    sample.main()
    assert "| case | the last `ffn_input`, unless a pilot is better |" in printed(study("layer_rules"), out, capsys)
    assert len(json.loads((out / "sample" / "scores.json").read_text())) == 5 * BLOCKS + 1
    monkeypatch.setattr(sys, "argv", ["layer_sizes.py", str(out), "--out", str(svg)])
    sizes.main()
    assert svg.read_text().count("<polyline") == 3
    scored = (out / "scores.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["layer_pilots.py", *words, "--layers", "*.ffn_input,0.attn_input,final_norm"])
    pilots.main()
    assert (out / "layer-0.attn_input.npz").exists()
    assert (out / "scores.json").read_bytes() == scored

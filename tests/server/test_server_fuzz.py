"""Some 150 requests that schemathesis makes up; `scripts/fuzz_server STORE` sends 10,000."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.server_process import LAMBDA, LAYER, TEMPERATURE, K
from tests.source_files import ROOT


def test_no_request_is_answered_with_a_mistake_of_the_server(store_folder: Path) -> None:
    setting = ("--layer", LAYER, "--k", K, "--temperature", TEMPERATURE, "--lambda", LAMBDA)
    words = [sys.executable, ROOT / "scripts" / "benchmarks" / "fuzz.py", store_folder, "--requests", 150, *setting]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^round \d: (\{.*\}), \d+ MB$", done.stdout, re.MULTILINE)
    counts = [ast.literal_eval(line) for line in lines]
    assert len(counts) == 2 and sum(counts[-1].values()) >= 150
    assert {"200", "400", "404"} <= counts[-1].keys() <= {"200", "400", "404", "405", "409", "413", "429"}
    assert counts[1]["200"] > counts[0]["200"]  # with the model's name, completions are made

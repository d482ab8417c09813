"""The quick form of the campaign that `scripts/torture` runs: it finds no fault, and would tell of one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.source_files import ROOT

CAMPAIGN = ROOT / "scripts" / "reliability"


def test_quick_campaign_finds_no_fault() -> None:
    words = [sys.executable, str(CAMPAIGN / "torture.py"), "--quick", "--only", "kills,flips,documents"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("killed", "flip in", "damaged datastore.json"):
        assert part in done.stdout


@pytest.mark.parametrize(("outcome", "faults"), [("silent change", 1), ("traceback", 1), ("refused", 0)])
def test_a_fault_is_counted(monkeypatch: pytest.MonkeyPatch, outcome: str, faults: int) -> None:
    monkeypatch.syspath_prepend(str(CAMPAIGN))
    from damages import report
    from forks import Ended
    from tally import Tally

    tally = Tally()
    told = f'{{"part": "keys", "outcome": ["{outcome}", "x"]}}\n'
    report(Ended(0, told, 1.0), "flip in {}", ["a flip"], tally)
    assert len(tally.told) == faults
    report(Ended(-11, "", 1.0), "flip in {}", ["a flip"], tally)
    assert "crashes" in tally.told[-1]

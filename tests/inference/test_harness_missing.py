"""What `knnlm lm-eval` says where lm-eval is not installed."""

from __future__ import annotations

import subprocess
import sys

from tests.source_files import ROOT

WITHOUT = (
    "import sys; sys.modules['lm_eval'] = None; sys.argv = ['knnlm', 'lm-eval', '--help']; import knnlm.cli as cli"
)


def test_one_line_says_how_to_install_lm_eval() -> None:
    words = [sys.executable, "-c", f"{WITHOUT}; cli.main()"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "knnlm: lm-eval needs lm_eval, which is not installed; pip install '.[eval]'\n"

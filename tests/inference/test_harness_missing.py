"""What is said where lm-eval is not installed."""

from __future__ import annotations

import sys

import pytest

import knnlm
import knnlm.inference

LINE = "lm-eval needs lm_eval, which is not installed; pip install '.[eval]'"


@pytest.fixture(autouse=True)
def _without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "knnlm.inference.harness", raising=False)
    monkeypatch.delattr(knnlm.inference, "harness", raising=False)


def test_one_line_says_how_to_install_lm_eval(call) -> None:
    refused = call("lm-eval", "--help")
    assert (refused.status, refused.out, refused.errors) == (2, "", (f"knnlm: {LINE}",))


def test_registration_says_so_each_time() -> None:
    for _ in range(2):
        with pytest.raises(knnlm.InputError) as raised:
            knnlm.register_lm_eval()
        assert str(raised.value) == LINE

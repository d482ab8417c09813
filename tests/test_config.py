"""Settings that cannot be are one line, when they are made."""

from __future__ import annotations

import numpy as np
import pytest

from knnlm.config import EvalConfig, KNNConfig
from knnlm.errors import InputError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "`k` is 0, but must be a whole number of at least 1"),
        ({"k": 2.5}, "`k` is 2.5, but must be a whole number of at least 1"),
        ({"k": True}, "`k` is True, but must be a whole number of at least 1"),
        ({"max_k": 0}, "`max_k` is 0, but must be a whole number of at least 1"),
        ({"max_k": None}, "`max_k` is None, but must be a whole number of at least 1"),
        ({"max_k": 64.0}, "`max_k` is 64.0, but must be a whole number of at least 1"),
        ({"temperature": float("inf")}, "`temperature` is inf, but must be a finite number above 0"),
    ],
)
def test_knn_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        KNNConfig(**settings)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("examples", [-1, 1.5])
def test_examples_that_cannot_be(examples: float) -> None:
    with pytest.raises(InputError, match=f"`examples` is {examples}, but must be a whole number of at least 0"):
        EvalConfig(examples=examples)  # type: ignore[arg-type]


def test_settings_that_can_be() -> None:
    assert KNNConfig(k=np.int64(7), max_k=1, temperature=1e-300).search_k == 7
    assert EvalConfig(examples=0).examples == 0

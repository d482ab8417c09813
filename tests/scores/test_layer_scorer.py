"""Layers are scored at the same time, and what scores share is computed once for each."""

from __future__ import annotations

from threading import Barrier

import numpy as np
import pytest
import torch

from knnlm.scores import layer_scorer
from knnlm.scores.dispersion import Span
from knnlm.scores.layer_scorer import LayerScorer


def test_two_layers_are_searched_at_the_same_time_and_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """`functools.cached_property` of Python 3.11 has one lock for all objects, so the layers had waited in line."""
    search, both, searched = layer_scorer.search_sample, Barrier(2), []

    def meeting(sample, **options):
        searched.append(sample)
        both.wait(timeout=30)
        return search(sample, **options)

    monkeypatch.setattr(layer_scorer, "search_sample", meeting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    scorer = LayerScorer({"0.ffn_input": 4, "1.ffn_input": 4})
    scorer.begin_batch([Span(0, 0, 20, 0), Span(1, 0, 20, 1)], [np.arange(20), np.arange(20)])
    vectors = torch.randn(2, 2, 20, 4)
    for name, vectors_BTD in zip(("0.ffn_input", "1.ffn_input"), vectors, strict=True):
        scorer.receive(name, vectors_BTD)
    scores = scorer.scores(only=("interval", "probe", "probe_interval"))
    assert [one.layer for one in scores] == ["0.ffn_input", "1.ffn_input"]
    assert len(searched) == 2

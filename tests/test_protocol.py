"""The windows of neulab/knn-transformers, against its procedure written again from peers.md section 6."""

from __future__ import annotations

import numpy as np
import pytest

from knnlm.windows import TokenDocument, WindowConfig, rows_to_groups, windows

IGNORED = -100


def their_windows(rows: list[list[int]], block: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """(input ids, labels) of every window, as group_texts makes them, without the padding on the right."""
    found = []
    for first in range(0, len(rows), 1000):
        tokens = [token for row in rows[first : first + 1000] for token in row]
        total = len(tokens) // block * block if len(tokens) >= block else len(tokens)
        for i in range(0, total, stride):
            begin, end = max(i + stride - block, 0), min(i + stride, total)
            labels = [IGNORED] * (end - begin - (end - i)) + tokens[i:end]
            found.append((tokens[begin:end], labels))
    return found


@pytest.mark.parametrize(("block", "stride"), [(16, 8), (12, 4), (16, 16), (10, 4), (6, 1)])
def test_windows_and_targets_are_theirs(block: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 99, size=rng.integers(1, 9)).tolist() for _ in range(2003)]
    config = WindowConfig(block, stride, "knn-transformers")
    documents = (TokenDocument(np.array(row, np.int32), "rows", i) for i, row in enumerate(rows))
    ours = [
        (window.inputs.tolist(), [IGNORED] * window.first + window.targets[window.first :].tolist())
        for window in windows(rows_to_groups(documents, config), config)
    ]
    theirs = [(ids[:-1], labels[1:]) for ids, labels in their_windows(rows, block, stride)]
    assert [pair for pair in ours if pair[0]] == [pair for pair in theirs if pair[0]]


def test_counted_targets_per_window() -> None:
    """511 in a group's first window, whose first token has no predecessor; 512 in the others."""
    config = WindowConfig(1024, 512, "knn-transformers")
    groups = rows_to_groups([TokenDocument(np.arange(3000, dtype=np.int32), "rows", 1)], config)
    counted = [len(window.targets) - window.first for window in windows(groups, config)]
    assert counted == [511, 512, 512, 512]

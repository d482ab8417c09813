"""Values of several parts as one array: loaded while they are small, then mapped, with the same numbers."""

from __future__ import annotations

import shutil

import numpy as np

from knnlm.pipeline import remove
from knnlm.store import datastore, joined
from knnlm.store.datastore import Datastore


def is_mapped(array: np.ndarray) -> bool:
    return isinstance(array, np.memmap) or (isinstance(array.base, np.ndarray) and is_mapped(array.base))


def test_many_values_are_mapped_and_the_same(monkeypatch, tmp_path, store_folder):
    shutil.copytree(store_folder, tmp_path / "store")
    whole = Datastore.open(tmp_path / "store")
    name, number = whole.sources[0], int(whole.documents[3, 3])
    store = remove(whole, [(name, number)])
    first, last = whole.documents[3:5, 0]
    expected = np.delete(whole.values, np.s_[first:last])
    for most, mapped in ((1 << 30, False), (64, True)):
        for module in (joined, datastore):
            monkeypatch.setattr(module, "LOADED_BYTES", most)
        again = Datastore.open(store.folder)
        assert np.array_equal(again.values, expected) and is_mapped(again.values) is mapped
        assert again.loaded_bytes == min(most, 4 * len(expected)) and not again.values.flags.writeable

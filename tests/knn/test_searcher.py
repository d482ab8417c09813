"""The cached search of an evaluation: layer by layer, in bounded memory."""

from __future__ import annotations

import numpy as np

from knnlm.knn.searcher import open_searcher
from knnlm.store.datastore import Datastore
from knnlm.store.writer import DatastoreWriter
from tests.vector_index.test_mapped import file_bytes_in_memory, linux

LAYERS, COUNT, DIM = ("a", "b", "c", "d"), 16_384, 256


@linux
def test_keys_of_one_layer_are_in_memory_at_a_time(tmp_path):
    rng = np.random.default_rng(0)
    with DatastoreWriter(tmp_path, dict.fromkeys(LAYERS, DIM), fingerprint={}, context=8, stride=4) as writer:
        writer.begin_document(0, "text", 1)
        writer.append_values(rng.integers(0, 50, COUNT))
        for layer in LAYERS:
            writer.append_keys(layer, rng.standard_normal((COUNT, DIM), np.float32))
        writer.finish()
    store, layer_bytes = Datastore.open(tmp_path), COUNT * DIM * 2
    queries_QD, targets_Q = rng.standard_normal((4, DIM), np.float32), np.zeros(4, np.int32)
    before = file_bytes_in_memory()
    for layer in LAYERS:
        searcher = open_searcher(store, layer, "l2")
        once, again = (searcher.cached(queries_QD, targets_Q, 8) for _ in range(2))
        np.testing.assert_array_equal(once.distances_QK, again.distances_QK)
    assert file_bytes_in_memory() - before < layer_bytes

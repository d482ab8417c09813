"""Datastores of any size for a model of a usual size, in minutes.

Legend: N keys, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from extraction import documents
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel

from knnlm.collect import collect
from knnlm.config import Settings, TextConfig
from knnlm.datastore import Datastore, DatastoreWriter
from knnlm.indexing import index_layer
from knnlm.lm import LanguageModel, load_model
from knnlm.plan import window_config

# Keys that the model makes; the others are these again, with noise.
OWN_KEYS, BLOCK = 8192, 1 << 16


def small_gpt2(tokenizer_of: str, folder: Path) -> LanguageModel:
    """GPT-2 small (12 blocks x 768, 124M parameters) with random weights, which cost what others cost."""
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    load_model(tokenizer_of).tokenizer.save_pretrained(folder)
    return load_model(str(folder), dtype="float32")


def enlarged_store(
    lm: LanguageModel, text: Sequence[Path], folder: Path, layer: str, count: int, settings: Settings
) -> Datastore:
    """So many keys of one layer, indexed: the model's own, and these again, each with a tenth of their deviation."""
    own_ND, tokens_N = _own_keys(lm, text, folder.with_name(f"{folder.name}-own"), layer)
    deviation_D, rng = own_ND.std(axis=0) / 10, np.random.default_rng(0)
    config = window_config(lm, TextConfig())
    folder.mkdir()
    with DatastoreWriter(folder, {layer: lm.dims[layer]}) as writer:
        writer.begin_document(int(tokens_N[0]), "enlarged", 0)
        for start in range(0, count, BLOCK):
            rows = np.arange(start, min(count, start + BLOCK)) % len(own_ND)
            noise_ND = rng.standard_normal((len(rows), len(deviation_D)), np.float32) * deviation_D
            writer.append_keys(layer, own_ND[rows] + noise_ND)
            writer.append_values(tokens_N[rows])
        writer.finish(fingerprint=lm.fingerprint, context=config.context, stride=config.stride)
    store = Datastore.open(folder)
    index_layer(store, layer, settings)
    return Datastore.open(folder)


def _own_keys(
    lm: LanguageModel, text: Sequence[Path], folder: Path, layer: str
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    config = window_config(lm, TextConfig())
    folder.mkdir()
    with DatastoreWriter(folder, {layer: lm.dims[layer]}) as writer:
        collect(lm, documents(lm, text, OWN_KEYS), config, [layer], writer=writer)
        writer.finish(fingerprint=lm.fingerprint, context=config.context, stride=config.stride)
    store = Datastore.open(folder)
    return store.keys(layer).read(0, store.count), store.values[: store.count]

"""A model of GPT-2 small's size with realistic keys, and datastores of any size for it, made in minutes.

Legend: N keys, D dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from extraction import documents
from numpy.typing import NDArray
from repeats import repeated
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from knnlm.config import Settings, TextConfig
from knnlm.extraction.collect import collect
from knnlm.knn.indexing import index_layer
from knnlm.layer_names import select_layers
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.store.datastore import Datastore
from knnlm.store.writer import DatastoreWriter
from knnlm.text.windows import window_config

NARROW = Path(__file__).parent.parent / "demo_data" / "model"
# GPT-2 small against the demo's model: factor of the width, additional blocks, vocabulary.
COPIES, MORE_BLOCKS, VOCABULARY = 4, 4, 50_257
LAYER = "-1.ffn_input"
# Keys that the model makes; beyond, they are these again, with noise.
OWN_KEYS = 1 << 20


def wide_gpt2(folder: Path) -> LanguageModel:
    """GPT-2 small (12 blocks x 768, 124M parameters) with the vectors and logits of the demo's model.

    Each unit stands there four times, and what reads it gives each copy a quarter of the weight (Net2Net, Chen et al.
    2016, arXiv 1511.05641). Blocks that add nothing come first; tokens that do not occur have logit 0 and take some of
    the probability. Random weights would cost as much, but their keys have no structure for a search to use.
    """
    narrow = load_model(str(NARROW), dtype="float32")
    wide = GPT2LMHeadModel(_wide_config(narrow.model.config))
    wide.load_state_dict(_wide_weights(narrow.model.state_dict(), wide.state_dict()))
    wide.save_pretrained(folder)
    narrow.tokenizer.save_pretrained(folder)
    return load_model(str(folder), dtype="float32")


def _wide_config(narrow: GPT2Config) -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=COPIES * narrow.n_embd,
        n_head=COPIES * narrow.n_head,
        n_layer=MORE_BLOCKS + narrow.n_layer,
        n_positions=narrow.n_positions,
        bos_token_id=narrow.bos_token_id,
        eos_token_id=narrow.eos_token_id,
    )


def _wide_weights(narrow: Mapping[str, Tensor], wide: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The wide model's own tensors filled anew; those of the first blocks add nothing where they are zeros."""
    weights = {name: torch.zeros_like(tensor) for name, tensor in wide.items()}
    for name, tensor in narrow.items():
        parts = name.split(".")
        if parts[1] == "h":
            parts[2] = str(int(parts[2]) + MORE_BLOCKS)
        widened = _copied(name, tensor)
        weights[".".join(parts)][: len(widened)] = widened
    return weights


def _copied(name: str, tensor: Tensor) -> Tensor:
    """Embeddings [tokens, D], weights [in, out] or biases [out]; those of query, key and value lie side by side."""
    if name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")):
        return tensor.repeat(1, COPIES)
    thirds = tensor.chunk(3, dim=-1) if "c_attn" in name else (tensor,)
    if tensor.ndim == 2:
        return torch.cat([third.repeat(COPIES, COPIES) / COPIES for third in thirds], dim=-1)
    # What the LM head reads: its rows, the embeddings, are not divided.
    share = COPIES if "ln_f" in name else 1
    return torch.cat([third.repeat(COPIES) / share for third in thirds])


def enlarged_store(lm: LanguageModel, text: Sequence[Path], folder: Path, count: int, settings: Settings) -> Datastore:
    """So many keys of the wide model's last ffn_input, indexed: of the text, and beyond these again.

    The narrow model makes them, a quarter of each.
    """
    own_ND, tokens_N = _own_keys(text, folder.with_name(f"{folder.name}-own"), count)
    (layer,) = select_layers(LAYER, lm.layer_names)
    config = window_config(TextConfig(), lm.name, lm.context_limit)
    folder.mkdir()
    with DatastoreWriter(
        folder, {layer: lm.dims[layer]}, fingerprint=lm.fingerprint, context=config.context, stride=config.stride
    ) as writer:
        writer.begin_document(int(tokens_N[0]), "enlarged", 0)
        for start, rows_ND in repeated(own_ND, count):
            writer.append_keys(layer, np.tile(rows_ND, COPIES))
            writer.append_values(tokens_N[np.arange(start, start + len(rows_ND)) % len(tokens_N)])
        writer.finish()
    store = Datastore.open(folder)
    index_layer(store, layer, settings)
    return Datastore.open(folder)


def _own_keys(text: Sequence[Path], folder: Path, count: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    lm = load_model(str(NARROW), dtype="float32")
    (layer,) = select_layers(LAYER, lm.layer_names)
    config = window_config(TextConfig(), lm.name, lm.context_limit)
    folder.mkdir()
    with DatastoreWriter(
        folder, {layer: lm.dims[layer]}, fingerprint=lm.fingerprint, context=config.context, stride=config.stride
    ) as writer:
        collect(lm, documents(lm, text, min(count, OWN_KEYS)), config, [layer], writer=writer)
        writer.finish()
    store = Datastore.open(folder)
    keys = store.keys(layer)
    return keys.read(0, store.count) + keys.centre, store.values[: store.count]

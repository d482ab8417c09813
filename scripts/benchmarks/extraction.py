"""Extraction, scoring and storing against the bare forward pass, and against a straightforward implementation.

Legend: B batch, T time, N tokens, D dimension, L layers.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from ratios import Row, speed_ratios

from knnlm.config import Settings
from knnlm.extraction.collect import collect
from knnlm.extraction.sinks import TargetScorer
from knnlm.layer_names import split
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.scores.layer_scorer import LayerScorer
from knnlm.store.writer import DatastoreWriter
from knnlm.text.corpus import read_documents, tokenize
from knnlm.text.held_out import take_slices
from knnlm.text.windows import Batch, TokenDocument, batches, count_targets, window_config, windows

TEXT = Settings().text
# Rows of the distance matrix computed at a time in the straightforward implementation.
_PAIR_ROWS = 1024


def rows(model: str, text: Sequence[Path], *, tokens: int, rounds: int) -> Iterator[Row]:
    """All lines about extraction, on `tokens` tokens."""
    lm = load_model(model, dtype="float32")
    docs = documents(lm, text, tokens)
    about = {"tokens": float(count_targets(docs))}
    yield from _one_layer(lm, docs, rounds, about)
    layers = lm.layer_names
    ratios = speed_ratios(lambda: extract(lm, docs, layers), lambda: bare_forward(lm, docs), rounds)
    yield Row("extract and score, all layers and parts", "the bare forward pass", ratios, 0.90, about)
    ratios = speed_ratios(lambda: stored(lm, docs, layers), lambda: bare_forward(lm, docs), rounds)
    yield Row("extract, score and store, all layers and parts", "the bare forward pass", ratios, 0.75, about)
    blocks = [name for name in layers if name.endswith("block_output")]
    ratios = speed_ratios(lambda: extract(lm, docs, blocks), lambda: by_hand(lm, docs), min(rounds, 3))
    against = "output_hidden_states, LM head, NumPy, all pairs"
    yield Row("extract and score, the same layers", against, ratios, 2.0, about)
    yield _low_precision(model, docs, rounds)


def documents(lm: LanguageModel, text: Sequence[Path], tokens: int) -> list[TokenDocument]:
    """Documents with `tokens` tokens, from all of the text."""
    return take_slices(tokenize(read_documents(text), lm.encode), tokens, seed=0)


def _one_layer(
    lm: LanguageModel, docs: Sequence[TokenDocument], rounds: int, about: dict[str, float | str]
) -> Iterator[Row]:
    depth = count_blocks(lm)
    for blocks in (depth, depth // 2):
        name, short = f"{blocks - 1}.block_output", truncated(lm, blocks)
        ratios = speed_ratios(
            lambda n=name: extract(lm, docs, [n], score=False), lambda m=short: bare_forward(m, docs), rounds
        )
        yield Row(f"extract {name}", f"the bare forward pass of {blocks} of {depth} blocks", ratios, 0.95, about)


def _low_precision(model: str, docs: Sequence[TokenDocument], rounds: int) -> Row:
    """A bfloat16 checkpoint with `--dtype auto`, against float32."""
    with tempfile.TemporaryDirectory() as folder:
        full = load_model(model, dtype="float32")
        copy.deepcopy(full.model).to(torch.bfloat16).save_pretrained(folder)
        full.tokenizer.save_pretrained(folder)
        auto, single = load_model(folder), load_model(folder, dtype="float32")
    ratios = speed_ratios(lambda: bare_forward(auto, docs), lambda: bare_forward(single, docs), rounds)
    moved = perplexity(auto, docs) / perplexity(single, docs) - 1
    figures: dict[str, float | str] = {"taken": str(auto.dtype).removeprefix("torch."), "perplexity moved": moved}
    return Row("forward pass of a bfloat16 checkpoint, --dtype auto", "float32", ratios, 0.95, figures)


def perplexity(lm: LanguageModel, docs: Sequence[TokenDocument]) -> float:
    targets = TargetScorer(lm)
    collect(lm, docs[:1], window_config(TEXT, lm.name, lm.context_limit), (), targets=targets)
    return float(np.exp(-targets.targets().log_probs_N.mean()))


def all_batches(lm: LanguageModel, docs: Iterable[TokenDocument]) -> Iterator[Batch]:
    config = window_config(TEXT, lm.name, lm.context_limit)
    return batches(windows(docs, config), TEXT.batch_tokens(config.context))


def bare_forward(lm: LanguageModel, docs: Sequence[TokenDocument]) -> None:
    """The model's blocks on the same batches, with nothing attached and no LM head."""
    with torch.inference_mode():
        for batch in all_batches(lm, docs):
            lm.model.base_model(torch.from_numpy(batch.tokens_BT), use_cache=False)


def count_blocks(lm: LanguageModel) -> int:
    return 1 + max(split(name)[0] or 0 for name in lm.layer_names)


def truncated(lm: LanguageModel, blocks: int) -> LanguageModel:
    """A model that has only the first blocks, with the same weights."""
    depth, short = count_blocks(lm), copy.copy(lm)
    short.model = copy.deepcopy(lm.model)
    for module in list(short.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.ModuleList) and len(child) == depth:
                setattr(module, name, child[:blocks])
    short.model.config.num_hidden_layers = blocks
    return short


def extract(lm: LanguageModel, docs: Iterable[TokenDocument], layers: Sequence[str], *, score: bool = True) -> None:
    """Extract vectors of the layers, scored and not kept."""
    config = window_config(TEXT, lm.name, lm.context_limit)
    scorer = LayerScorer({name: lm.dims[name] for name in layers}) if score else None
    collect(lm, docs, config, layers, scorer=scorer)


def stored(lm: LanguageModel, docs: Iterable[TokenDocument], layers: Sequence[str]) -> None:
    """Extract vectors and write them to disk."""
    dims, config = {name: lm.dims[name] for name in layers}, window_config(TEXT, lm.name, lm.context_limit)
    with (
        tempfile.TemporaryDirectory() as folder,
        DatastoreWriter(
            folder, dims, fingerprint=lm.fingerprint, context=config.context, stride=config.stride
        ) as writer,
    ):
        collect(lm, docs, config, layers, scorer=LayerScorer(dims), writer=writer)
        writer.finish()


def by_hand(lm: LanguageModel, docs: Sequence[TokenDocument]) -> list[float]:
    """Dispersion of the blocks' outputs, straightforwardly: keep all vectors, then compute all pairs."""
    kept: list[list[np.ndarray]] = []
    with torch.inference_mode():
        for batch in all_batches(lm, docs):
            tokens_BT = torch.from_numpy(batch.tokens_BT)
            lengths_B = batch.lengths_B
            mask_BT = torch.from_numpy((np.arange(tokens_BT.shape[1]) < lengths_B[:, None]).astype(np.int64))
            states = lm.model(
                tokens_BT, attention_mask=mask_BT, output_hidden_states=True, use_cache=False
            ).hidden_states
            inside_BT = mask_BT.bool()
            kept.append([state[inside_BT].float().numpy() for state in states[1:]])
    return [pairwise(np.concatenate(layer)) for layer in zip(*kept, strict=True)]


def pairwise(vectors_ND: np.ndarray) -> float:
    """Mean of 1 - cos over all pairs, in blocks of rows."""
    unit_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    count = len(unit_ND)
    total = sum(float((unit_ND[at : at + _PAIR_ROWS] @ unit_ND.T).sum()) for at in range(0, count, _PAIR_ROWS))
    return 1 - (total - count) / (count * (count - 1))

"""Checks before a run: the bytes that its keys will take, and the layers that fit on the disk."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from knnlm.config import KEY_BYTES, LayerConfig, Settings, TextConfig
from knnlm.errors import InputError
from knnlm.knn.searcher import check_index
from knnlm.layer_names import select_layers
from knnlm.model.lm import LanguageModel
from knnlm.scores.choose import SCORES_THAT_CHOOSE, candidate_layers, one_layer
from knnlm.text.corpus import read_documents, text_bytes
from knnlm.text.windows import TokenDocument, count_targets

# Text tokenised to estimate the bytes per token.
PROBE_CHARACTERS = 200_000
# A part of a text is taken in at least 16 sections where these have 256 characters, and in more where they would have
# more than 16,384; as sizes are estimated, a little more is read.
LEAST_SECTIONS, LEAST_SECTION, SECTION_CHARACTERS, SPARE = 16, 256, 16_384, 1.05
# A k above this many times the estimated keys is refused at once; estimates are right to a few percent.
SURELY_TOO_MANY = 1.5


# Layers that `run` stores and evaluates in full where none are named: they cost about a quarter of the model's pass.
EVALUATED_LAYERS = 8


@dataclass(frozen=True)
class RunPlan:
    """The layers to store, and their size on disk."""

    layers: tuple[str, ...]
    """Those that are named; else all, of which the `most` that can matter are stored."""
    most: int
    tokens: int | None
    """Estimated number of keys; None where the size of the text is unknown (a hub set)."""
    key_bytes: int | None
    sentence: str


def make_plan(
    lm: LanguageModel,
    text: Sequence[str | Path],
    out: Path,
    settings: Settings,
    evaluation: Sequence[TokenDocument] | None = None,
) -> RunPlan:
    """Estimate the bytes of all wanted layers' keys; fall back to the candidates if that is too much.

    :param evaluation: the evaluation text; None where it will be held out of the text.
    :raises InputError: too little disk space for the keys or the evaluation's queries; k above the number of keys.
    """
    tokens = estimate_tokens(lm, text, settings.text)
    if tokens and settings.knn.k and settings.knn.k > SURELY_TOO_MANY * tokens:
        raise InputError(f"`k` is {settings.knn.k}, but the text gives only about {tokens:,} keys; take a smaller k")
    plan = _plan_keys(lm, tokens, out, settings)
    queries = query_count(settings, tokens, evaluation)
    check_query_room(lm, _widest(lm, plan.layers, plan.most), queries, out=out.parent, taken=plan.key_bytes or 0)
    return plan


def query_count(settings: Settings, tokens: int | None, evaluation: Sequence[TokenDocument] | None) -> int:
    """Tokens that will be evaluated; 0 if that is not known.

    :param tokens: estimated tokens of the text.
    :param evaluation: the evaluation text; None where it will be held out of the text.
    """
    if evaluation is not None:
        return count_targets(evaluation)
    bounds = [bound for bound in (settings.evaluation.eval_tokens, tokens and tokens // 10) if bound]
    return min(bounds, default=0)


def _plan_keys(lm: LanguageModel, tokens: int | None, out: Path, settings: Settings) -> RunPlan:
    layers = select_layers(settings.layers.layers or "all", lm.layer_names)
    check_choice(lm, layers, settings)
    named = settings.layers.layers is not None
    most = len(layers) if named else min(EVALUATED_LAYERS, len(layers))
    of = f"{most} of {len(layers)}" if most < len(layers) else f"{most}"
    if tokens is None:
        unknown = f"keys of {of} layers; the size of the text is not known beforehand"
        return RunPlan(layers, most, None, None, unknown)
    needed = key_bytes(lm, _widest(lm, layers, most), tokens, settings.key_dtype)
    allowed = settings.disk_budget or shutil.disk_usage(out.parent).free // 2
    sentence = f"keys of {of} layers x about {tokens:,} tokens will take {_size(needed)}"
    if needed <= allowed:
        return RunPlan(layers, most, tokens, needed, sentence)
    fewer = candidate_layers(settings.layers, layers, lm.layer_names) if named else layers
    check_choice(lm, fewer, settings)
    # Of layers that are not named, the chosen one alone is worth a run.
    least = len(fewer) if named else 1
    less = key_bytes(lm, _widest(lm, fewer, least), tokens, settings.key_dtype)
    what = f"the {least} candidates" if named else "the chosen one"
    if less > allowed:
        alone = f", and {what} alone {_size(less)}" if less < needed else ""
        raise InputError(
            f"{sentence}{alone}, over the {_size(allowed)} allowed (half of the free disk, or `disk_budget`); take "
            "fewer `layers`, fewer `max_tokens`, or `knnlm.build`"
        )
    sentence += f", over the {_size(allowed)} allowed: keeping to {what} ({_size(less)})"
    return RunPlan(fewer, least, tokens, less, sentence)


def _widest(lm: LanguageModel, layers: Sequence[str], most: int) -> list[str]:
    """The layers whose keys take the most bytes, as many as will be stored."""
    return sorted(layers, key=lambda name: -lm.dims[name])[:most]


def check_query_room(
    lm: LanguageModel, layers: Sequence[str], tokens: int, *, out: Path | None = None, taken: int = 0
) -> None:
    """Check before any work that an evaluation's queries fit into the folder for temporary files.

    These are float32 vectors of all layers (`evaluation.open_queries`).
    :param out: a folder to which `taken` bytes will have been written by then.
    :raises InputError: too little space; the message gives TMPDIR and the bytes needed and free.
    """
    folder = Path(tempfile.gettempdir())
    needed, free = key_bytes(lm, layers, tokens, "float32"), shutil.disk_usage(folder).free
    if out is not None and os.stat(out).st_dev == os.stat(folder).st_dev:
        free -= taken
    if needed > free:
        raise InputError(
            f"queries of {len(layers)} layers x {tokens:,} evaluation tokens will take {_size(needed)}, but the folder "
            f"for temporary files, {folder}, has {_size(max(free, 0))} for them; set TMPDIR to a larger place, or take "
            "fewer `layers` or `eval_tokens`"
        )


def check_choice(lm: LanguageModel, layers: Sequence[str], settings: Settings) -> None:
    """Check before any work that the layer can be chosen and the index built.

    :raises LayerError: `select` or `candidates` names no layer of the model, or one that is not among `layers`.
    :raises index.errors.UnknownSpec: FAISS does not understand `index`.
    """
    check_layers(settings.layers, layers, lm.layer_names)
    check_index(settings.knn, [lm.dims[name] for name in layers])


def check_layers(config: LayerConfig, layers: Sequence[str], all_layers: Sequence[str]) -> None:
    """The part of `check_choice` that needs only layer names. Raises LayerError as it does."""
    candidate_layers(config, layers, all_layers)
    if config.select not in SCORES_THAT_CHOOSE:
        one_layer(config.select, layers)


def key_bytes(lm: LanguageModel, layers: Sequence[str], tokens: int, key_dtype: str) -> int:
    """Bytes of the layers' keys on disk."""
    return KEY_BYTES[key_dtype] * tokens * sum(lm.dims[name] for name in layers)


@dataclass(frozen=True)
class Share:
    """The share of a text that gives `max_tokens`, and the characters of the sections that it is taken in."""

    share: float = 1.0
    section: int = SECTION_CHARACTERS


def take_share(lm: LanguageModel, text: Sequence[str | Path], config: TextConfig) -> Share:
    """Return how `max_tokens` are spread over the text; all of it where they are not set or the size is not known."""
    size = None if config.max_tokens is None else _estimate_size(lm, text, config)
    if config.max_tokens is None or size is None or size[1] <= config.max_tokens:
        return Share()
    share, characters = config.max_tokens / size[1], size[0] * config.max_tokens // size[1]
    return Share(SPARE * share, max(LEAST_SECTION, min(SECTION_CHARACTERS, characters // LEAST_SECTIONS)))


def estimate_tokens(lm: LanguageModel, text: Sequence[str | Path], config: TextConfig) -> int | None:
    """Tokens of the text, estimated from its size and the bytes per token at its beginning; at most `max_tokens`.

    Where the size is unknown: `max_tokens`, or None.
    """
    size = _estimate_size(lm, text, config)
    if size is None:
        return config.max_tokens
    return min(size[1], config.max_tokens or size[1])


def _estimate_size(lm: LanguageModel, text: Sequence[str | Path], config: TextConfig) -> tuple[int, int] | None:
    """Bytes and tokens of the text; None where they are not known."""
    total = text_bytes(text, text_field=config.text_field)
    if total is None:
        return None
    bytes_seen, tokens_seen = 0, 0
    for document in itertools.islice(read_documents(text, text_field=config.text_field), 100):
        piece = document.text[:PROBE_CHARACTERS]
        bytes_seen += len(piece.encode())
        tokens_seen += len(lm.encode(piece))
        if bytes_seen > PROBE_CHARACTERS:
            break
    return total, int(total * tokens_seen / max(bytes_seen, 1))


def _size(count: float) -> str:
    return (
        f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB" if count >= 1e4 else f"{count:.0f} bytes"
    )

"""Rows of a checkpoint's output matrix, read directly from its safetensors files, without loading the model.

The output matrix (LM head, unembedding) has one row for each token. It is located as in transformers 5: a stored head
is used, whatever the configuration says about tying; without one, the input embeddings are used, unless the
configuration says that they are not tied. A safetensors file is a length (8 bytes), a header in JSON and the data of
each tensor: https://github.com/huggingface/safetensors#format.

Legend: N wanted tokens, V vocabulary, D dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from knnlm.errors import InputError, ModelError
from knnlm.json_text import loads
from knnlm.scores.dispersion import widened

T = TypeVar("T")

# Endings of the tensors' names in decoder checkpoints, after prefixes such as `transformer.` or `model.decoder.`.
HEADS = ("lm_head", "lm_head.linear", "embed_out", "output", "output_layer", "unembed")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tokens_embed", "tok_embeddings")
# NumPy has no bfloat16: its bits are read as integers, which `widened` converts.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# The format's own limit.
_HEADER_BYTES = 100_000_000
_LISTED = 8


@dataclass(frozen=True)
class OutputMatrix:
    """Location of a checkpoint's output matrix, whose rows are multiplied with the final states to give logits."""

    model: str
    """Name or folder, as given."""
    tensor: str
    tied: bool
    """Whether the input embeddings are also the output matrix."""
    file: Path
    shape: tuple[int, int]
    """[V, D]."""
    dtype: str
    """Type in the notation of safetensors, such as BF16."""
    offset: int
    """Offset of the first row in the file, in bytes."""

    def rows(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """Read the rows of some tokens, [N, D], and nothing else.

        :raises InputError: a token without a row.
        """
        kind, (count, dim) = np.dtype(DTYPES[self.dtype]), self.shape
        wrong = next((token for token in tokens if not 0 <= token < count), None)
        if wrong is not None:
            raise InputError(f"token {wrong} is none of the {count} of {self.model}; take ids from 0 to {count - 1}")
        rows_ND = np.empty((len(tokens), dim), kind)
        with self.file.open("rb", buffering=0) as file:
            for token, row_D in zip(tokens, rows_ND, strict=True):
                file.seek(self.offset + token * dim * kind.itemsize)
                if file.readinto(row_D.data) < row_D.nbytes:
                    raise _damaged(self.file, f"it ends inside {self.tensor}")
        return widened(rows_ND).astype(np.float64)


def find_output_matrix(model: str | Path) -> OutputMatrix:
    """Find the output matrix of a model folder or a hub model, of which only the file with the matrix is fetched.

    :raises ModelError: no safetensors (.bin files are pickles and are never read), a damaged file, or no tensor with a
        known name of an output matrix; the message lists the tensors.
    """
    source = str(model)
    config = _read_json(_needed(source, "config.json"))
    names = _names(source)
    heads = [name for name in names if _ends(name, HEADS)]
    untied = _field(config, "tie_word_embeddings", bool) is False
    embeddings = [] if untied else [name for name in names if _ends(name, EMBEDDINGS)]
    vocabulary = _field(config, "vocab_size", int)
    for candidates, tied in ((heads, False), (embeddings, True)):
        found = [_matrix(source, name, names[name], tied) for name in candidates]
        right = [one for one in found if one is not None and vocabulary in (None, one.shape[0])]
        if len(right) == 1:
            return _checked(right[0])
    raise _not_found(source, names, vocabulary)


# Which tensor


def _names(source: str) -> Mapping[str, str]:
    """File name of every tensor of a checkpoint."""
    if _file(source, "model.safetensors"):
        return dict.fromkeys(_header(_needed(source, "model.safetensors"))[0], "model.safetensors")
    index = _file(source, "model.safetensors.index.json")
    if index is None:
        raise ModelError(
            f"{source} has no model.safetensors nor model.safetensors.index.json, and other weights are not read "
            "(.bin files are pickles); write them with save_pretrained"
        )
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ModelError(f"{index} has no weight_map from tensors to files; save or download the model again")
    return names


def _ends(tensor: str, names: Sequence[str]) -> bool:
    return any(f".{tensor}".endswith(f".{name}.weight") for name in names)


def _field(config: Mapping[str, Any], name: str, kind: type[T]) -> T | None:
    """Field of the configuration, or of its text part for a multimodal model."""
    parts = (part for part in (config, config.get("text_config")) if isinstance(part, dict))
    return next((part[name] for part in parts if isinstance(part.get(name), kind)), None)


def _not_found(source: str, names: Mapping[str, str], vocabulary: int | None) -> ModelError:
    matrices = [one for name, file in names.items() if (one := _matrix(source, name, file, tied=False))]
    tall = [one for one in matrices if vocabulary in (None, one.shape[0])] or matrices
    tall.sort(key=lambda one: -one.shape[0])
    listed = ", ".join(f"{one.tensor} {list(one.shape)}" for one in tall[:_LISTED]) or "no matrix at all"
    return ModelError(
        f"{source} has no tensor that is known as the output matrix of {vocabulary or '?'} tokens, or several; "
        f"it has {listed}"
    )


def _matrix(source: str, name: str, file_name: str, tied: bool) -> OutputMatrix | None:
    """Tensor with a given name, if it has two dimensions."""
    file = _needed(source, file_name)
    header, begin = _header(file)
    try:
        entry = header[name]
        shape = tuple(int(size) for size in entry["shape"])
        first, last = (int(place) for place in entry["data_offsets"])
        dtype = str(entry["dtype"])
    except (KeyError, TypeError, ValueError):
        raise _damaged(file, f"{name} is not described in its header") from None
    if len(shape) != 2:
        return None
    if dtype in DTYPES and last - first != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise _damaged(file, f"{name} {list(shape)} of {dtype} is said to have {last - first} bytes")
    if first < 0 or begin + last > file.stat().st_size:
        raise _damaged(file, f"{name} ends at byte {begin + last}, the file at {file.stat().st_size}")
    return OutputMatrix(source, name, tied, file, (shape[0], shape[1]), dtype, begin + first)


def _checked(matrix: OutputMatrix) -> OutputMatrix:
    if matrix.dtype not in DTYPES:
        raise ModelError(
            f"{matrix.tensor} of {matrix.model} is stored as {matrix.dtype}; give a checkpoint with {', '.join(DTYPES)}"
        )
    return matrix


# Files


def _file(source: str, name: str) -> Path | None:
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None
    from knnlm.model.loading import (
        model_file,
    )  # imports transformers, which takes seconds and is not needed for a folder

    return model_file(source, name)


def _needed(source: str, name: str) -> Path:
    path = _file(source, name)
    if path is not None:
        return path
    if name == "config.json" and _file(source, "adapter_config.json"):
        raise ModelError(
            f"{source} is an adapter, not a model; merge it into its model (merge_and_unload) and save that"
        )
    if name == "config.json" and not Path(source).is_dir():
        raise ModelError(f"{source} has no config.json on the hub, or the hub cannot be reached; check the name")
    if name == "config.json":
        raise ModelError(f"{source} is not a model: it has no config.json; give a folder made by save_pretrained")
    raise ModelError(f"{source} has no {name}, which its index names; save or download the model again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not readable as JSON: {error}; save or download the model again") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path} is no JSON object; save or download the model again")
    return document


def _header(path: Path) -> tuple[Mapping[str, Any], int]:
    """Header of a safetensors file, and the offset of the tensors' data."""
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_HEADER_BYTES, path.stat().st_size - 8):
            raise _damaged(path, f"its header would have {length} bytes")
        try:
            header = loads(file.read(length).decode("utf-8"))
        except ValueError:
            raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length


def _damaged(path: Path, fact: str) -> ModelError:
    return ModelError(f"{path} is not a whole safetensors file: {fact}; save or download it again")

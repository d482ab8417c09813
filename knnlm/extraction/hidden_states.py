"""Vectors that come from elsewhere: a file for each document, with its token ids and the vectors of some layers.

A file is .npz or .safetensors and holds `token_ids`, whole numbers [T], and for each layer an array of its name, such
as `7.block_output`, floating-point numbers [T, D]. The vector at position t has seen tokens 0 to t: it is a key, and
token t + 1 is its value. The last vector has no value, and is not stored.

Legend: B windows of a batch, T positions, D dimension.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from knnlm.errors import InputError, first_line
from knnlm.extraction.passes import located
from knnlm.layer_names import list_names
from knnlm.model.decoder import Receive
from knnlm.model.lm import LanguageModel
from knnlm.text.windows import Batch, TokenDocument

TOKENS = "token_ids"
NPZ, SAFETENSORS = ".npz", ".safetensors"
# First letters of the types of safetensors, and what they are: BF16, F32, I64, U8.
_KINDS = {"B": "f", "F": "f", "I": "i", "U": "i"}
_UNREADABLE = (OSError, ValueError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class ArrayKind(NamedTuple):
    """An array in a file, by its header."""

    shape: tuple[int, ...]
    dtype: str
    kind: str
    """`f` for floating-point, `i` for whole numbers, or another letter."""


@dataclass(frozen=True)
class VectorFile:
    """A file of one document."""

    path: Path
    source: str
    """Its path inside the folder: the name of the document."""
    arrays: Mapping[str, ArrayKind]


class HiddenStates:
    """The files of a folder, checked by their headers and token ids; vectors are read batch by batch.

    :raises InputError: no files; a file that cannot be read; arrays that are missing, unknown, or of a wrong shape or
        type; token ids that the model does not have. Names the file, and the place in it.
    """

    def __init__(self, folder: str | Path, lm: LanguageModel) -> None:
        self._lm = lm
        self._files = {one.source: one for one in _files(Path(folder))}
        first = next(iter(self._files.values()))
        self.layers = tuple(name for name in lm.layer_names if name in first.arrays)
        """The layers whose vectors every file has, in the order of the network."""
        self.targets = 0
        """Number of keys: tokens that have a predecessor in their document."""
        for one in self._files.values():
            self._check(one, first)
            self.targets += max(len(self._tokens(one)) - 1, 0)
        self._held: tuple[str, dict[str, NDArray[Any]]] = "", {}

    def documents(self) -> Iterator[TokenDocument]:
        """The documents, by the names of their files."""
        for one in self._files.values():
            yield TokenDocument(self._tokens(one), one.source, 1)

    def give(self, batch: Batch, layers: Sequence[str], *receivers: Receive) -> None:
        """Give the vectors of a batch to every receiver, in place of a forward pass.

        Of `layers`, those that the files have.
        :raises InputError: NaN or infinity; names the file, the layer and the token.
        :raises ModelError: as `passes.forward`.
        """
        for layer in layers:
            if layer in self.layers:
                located(batch, receivers)(layer, torch.from_numpy(self._vectors(batch, layer)))

    def _vectors(self, batch: Batch, layer: str) -> NDArray[np.float32]:
        vectors_BTD = np.zeros((*batch.tokens_BT.shape, self._lm.dims[layer]), np.float32)
        for row_TD, window in zip(vectors_BTD, batch.windows, strict=True):
            one, stop = self._files[window.source], window.start + len(window.inputs)
            given_TD = row_TD[: len(window.inputs)]
            given_TD[:] = self._read(one, layer)[window.start : stop]
            if not np.isfinite(given_TD).all():
                token = window.start + int(np.flatnonzero(~np.isfinite(given_TD).all(1))[0])
                raise InputError(f"{one.path}: {layer} has NaN or infinity at token {token}; export that file again")
        return vectors_BTD

    def _read(self, one: VectorFile, layer: str) -> Any:  # noqa: ANN401 - a slice of a file, or an array
        """What gives rows by slices. The arrays of one .npz, which is read as a whole, are held."""
        if one.path.suffix == SAFETENSORS:
            return _Rows(one.path, layer)
        if self._held[0] != one.source:
            self._held = one.source, {}
        if layer not in self._held[1]:
            with _readable(one.path), np.load(one.path, allow_pickle=False) as arrays:
                self._held[1][layer] = arrays[layer]
        return self._held[1][layer]

    def _tokens(self, one: VectorFile) -> NDArray[np.int32]:
        if one.path.suffix == SAFETENSORS:
            tokens = _Rows(one.path, TOKENS)[:]
        else:
            with _readable(one.path), np.load(one.path, allow_pickle=False) as arrays:
                tokens = arrays[TOKENS]
        wrong = np.flatnonzero((tokens < 0) | (tokens >= self._lm.vocabulary))
        if len(wrong):
            raise InputError(
                f"{one.path}: {TOKENS} has {tokens[wrong[0]]} at token {wrong[0]}, but {self._lm.name} has 0 to "
                f"{self._lm.vocabulary - 1}; give the ids of its own tokenizer"
            )
        return tokens.astype(np.int32)

    def _check(self, one: VectorFile, first: VectorFile) -> None:
        """Check a file's arrays by their headers."""
        for name in (TOKENS, *first.arrays, *one.arrays):
            if name not in one.arrays:
                raise InputError(f"{one.path} has no array {name}; it has {', '.join(one.arrays) or 'none'}")
            if name != TOKENS and name not in self._lm.layer_names:
                known = list_names(self._lm.layer_names)
                raise InputError(f"{one.path} has {name}, but no layer of {self._lm.name}; there are {known}")
            if name != TOKENS and name not in first.arrays:
                raise InputError(
                    f"{one.path} has {name}, which {first.source} has not; give every file the same layers"
                )
        (shape, dtype, kind), positions = one.arrays[TOKENS], one.arrays[TOKENS].shape[:1]
        if len(shape) != 1 or kind != "i":
            raise InputError(f"{one.path}: {TOKENS} is {dtype} {list(shape)}, but must be whole numbers [T]")
        if not self.layers:
            raise InputError(f"{one.path} has {TOKENS} only; give the vectors of a layer of {self._lm.name}")
        for layer in self.layers:
            wanted, found = (*positions, self._lm.dims[layer]), one.arrays[layer]
            if found.shape != wanted or found.kind != "f":
                told = f"{found.dtype} {list(found.shape)}"
                raise InputError(f"{one.path}: {layer} is {told}, but must be floating-point {list(wanted)}")


def _files(folder: Path) -> Iterator[VectorFile]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (NPZ, SAFETENSORS) and path.is_file())
    if not paths:
        raise InputError(f"{folder} has no {NPZ} or {SAFETENSORS} files; give a folder with one for each document")
    for path in paths:
        with _readable(path):
            arrays = dict(_safetensors_kinds(path) if path.suffix == SAFETENSORS else _npz_kinds(path))
        yield VectorFile(path, path.relative_to(folder).as_posix(), arrays)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """:raises InputError: what the block reads is damaged, or no such file."""
    try:
        yield
    except (*_UNREADABLE, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); write it again") from None


def _npz_kinds(path: Path) -> Iterator[tuple[str, ArrayKind]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = read(file)
            if dtype.hasobject:
                raise ValueError(f"{name} holds Python objects, which are not unpickled")
            yield name.removesuffix(".npy"), ArrayKind(shape, str(dtype), {"u": "i"}.get(dtype.kind, dtype.kind))


def _safetensors_kinds(path: Path) -> Iterator[tuple[str, ArrayKind]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            one, dtype = file.get_slice(name), file.get_slice(name).get_dtype()
            yield name, ArrayKind(tuple(one.get_shape()), dtype, "?" if dtype == "BOOL" else _KINDS.get(dtype[0], "?"))


class _Rows:
    """The rows of an array in a .safetensors, read when they are taken: bfloat16, which NumPy lacks, as float32."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        with _readable(self._path), safe_open(self._path, framework="pt") as file:
            found = file.get_slice(self._name)[rows]
        return np.asarray((found.float() if found.is_floating_point() else found).numpy())

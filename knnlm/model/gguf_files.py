"""GGUF files, read once: transformers parses a file's vocabulary four times to load a model, with a slow reader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import numpy as np

_ALONE = Lock()
# `general.file_type` of files whose numbers are whole; all others are quantized.
_WHOLE = {0: "float32", 1: "float16", 32: "bfloat16"}


def stated_type(path: str) -> str:
    """Return the type of a file's numbers: bfloat16 for quantized ones, which are coarser than that."""
    import gguf

    field = gguf.GGUFReader(path).get_field("general.file_type")
    return "float32" if field is None else _WHOLE.get(int(field.parts[-1][0]), "bfloat16")


@contextmanager
def read_once() -> Iterator[None]:
    """Within the block, a GGUF file is parsed once, and so are the names of its tensors; one thread at a time.

    SmolLM2-135M (49,152 tokens, 272 tensors) loads in a quarter of the time. transformers takes both from the package
    `gguf` at the moment of use, so that others can be put there; those that were there are put back.
    """
    import gguf

    library: Any = gguf

    class PlainReader(gguf.GGUFReader):
        """Reads from a plain array: slices of `numpy.memmap` took two thirds of the time."""

        def _get(self, *place: Any, **kind: Any) -> Any:  # noqa: ANN401 - as the library has it
            if isinstance(self.data, np.memmap):
                plain: Any = self.data.view(np.ndarray)
                self.data = plain
            return super()._get(*place, **kind)

    with _ALONE:
        reader, names = library.GGUFReader, library.get_tensor_name_map
        library.GGUFReader, library.get_tensor_name_map = cache(PlainReader), cache(names)
        try:
            yield
        finally:
            library.GGUFReader, library.get_tensor_name_map = reader, names

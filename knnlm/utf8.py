"""Places of characters in the UTF-8 bytes of a text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def byte_places(text: str) -> NDArray[np.int64]:
    """Return each character's first byte in the text's UTF-8, and finally the text's size: int64 [characters + 1]."""
    if text.isascii():
        return np.arange(len(text) + 1)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])

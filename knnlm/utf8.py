"""Places of characters in the UTF-8 bytes of a text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from knnlm.errors import InputError


def check_characters(text: str) -> None:
    """Raise InputError for a lone surrogate (U+D800 to U+DFFF), which Python's strings can hold but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start + 1} of the text is U+{ord(text[error.start]):04X}, half of a surrogate pair; "
            "remove it, or read the text with errors='replace'"
        ) from None


def byte_places(text: str) -> NDArray[np.int64]:
    """Return each character's first byte in the text's UTF-8, and finally the text's size: int64 [characters + 1]."""
    if text.isascii():
        return np.arange(len(text) + 1)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])

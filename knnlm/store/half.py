"""float16 to and from float32, which NumPy 2 converts six to a hundred times slower than the processor can.

For a million keys of 256 dimensions NumPy takes 2.5 s to float16 and 0.4 s back, these 0.02 and 0.07 (docs/log.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FLOAT16_MAX = float(np.finfo(np.float16).max)
# Sign, exponent and fraction of a float16 that was shifted to where float32 has them; and the exponents' difference.
_KEPT_BITS = np.uint32(0x8FFFE000).astype(np.int32)
_EXPONENTS = np.float32(2.0**112)


def to_float16(numbers: NDArray[np.float32]) -> NDArray[np.float16]:
    """Rounded to the nearest; beyond `FLOAT16_MAX`, infinite. A new array."""
    import torch  # here: who only reads a datastore, such as `knnlm info`, does not wait a second for it

    halves: NDArray[np.float16] = torch.from_numpy(numbers).half().numpy()
    return halves


def to_float32(halves: NDArray[np.float16], out: NDArray[np.float32]) -> None:
    """Fill `out`, C-contiguous and of the same shape, with the same numbers; infinite ones and NaN included."""
    bits = out.view(np.int32)
    np.left_shift(halves.view(np.int16), 13, out=bits, dtype=np.int32)
    bits &= _KEPT_BITS
    out *= _EXPONENTS  # exact, and subnormal numbers become normal ones
    if not all_finite(halves):
        out[...] = halves


def all_finite(halves: NDArray[np.float16]) -> bool:
    """Whether there is neither infinity nor NaN, which have all bits of the exponent.

    They are the largest numbers of either sign, read as integers: as fast as memory, where NumPy's isfinite converts.
    """
    return not halves.size or bool(halves.view(np.int16).max() < 0x7C00 and halves.view(np.uint16).max() < 0xFC00)

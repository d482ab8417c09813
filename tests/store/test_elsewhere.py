"""Parts that others make: what is told where the centres cannot be fixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from knnlm.errors import ModelError
from knnlm.store.elsewhere import PartsElsewhere
from tests.store.test_datastore import FRAME


def test_a_first_batch_without_a_centre_names_the_layer_and_the_key(tmp_path: Path) -> None:
    vectors_ND = np.ones((4, 3), np.float32)
    vectors_ND[2, 1] = np.nan
    with (
        PartsElsewhere(tmp_path, {"0.ffn_input": 3}, **FRAME) as writer,
        pytest.raises(
            ModelError, match=r"^layer 0\.ffn_input gives NaN or infinite values at key 2 of the first batch; "
        ),
    ):
        writer.fix_frame({"0.ffn_input": vectors_ND})

"""What holds for every test: no network, no settings of the person who runs it, the same numbers each time."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

# Before anything imports transformers or datasets, which read these once. The caches are of this run only.
_CACHE = tempfile.TemporaryDirectory(prefix="knnlm-tests-", ignore_cleanup_errors=True)
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HOME=_CACHE.name, NO_COLOR="1"
)
for _name in [name for name in os.environ if name.startswith("KNNLM_") and name != "KNNLM_NO_BROWSER"]:
    del os.environ[_name]
for _name in ("COLUMNS", "FORCE_COLOR", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN"):
    os.environ.pop(_name, None)

# A slow machine is no failure, and a failure is the same failure tomorrow.
hypothesis.settings.register_profile("knnlm", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("knnlm")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Fix torch's global seed where a test uses torch at all: models initialised in a test are the same each time."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
    yield

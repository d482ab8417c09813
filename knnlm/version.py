"""The one place that knows this package's version; `pyproject.toml` reads it from here. Also those of its libraries."""

from __future__ import annotations

import platform
from importlib.metadata import version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Of everything whose change can change a number."""
    packages = ("knnlm", "torch", "transformers", "tokenizers", "faiss-cpu", "numpy", "datasets")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}

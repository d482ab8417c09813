"""The version of this package, which `pyproject.toml` reads from here, and those of its libraries."""

from __future__ import annotations

import platform
from importlib.metadata import version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions of Python, knnlm and the libraries whose change can change a number."""
    packages = ("knnlm", "torch", "transformers", "tokenizers", "faiss-cpu", "numpy", "datasets")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}

"""An OpenAI-compatible HTTP server for the kNN-LM. Needs the extra `serve`."""

from importlib.util import find_spec

from knnlm.errors import InputError

missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
if missing:
    raise InputError(f"serve needs {missing[0]}, which is not installed; pip install '.[serve]'")

"""An OpenAI-compatible HTTP server for the kNN-LM. Needs the extra `serve`."""

from importlib.util import find_spec

from knnlm.errors import InputError, not_installed

missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
if missing:
    raise InputError(not_installed("serve", missing[0], "serve"))

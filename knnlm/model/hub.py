"""Files of models on the Hugging Face hub, looked up in the cache or fetched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knnlm.errors import ModelError, first_line

_TOLD_BY_ERRORS = ("huggingface_hub", "transformers.modeling_utils", "transformers.distributed.tensor_parallel")
# An adapter's files and those of its tokenizer.
_ADAPTER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "adapter_model.safetensors")


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Suppress the hub client's log of every attempt, and the table of weights that do not fit; errors tell of both."""
    loggers = [logging.getLogger(name) for name in _TOLD_BY_ERRORS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def hub_adapter(name: str, config: str) -> Path | None:
    """Return the local folder of an adapter's files, fetched if needed; None if the name is no adapter's.

    Also None if the name cannot be looked up: loading it as a model tells why.

    :param config: the file by which an adapter is known.
    :raises ModelError: it is an adapter, but its files could not be fetched.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    with quiet_hub():
        try:
            hf_hub_download(name, config)
        except (OSError, EntryNotFoundError, HFValidationError):
            return None
        try:
            return Path(snapshot_download(name, allow_patterns=list(_ADAPTER_FILES)))
        except OSError as error:
            raise ModelError(f"{name} could not be fetched from the hub: {first_line(error)}; try again") from None

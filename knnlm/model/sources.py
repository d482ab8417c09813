"""Sources of a model: the hub, a folder made by save_pretrained, a LoRA adapter and its base, a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from knnlm.errors import ModelError, not_installed
from knnlm.json_text import loads
from knnlm.model.hub import hub_adapter

KNOWN = "a folder made by save_pretrained (config.json and .safetensors), a LoRA adapter's folder, or a .gguf file"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".onnx", ".msgpack", ".pkl", ".tflite", ".gguf", ".ot")


@dataclass(frozen=True)
class Source:
    """The arguments of `from_pretrained`."""

    name: str
    """The model's name as given by the user."""
    place: str
    """Folder or hub name of the configuration and the weights."""
    options: Mapping[str, Any] = field(default_factory=dict)
    adapter: Path | None = None
    """Folder of an adapter to merge into the weights."""
    tokenizer: str = ""
    """Folder or hub name of the tokenizer."""


def find_source(name: str, *, trust_remote_code: bool = False) -> Source:
    """Determine what a name, a folder or a file is, without reading weights.

    :raises ModelError: it does not exist, holds no readable model, or needs a library that is not installed.
    """
    if not name.strip():
        raise ModelError(f"the name of the model is empty; give {KNOWN}, or a name on the hub")
    path = Path(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if path.is_dir():
        _check_regular(path)
        if (path / ADAPTER).is_file():
            return _adapter(name, path, trust_remote_code=trust_remote_code)
        _check_folder(path)
        return Source(name, name, options, tokenizer=name)
    if path.is_file() and path.suffix.lower() == ".gguf":
        for library in ("gguf", "accelerate"):
            _require(library, "gguf", f"{name} is a GGUF file, and reading one")
        options["gguf_file"] = path.name
        return Source(name, str(path.parent), options, tokenizer=str(path.parent))
    if path.exists():
        raise ModelError(f"{name} is a file; give the folder of a model, a .gguf file, or a name on the hub")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {name}; give the folder of a model, or a name on the hub")
    if (adapter := hub_adapter(name, ADAPTER)) is not None:
        return _adapter(name, adapter, trust_remote_code=trust_remote_code)
    return Source(name, name, {**options, "local_files_only": False}, tokenizer=name)


def _check_regular(path: Path) -> None:
    for one in path.iterdir():  # transformers would block forever on a FIFO
        if one.exists() and not (one.is_file() or one.is_dir()):
            raise ModelError(f"{one} is a FIFO or a device, and no regular file; remove it from the model")


def _check_folder(path: Path) -> None:
    files = sorted(file.name for file in path.iterdir())
    others = [name for name in files if Path(name).suffix.lower() in _OTHER_FORMATS]
    if "config.json" not in files:
        found = f", only {', '.join(others[:3])}" if others else ""
        raise ModelError(f"{path} is not a model: it has no config.json{found}; give {KNOWN}")
    if others and not any(name.endswith(".safetensors") for name in files):
        # A pickle could run arbitrary code.
        raise ModelError(f"{path} has no .safetensors, only {', '.join(others[:3])}; give {KNOWN}")


def _adapter(name: str, folder: Path, *, trust_remote_code: bool) -> Source:
    """The source of an adapter, whose files are in a folder, with its base model."""
    config = folder / ADAPTER
    try:
        given = loads(config.read_text(encoding="utf-8"))
        base, revision = given["base_model_name_or_path"], given.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{config} names no base model ({error}); save the adapter again") from None
    if not isinstance(base, str) or not base:
        raise ModelError(f"{config} names no base model; write its folder as base_model_name_or_path")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{name} is an adapter without {ADAPTER_WEIGHTS}; save it with safe_serialization=True")
    _require("peft", "train", f"{name} is an adapter, and loading one")
    try:
        found = find_source(base, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{name} is an adapter of {base}: {error}") from None
    if found.adapter is not None:
        raise ModelError(f"{name} is an adapter of the adapter {base}; merge that one into its model first")
    own = (folder / "tokenizer_config.json").is_file() and "gguf_file" not in found.options
    tokenizer = str(folder) if own else found.tokenizer
    options = found.options if found.options["local_files_only"] else {**found.options, "revision": revision or "main"}
    return Source(name, found.place, options, folder, tokenizer)


def _require(library: str, extra: str, what: str) -> None:
    if find_spec(library) is None:
        raise ModelError(not_installed(what, library, extra))

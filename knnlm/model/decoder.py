"""Layers of a decoder: found in any Hugging Face decoder by its structure, and read by hooks.

`knnlm.layer_names` defines what a layer is.

Shapes: B batch, T time, D dimension.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from knnlm.errors import ModelError
from knnlm.layer_names import FINAL, check_names

Receive = Callable[[str, Tensor], None]
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|moe(?![a-z])|experts|(?:^|_)ff(?:_|$)", re.IGNORECASE)
_NOT_SELF = re.compile(r"cross|encoder_attn", re.IGNORECASE)
_OTHER_SENSE = re.compile(r"vision|visual|audio", re.IGNORECASE)  # towers of a multimodal model


@dataclass(frozen=True)
class _Tap:
    """A point of the network: a module's input or output."""

    module: nn.Module
    side: Literal["input", "output"]


class Decoder:
    """The layers of one model, and hooks on them; `find_decoder` makes it. The model itself is never changed."""

    names: tuple[str, ...]
    """All layers, in the order of the network."""
    num_blocks: int

    def __init__(self, taps: Mapping[str, _Tap], blocks: Sequence[nn.Module]) -> None:
        self._taps = dict(taps)
        self._blocks = tuple(blocks)
        self.names = tuple(taps)
        self.num_blocks = len(blocks)

    @contextmanager
    def attach(self, names: Sequence[str], receive: Receive, *, detach: bool = True) -> Iterator[None]:
        """Call `receive(name, vectors)` for each layer in `names` whenever the model computes it, inside the `with`.

        The vectors are [B, T, D], in the model's type and memory: a later module may overwrite them (Falcon adds in
        place), so use or copy them before `receive` returns. Layers come in the order of computation. With
        `detach=False` gradients flow through them.

        Raises LayerError for a layer that the model does not have.
        """
        check_names(names, self.names)
        shape = _StreamShape(detach)
        with ExitStack() as stack:
            stack.callback(self._blocks[0].register_forward_pre_hook(shape, with_kwargs=True).remove)
            for name in names:
                stack.callback(_register(self._taps[name], name, shape, receive))
            yield


class _StreamShape:
    """A hook that remembers [B, T] of the residual stream: some feed-forwards work on [B·T, D]."""

    def __init__(self, detach: bool) -> None:
        self.value: tuple[int, ...] = ()
        self._detach = detach

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.value = tuple(_entering(args, kwargs).shape[:2])

    def restore(self, vectors: Tensor) -> Tensor:
        vectors = vectors.detach() if self._detach else vectors
        return vectors.reshape(*self.value, vectors.shape[-1]) if vectors.ndim == 2 and self.value else vectors


def _register(tap: _Tap, name: str, shape: _StreamShape, receive: Receive) -> Callable[[], None]:
    def read_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive(name, shape.restore(_entering(args, kwargs)))

    def read_output(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        receive(name, shape.restore(_returned(output)))

    if tap.side == "input":
        return tap.module.register_forward_pre_hook(read_input, with_kwargs=True).remove
    return tap.module.register_forward_hook(read_output).remove


def _entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among a module's arguments."""
    values = [*args[:1], kwargs.get("hidden_states"), *args, *kwargs.values()]
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ModelError("a block of this model takes no hidden states, so its layers cannot be read; use another model")


def _returned(output: object) -> Tensor:
    """The hidden states in a module's output: the tensor itself, or the first of a tuple or mapping."""
    if isinstance(output, Mapping):
        output = next(iter(output.values()))
    if isinstance(output, tuple | list):
        output = output[0]
    if isinstance(output, Tensor):
        return output
    raise ModelError(f"a module returned {type(output).__name__} where vectors were expected; use another model")


# Finding the layers


def find_decoder(model: nn.Module) -> Decoder:
    """Find the layers of a decoder-only causal LM by its structure.

    Blocks are the longest list of modules that hold attention and a feed-forward; their children are recognised by
    class and attribute names. A block may lack a part (a state-space block has no attention): then `names` lacks it.

    Raises ModelError for an encoder-only or encoder-decoder model, and for one without an LM head or such blocks.
    """
    _check_kind(model)
    head = find_head(model)
    blocks = _find_blocks(model)
    taps: dict[str, _Tap] = {}
    for number, block in enumerate(blocks):
        taps |= {f"{number}.{part}": tap for part, tap in _block_taps(block).items()}
    return Decoder({**taps, FINAL: _Tap(head, "input")}, blocks)


def find_head(model: nn.Module) -> nn.Module:
    """Return the LM head, which maps `final_norm` vectors to logits. Raises ModelError if there is none."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if isinstance(head, nn.Module):
        return head
    raise ModelError(f"{_kind(model)} has no LM head; give a decoder-only causal language model such as GPT-2 or Llama")


def _kind(model: nn.Module) -> str:
    return type(model).__name__


def _check_kind(model: nn.Module) -> None:
    advice = "give a decoder-only causal language model such as GPT-2 or Llama"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(f"{_kind(model)} is an encoder-decoder model; {advice}")
    if "MaskedLM" in _kind(model):
        raise ModelError(f"{_kind(model)} is an encoder-only model; {advice}")


def _find_blocks(model: nn.Module) -> tuple[nn.Module, ...]:
    lists = [
        tuple(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not _OTHER_SENSE.search(name)
    ]
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    found = [blocks for blocks in lists if _is_decoder(blocks, depth)] or [b for b in lists if _is_stack(b, depth)]
    if found:
        return max(found, key=len)
    raise ModelError(
        f"no list of decoder blocks (attention with a feed-forward) was found in {_kind(model)}, as in an encoder-only "
        "model; give a decoder-only causal language model such as GPT-2 or Llama"
    )


def _is_decoder(blocks: tuple[nn.Module, ...], depth: int | None) -> bool:
    # Not in each block: hybrids have state-space blocks too, some of another class.
    alike = len({type(block) for block in blocks}) == 1 or len(blocks) == depth
    parts = any(_attention(block) for block in blocks) and any(_feed_forward(block) for block in blocks)
    return alike and parts


def _is_stack(blocks: tuple[nn.Module, ...], depth: int | None) -> bool:
    """Whether these are the blocks of a state-space model: as many as configured, none with attention."""
    return len(blocks) == depth and all(_attention(block) is None for block in blocks)


def _block_taps(block: nn.Module) -> dict[str, _Tap]:
    """The taps of the parts that this block has, in the order of PARTS."""
    taps: dict[str, _Tap] = {}
    attention, feed_forward = _attention(block), _feed_forward(block)
    if attention is not None:
        taps |= {"attn_input": _Tap(attention, "input"), "attn_output": _Tap(_own_output(attention), "output")}
    if feed_forward is not None:
        first, last = feed_forward
        taps["ffn_input"] = _Tap(first, "input")
        if last is not None:
            taps["ffn_output"] = _Tap(_own_output(last), "output")
    return {**taps, "block_output": _Tap(block, "output")}


def _attention(block: nn.Module) -> nn.Module | None:
    found = _children(block, _ATTENTION)
    if not found:
        return None
    # A wrapper around norms and attention (DBRX): its input is not normed and its output contains the residual.
    inner = _attention(found[0])
    return inner if inner is not None and _has_norm(found[0]) else found[0]


def _feed_forward(block: nn.Module) -> tuple[nn.Module, nn.Module | None] | None:
    """The first and last module of the feed-forward; the last is None if several outputs are summed."""
    found = _children(block, _FEED_FORWARD)
    if found:
        return found[0], found[0] if len(found) == 1 else None
    # OPT and others of fairseq's shape: two linear layers in the block itself.
    linear = [child for child in block.children() if hasattr(child, "in_features")]  # LoRA's wrappers too
    if len(linear) == 2 and linear[0].out_features == linear[1].in_features:
        return linear[0], linear[1]
    return None


def _children(block: nn.Module, role: re.Pattern[str]) -> list[nn.Module]:
    """The children with a role, by attribute or class name; norms and dropouts, without a matrix, are left out."""
    return [
        child
        for name, child in block.named_children()
        if (role.search(name) or role.search(_kind(child))) and not _NOT_SELF.search(name) and _has_matrix(child)
    ]


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _has_norm(module: nn.Module) -> bool:
    return any("norm" in _kind(child).lower() and not _has_matrix(child) for child in module.children())


def _own_output(module: nn.Module) -> nn.Module:
    """The module whose output to read: the sublayer's last linear layer if it adds the residual itself (BLOOM)."""
    if "residual" not in inspect.signature(module.forward).parameters:
        return module
    # A child, not any module below: under LoRA, the linear layer is a wrapper that holds several.
    return [child for child in module.children() if _has_matrix(child)][-1]

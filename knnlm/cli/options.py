"""The options that verbs share, alone and in groups that `knnlm.cli.groups` hands to a verb as one object.

A group's methods give the settings that its options make; what is heavy is imported inside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli.fields import in_options, options_of
from knnlm.cli.groups import Place
from knnlm.cli.screen import Screen

if TYPE_CHECKING:
    from knnlm.config import KNNConfig, LayerConfig, TextConfig
    from knnlm.knn.retrieval import Retrieval
    from knnlm.store.datastore import Datastore

Model = Annotated[str, typer.Option("--model", help="Hugging Face id or folder of a decoder-only causal LM."), Place()]
MaybeModel = Annotated[
    str | None, typer.Option("--model", help="Hugging Face id or folder of a decoder-only causal LM."), Place()
]
OtherModel = Annotated[
    str | None, typer.Option("--model", help="The model, when it is no longer where the datastore says."), Place()
]
Text = Annotated[
    list[str],
    typer.Option("--text", help="Files or folders (.txt .jsonl .parquet) or hf:NAME/CONFIG:SPLIT; one or more."),
    Place(),
]
MaybeText = Annotated[list[str] | None, typer.Option("--text", help="Given as for `run`."), Place()]
EvalText = Annotated[list[str], typer.Option("--eval-text", help="Evaluation text, given like --text."), Place()]
MaybeEvalText = Annotated[
    list[str] | None,
    typer.Option("--eval-text", help="Evaluation text; without it a tenth of the text is held out."),
    Place(),
]
Out = Annotated[Path, typer.Option("--out", help="Folder to make.")]
Layer = Annotated[str | None, typer.Option("--layer", help="Whose keys are searched; the chosen one.")]
Store = Annotated[Path, typer.Argument(help="Folder of a datastore.")]
Layers = Annotated[
    str | None, typer.Option("--layers", help="Layers: all, *.ffn_input, -1.*, 5.attn_input,final_norm …")
]
Candidates = Annotated[
    str, typer.Option("--candidates", help="Layers that may be chosen: candidates, residual, all, or a pattern.")
]
Select = Annotated[str, typer.Option("--select", help="What chooses: dispersion, probe, or a layer's name.")]
K = Annotated[int | None, typer.Option("--k", help="Neighbours; fitted when not given.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Of the softmax over distances; fitted when not given.")
]
Lambda = Annotated[float | None, typer.Option("--lambda", help="Weight of p_kNN, 0 to 1; fitted when not given.")]
Metric = Annotated[str, typer.Option("--metric", help="l2, cosine or ip.")]
Index = Annotated[str, typer.Option("--index", help="auto, exact, or a FAISS factory string.")]
Context = Annotated[int | None, typer.Option("--context", help="Tokens of a window; the model's limit, at most 1024.")]
Stride = Annotated[int | None, typer.Option("--stride", help="New tokens of each window; half of the context.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Of --text; all when not given.")]
EvalTokens = Annotated[int, typer.Option("--eval-tokens", help="Budget of evaluation tokens, over all documents.")]
Protocol = Annotated[
    str, typer.Option("--protocol", help="documents, or knn-transformers to compare with that project's figures.")
]
TextField = Annotated[str, typer.Option("--text-field", help="Field of .jsonl, .parquet and hub rows.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps …")]
BatchSize = Annotated[
    str, typer.Option("--batch-size", help="Windows in a forward pass; auto: as many as 4,096 tokens hold.")
]
KeyDtype = Annotated[str, typer.Option("--key-dtype", help="Of keys on disk: float16 or float32.")]
DiskBudget = Annotated[
    float | None, typer.Option("--disk-budget", help="Gigabytes that keys may take; half of the free disk.")
]
Show = Annotated[str | None, typer.Option("--show", help="Scores in the table: all, or names as probe,effective_rank.")]
Seed = Annotated[int, typer.Option("--seed")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, and nothing else.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds, if knnlm made all of it.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Which layers are looked at, and which of them is chosen."""

    layers: Layers = None
    candidates: Candidates = "candidates"
    select: Select = "dispersion"

    def config(self) -> LayerConfig:
        """The settings that the options make."""
        from knnlm.config import LayerConfig

        return LayerConfig(layers=self.layers, candidates=self.candidates, select=self.select)


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """How the kNN distribution is made and mixed in."""

    k: K = None
    temperature: Temperature = None
    lam: Lambda = None

    def config(self, *, metric: str, index: str) -> KNNConfig:
        """The settings that the options make, with those of the search."""
        from knnlm.config import KNNConfig

        return KNNConfig(k=self.k, temperature=self.temperature, lam=self.lam, metric=metric, index=index)


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """Which layer's keys of a datastore are searched, and how what is found is mixed in."""

    layer: Layer = None
    mix: MixOptions

    def open(self, store: Datastore) -> Retrieval:
        """The retrieval from a datastore."""
        from knnlm.knn.retrieval import open_retrieval

        return open_retrieval(store, self.layer, self.mix.k, self.mix.temperature, self.mix.lam)


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """How tokens become windows."""

    context: Context = None
    stride: Stride = None


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How files become documents."""

    text_field: TextField = "text"
    protocol: Protocol = "documents"


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """How the model computes."""

    dtype: Dtype = "auto"
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """How the model computes, and how many windows at once."""

    compute: ComputeOptions
    batch_size: BatchSize = "auto"


def text_config(
    windows: WindowOptions, rows: RowOptions, passes: PassOptions, *, max_tokens: int | None = None
) -> TextConfig:
    """How text becomes batches of windows."""
    from knnlm.config import TextConfig

    return TextConfig(
        context=windows.context,
        stride=windows.stride,
        max_tokens=max_tokens,
        text_field=rows.text_field,
        protocol=rows.protocol,
        windows=batch_windows(passes.batch_size),
    )


def batch_windows(batch_size: str) -> int | None:
    """The number that --batch-size gives; None for auto."""
    if batch_size == "auto":
        return None
    if not batch_size.isdecimal():
        raise typer.BadParameter(f"{batch_size!r} is neither auto nor a number", param_hint="--batch-size")
    return int(batch_size)


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a command shows, and how."""

    call: typer.Context
    json: Json = False

    def screen(self) -> Screen:
        """The terminal, which names the verb's options where the library names fields."""
        return open_screen(self.call, as_json=self.json)


def open_screen(call: typer.Context, *, as_json: bool = False) -> Screen:
    """The terminal of a verb."""
    options = options_of(call.command)
    return Screen(as_json, lambda line: in_options(line, options))

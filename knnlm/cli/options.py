"""Options shared by verbs, single and in groups that `knnlm.cli.groups` passes to a verb as one object.

A group's methods return the settings made from its options; heavy imports are inside them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli.fields import in_options, options_of
from knnlm.cli.groups import Place
from knnlm.cli.screen import Screen

if TYPE_CHECKING:
    from knnlm.cluster.core import Cluster
    from knnlm.config import KNNConfig, LayerConfig, TextConfig
    from knnlm.knn.retrieval import Retrieval
    from knnlm.knn.searcher import OpenIndex
    from knnlm.store.joint import AnyStore

Model = Annotated[str, typer.Option("--model", help="Hugging Face id or folder of a decoder-only causal LM."), Place()]
MaybeModel = Annotated[
    str | None, typer.Option("--model", help="Hugging Face id or folder of a decoder-only causal LM."), Place()
]
OtherModel = Annotated[str | None, typer.Option("--model", help="The datastore's model, if it has moved."), Place()]
Text = Annotated[
    list[str],
    typer.Option("--text", help="One or more files, folders (.txt .jsonl .parquet) or hf:NAME/CONFIG:SPLIT."),
    Place(),
]
MaybeText = Annotated[list[str] | None, typer.Option("--text", help="Text to score, as for `run`."), Place()]
EvalText = Annotated[list[str], typer.Option("--eval-text", help="Evaluation text, in the forms of --text."), Place()]
MaybeEvalText = Annotated[
    list[str] | None,
    typer.Option("--eval-text", help="Evaluation text; default: a tenth of the text is held out."),
    Place(),
]
Out = Annotated[Path, typer.Option("--out", help="Folder to create.")]
Layer = Annotated[str | None, typer.Option("--layer", help="Layer whose keys are searched; default: the chosen one.")]
Store = Annotated[Path, typer.Argument(help="Folder of a datastore, or hf:USER/NAME[@REVISION] on the hub.")]
Stores = Annotated[
    list[Path], typer.Argument(help="Folder of a datastore, or hf:USER/NAME on the hub; several are searched as one.")
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", help="With several datastores, what each one's neighbours count for: 1,0.5; default: 1 each."
    ),
]
Layers = Annotated[
    str | None, typer.Option("--layers", help="Layers: all, *.ffn_input, -1.*, 5.attn_input,final_norm …")
]
Candidates = Annotated[
    str, typer.Option("--candidates", help="Layers to choose from: candidates, residual, all, or a pattern.")
]
Select = Annotated[
    str, typer.Option("--select", help="How the layer is chosen: auto, dispersion, probe, pilot, or a layer's name.")
]
K = Annotated[int | None, typer.Option("--k", help="Number of neighbours; default: fitted.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Temperature of the softmax over distances; default: fitted.")
]
Lambda = Annotated[float | None, typer.Option("--lambda", help="Weight of p_kNN, 0 to 1; default: fitted.")]
MaxCopy = Annotated[
    int | None,
    typer.Option("--max-copy", help="Longest run of tokens taken verbatim from one document; default: no limit."),
]
Metric = Annotated[str, typer.Option("--metric", help="Distance: l2, cosine or ip.")]
Index = Annotated[str, typer.Option("--index", help="Index: auto, exact, or a FAISS factory string.")]
Context = Annotated[
    int | None, typer.Option("--context", help="Tokens in a window; default: the model's limit, at most 1024.")
]
Stride = Annotated[
    int | None, typer.Option("--stride", help="New tokens in each further window; default: half of the context.")
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", help="Maximum number of tokens of --text; default: all.")
]
EvalTokens = Annotated[
    int, typer.Option("--eval-tokens", help="Maximum number of evaluation tokens, spread over all documents.")
]
Protocol = Annotated[
    str,
    typer.Option(
        "--protocol", help="How text is cut into windows: documents, or knn-transformers, to compare with that project."
    ),
]
TextField = Annotated[str, typer.Option("--text-field", help="Field with the text in .jsonl, .parquet and hub rows.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Type to compute in: auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="Device: auto, cpu, cuda, cuda:1, mps …")]
BatchSize = Annotated[
    str, typer.Option("--batch-size", help="Windows in a forward pass; auto: as many as fit in 4,096 tokens.")
]
KeyDtype = Annotated[str, typer.Option("--key-dtype", help="Type of keys on disk: float16 or float32.")]
DiskBudget = Annotated[
    float | None, typer.Option("--disk-budget", help="Maximum size of the keys in GB; default: half of the free disk.")
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", help="Memory that the process may take without mapped files, such as 2GB; default: free."),
]
Show = Annotated[
    str | None, typer.Option("--show", help="Scores in the table: all, or names such as probe,effective_rank.")
]
AllLayers = Annotated[bool, typer.Option("--all", help="Show all layers, not only the ten best.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn at random.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Say more, such as the type that a model is computed in.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace --out if knnlm made all of it.")]
Ray = Annotated[
    str | None,
    typer.Option("--ray", help="Ray cluster to work on: local (this machine), auto, or HOST:PORT; default: without."),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Allow Python code that comes with the model to run.")]


@contextmanager
def cluster(address: str | None, *, trust: bool) -> Iterator[Cluster | None]:
    """The cluster given as --ray, for the duration of the block. What Ray prints goes to standard error."""
    if address is None:
        yield None
        return
    from knnlm.cluster.core import open_cluster

    # Of lost machines Ray tells on standard output, where results are expected.
    with redirect_stdout(sys.stderr), open_cluster(address, trust_remote_code=trust) as opened:
        yield opened


@contextmanager
def actors(address: str | None, *, trust: bool) -> Iterator[OpenIndex | None]:
    """What opens indexes on the cluster given as --ray, for the duration of the block; None: this process."""
    with cluster(address, trust=trust) as opened:
        if opened is None:
            yield None
            return
        from knnlm.cluster.search import ClusterSearch

        yield ClusterSearch(opened)


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """A datastore, or several that are searched as one."""

    store: Stores
    weights: Weights = None

    def open(self) -> AnyStore:
        """Open what is given; a single datastore has no weights."""
        from knnlm.store.joint import as_store

        return as_store(self.store, None if self.weights is None else _weights(self.weights))

    def told(self) -> dict[str, object]:
        """For JSON: the datastore as it was named, or all, with their weights as given."""
        names = [str(one) for one in self.store]
        if len(names) == 1:
            return {"store": names[0]}
        return {"store": names, "weights": [1.0] * len(names) if self.weights is None else _weights(self.weights)}


def _weights(given: str) -> list[float]:
    try:
        return [float(one) for one in given.split(",")]
    except ValueError:
        message = f"{given!r} is not one number for each datastore, with commas between them"
        raise typer.BadParameter(message, param_hint="--weights") from None


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Which layers are used, and how one of them is chosen."""

    layers: Layers = None
    candidates: Candidates = "candidates"
    select: Select = "auto"

    def config(self) -> LayerConfig:
        """The settings made from the options."""
        from knnlm.config import LayerConfig

        return LayerConfig(layers=self.layers, candidates=self.candidates, select=self.select)


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """How the kNN distribution is computed and mixed with the LM's."""

    k: K = None
    temperature: Temperature = None
    lam: Lambda = None

    def config(self, *, metric: str, index: str) -> KNNConfig:
        """The settings made from the options and those of the search."""
        from knnlm.config import KNNConfig

        return KNNConfig(k=self.k, temperature=self.temperature, lam=self.lam, metric=metric, index=index)


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """Which layer's keys are searched, and how the kNN distribution is mixed with the LM's."""

    layer: Layer = None
    mix: MixOptions

    def open(self, store: AnyStore, memory: float | None = None, opening: OpenIndex | None = None) -> Retrieval:
        """Open the retrieval from a datastore, or several; `memory` and `opening` as in `open_retrieval`."""
        from knnlm.knn.retrieval import open_retrieval

        return open_retrieval(store, self.layer, self.mix.k, self.mix.temperature, self.mix.lam, memory, opening)


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """How tokens are cut into windows."""

    context: Context = None
    stride: Stride = None


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How files are read as documents."""

    text_field: TextField = "text"
    protocol: Protocol = "documents"


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Data type and device of the model."""

    dtype: Dtype = "auto"
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """Data type and device of the model, and windows in a forward pass."""

    compute: ComputeOptions
    batch_size: BatchSize = "auto"


def text_config(
    windows: WindowOptions, rows: RowOptions, passes: PassOptions, *, max_tokens: int | None = None
) -> TextConfig:
    """Settings of how text becomes batches of windows."""
    from knnlm.config import TextConfig

    return TextConfig(
        context=windows.context,
        stride=windows.stride,
        max_tokens=max_tokens,
        text_field=rows.text_field,
        protocol=rows.protocol,
        windows=batch_windows(passes.batch_size),
    )


def memory_bytes(memory: str | None) -> float | None:
    """Return the bytes given as --memory."""
    from knnlm.memory import parse_size

    return None if memory is None else parse_size(memory)


def batch_windows(batch_size: str) -> int | None:
    """Return the number given as --batch-size; None for auto."""
    if batch_size == "auto":
        return None
    if not batch_size.isdecimal():
        raise typer.BadParameter(f"{batch_size!r} is neither auto nor a number", param_hint="--batch-size")
    return int(batch_size)


@dataclass(frozen=True, kw_only=True)
class Output:
    """How a verb's output is shown."""

    call: typer.Context
    json: Json = False
    verbose: Verbose = False

    def screen(self) -> Screen:
        """The screen, which translates fields into the verb's options."""
        return open_screen(self.call, as_json=self.json, verbose=self.verbose)


def open_screen(call: typer.Context, *, as_json: bool = False, verbose: bool = False) -> Screen:
    """The screen of a verb."""
    options = options_of(call.command)
    return Screen(as_json, lambda line: in_options(line, options))

"""The options that verbs share; a verb gives the defaults, as its own signature shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", help="Hugging Face id or folder of a decoder-only causal LM.")]
MaybeModel = Annotated[
    str | None, typer.Option("--model", help="Hugging Face id or folder of a decoder-only causal LM.")
]
OtherModel = Annotated[
    str | None, typer.Option("--model", help="The model, when it is no longer where the datastore says.")
]
Text = Annotated[
    list[str],
    typer.Option("--text", help="Files or folders (.txt .jsonl .parquet) or hf:NAME/CONFIG:SPLIT; one or more."),
]
MaybeText = Annotated[list[str] | None, typer.Option("--text", help="Given as for `run`.")]
EvalText = Annotated[list[str], typer.Option("--eval-text", help="Evaluation text, given like --text.")]
MaybeEvalText = Annotated[
    list[str] | None, typer.Option("--eval-text", help="Evaluation text; without it a tenth of the text is held out.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to make.")]
Store = Annotated[Path, typer.Argument(help="Folder of a datastore.")]
Layers = Annotated[
    str | None, typer.Option("--layers", help="Layers: all, *.ffn_input, -1.*, 5.attn_input,final_norm …")
]
Candidates = Annotated[
    str, typer.Option("--candidates", help="Layers that may be chosen: candidates, residual, all, or a pattern.")
]
Select = Annotated[str, typer.Option("--select", help="What chooses: dispersion, probe, or a layer's name.")]
Layer = Annotated[str | None, typer.Option("--layer", help="Whose keys are searched; the chosen one.")]
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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds, if knnlm made it.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]

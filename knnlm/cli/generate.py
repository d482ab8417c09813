"""The verb `generate`: text from a datastore's kNN-LM."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import options
from knnlm.cli.shared import load_own, read_standard_input, setting_document

if TYPE_CHECKING:
    from knnlm.inference.writer import Writer


Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", help="Text to continue; may be repeated. Default: standard input.")
]
Length = Annotated[int, typer.Option("--max-new-tokens", help="Maximum number of tokens to generate for each prompt.")]
Sharpness = Annotated[
    float | None,
    typer.Option("--temperature-lm", help="Sample tokens at this temperature; without it and --top-p: greedy."),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Nucleus sampling: sample among the likeliest tokens with this total probability."),
]
Stream = Annotated[bool, typer.Option("--stream", help="Print the text while it is generated.")]


def generate(
    *,
    stores: options.StoreOptions,
    prompt: Prompts = None,
    max_new_tokens: Length = 64,
    temperature_lm: Sharpness = None,
    top_p: TopP = None,
    max_copy: options.MaxCopy = None,
    seed: options.Seed = 0,
    stream: Stream = False,
    retrieving: options.RetrievalOptions,
    model: options.OtherModel = None,
    compute: options.ComputeOptions,
    output: options.Output,
    trust_remote_code: options.Trust = False,
) -> None:
    """Continue a text with the kNN-LM of a datastore, or of several.

    Example: knnlm generate nursing.knn --prompt "The patient was given" --top-p 0.9
    """
    if stream and output.json:
        raise typer.BadParameter("--stream shows text, --json one document; take one of them")
    from torch import manual_seed

    from knnlm.config import check_seed
    from knnlm.inference.model import KNNLM
    from knnlm.inference.writer import Decoding, Writer

    check_seed(seed)
    decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature_lm, top_p=top_p, max_copy=max_copy)
    opened = stores.open()
    retrieval = retrieving.open(opened)
    screen = output.screen()
    prompts = prompt or [read_standard_input("--prompt", screen)]
    lm = load_own(opened, model, compute, trust_remote_code, screen)
    writer = Writer(KNNLM.from_retrieval(lm, retrieval), lm, decoding)
    for one in prompts:
        writer.encode(one)
    manual_seed(seed)
    continuations = [_show(writer, one, stream, output.json) for one in prompts]
    screen.result(
        {
            **stores.told(),
            "model": lm.name,
            **setting_document(retrieval),
            "seed": seed,
            "continuations": continuations,
        }
    )


def _show(writer: Writer, prompt: str, stream: bool, json: bool) -> dict[str, object]:
    """Generate; print prompt and continuation as one text, unless JSON is printed later."""
    from dataclasses import asdict

    if stream:
        _write(prompt)
        done = writer(prompt, _write)
        _write("\n")
    else:
        done = writer(prompt)
        if not json:
            _write(f"{prompt}{done.text}\n")
    return asdict(done)


def _write(text: str) -> None:
    """Print text unchanged: rich would wrap lines and expand tabs."""
    sys.stdout.write(text)
    sys.stdout.flush()

"""What `score --vectors` takes, and what of the other options it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import options
from knnlm.cli.screen import Screen
from knnlm.cli.shared import check_show, load, settings_from, show_scores
from knnlm.errors import InputError

if TYPE_CHECKING:
    from knnlm.results import ScoreResult, VectorScores

TAKES = ("vectors", "labels", "out", "overwrite", "show", "seed", "json")


def score(
    call: typer.Context,
    model: options.MaybeModel = None,
    text: options.MaybeText = None,
    vectors: Annotated[
        list[Path] | None,
        typer.Option(
            "--vectors", help="Instead of a model and text: .npy files, [rows, dimension] or [rows, T, dimension]."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="A .npy file with an integer for each row of --vectors: for the probe."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the scores to this JSON file.")] = None,
    layers: options.Layers = None,
    candidates: options.Candidates = "candidates",
    select: options.Select = "dispersion",
    stop_early: Annotated[bool, typer.Option("--stop-early", help="Stop as soon as the choice is settled.")] = False,
    context: options.Context = None,
    stride: options.Stride = None,
    max_tokens: options.MaxTokens = None,
    text_field: options.TextField = "text",
    protocol: options.Protocol = "documents",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    batch_size: options.BatchSize = "auto",
    seed: options.Seed = 0,
    show: options.Show = None,
    json: options.Json = False,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Dispersion of every candidate layer, and what would be chosen; writes nothing unless --out.

    Example: knnlm score --model gpt2 --text nursing.jsonl --max-tokens 200000
    """
    settings = settings_from(locals())
    from knnlm.files import check_new_file, write_json
    from knnlm.text.corpus import check_paths

    check_show(show)
    if out is not None:
        check_new_file(out, overwrite=overwrite)
    screen = Screen(json)
    result: ScoreResult | VectorScores
    if vectors:
        result = score_files(call, vectors, labels, seed, screen)
    else:
        model, texts = check_given(model, text, labels)
        check_paths(texts)
        lm = load(model, dtype, device, trust_remote_code, screen)
        from knnlm.pipeline import score as score_pipeline

        result = score_pipeline(lm, texts, settings=settings, stop_early=stop_early, progress=screen)
    document = show_scores(result, screen, show)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, document)


def score_files(
    call: typer.Context, vectors: Sequence[Path], labels: Path | None, seed: int, screen: Screen
) -> VectorScores:
    """Scores of .npy files; nothing of a language model is loaded.

    :raises InputError: an option was given that vectors have no use for.
    """
    given = [parameter.name for parameter in call.command.params if _given(call, parameter.name or "")]
    if others := [name for name in given if name not in TAKES]:
        named = ", ".join(f"--{(name or '').replace('_', '-')}" for name in others)
        raise InputError(f"--vectors are scored without a model and a text; leave out {named}")
    from knnlm.scores.vectors import score_vectors  # torch

    return score_vectors(vectors, labels=labels, seed=seed, progress=screen)


def _given(call: typer.Context, name: str) -> bool:
    source = call.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_given(model: str | None, text: Sequence[str] | None, labels: Path | None) -> tuple[str, Sequence[str]]:
    """The model and the text of a score without --vectors.

    :raises InputError: one of them is missing, or there are labels.
    """
    if labels is not None:
        raise InputError(f"--labels {labels} are of --vectors, which are missing")
    if model is None or not text:
        raise InputError(
            "knnlm score needs --model and --text, or --vectors alone; knnlm score --help lists the options"
        )
    return model, text

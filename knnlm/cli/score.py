"""The verb `score`, for a model and text, or for vectors from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import options
from knnlm.cli.fields import options_of
from knnlm.cli.screen import Screen
from knnlm.cli.shared import check_show, check_texts, load, show_scores
from knnlm.errors import InputError

if TYPE_CHECKING:
    from knnlm.config import Settings
    from knnlm.results import ScoreResult, VectorScores

TAKES = ("vectors", "labels", "out", "overwrite", "show", "seed", "json")


Vectors = Annotated[
    list[Path] | None,
    typer.Option(
        "--vectors", help="In place of --model and --text: .npy files, [rows, dimension] or [rows, T, dimension]."
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option("--labels", help="A .npy file with an integer for each row of --vectors, for the probe."),
]
OutFile = Annotated[Path | None, typer.Option("--out", help="JSON file to write the scores to.")]
StopEarly = Annotated[bool, typer.Option("--stop-early", help="Stop once the choice is settled.")]


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options that become the settings of `knnlm.score`, and whether it stops early."""

    layers: options.LayerOptions
    stop_early: StopEarly = False
    windows: options.WindowOptions
    max_tokens: options.MaxTokens = None
    rows: options.RowOptions
    passes: options.PassOptions
    seed: options.Seed = 0

    def settings(self) -> Settings:
        """The settings, checked."""
        from knnlm.config import Settings

        return Settings(
            text=options.text_config(self.windows, self.rows, self.passes, max_tokens=self.max_tokens),
            layers=self.layers.config(),
            seed=self.seed,
        )


def score(
    *,
    model: options.MaybeModel = None,
    text: options.MaybeText = None,
    vectors: Vectors = None,
    labels: Labels = None,
    out: OutFile = None,
    given: ScoreOptions,
    show: options.Show = None,
    output: options.Output,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Score layers by dispersion and other label-free scores, and show which would be chosen.

    Example: knnlm score --model gpt2 --text nursing.jsonl --max-tokens 200000
    """
    settings = given.settings()
    from knnlm.files import all_or_none, write_json

    check_show(show)
    inputs = (model, *(text or ()), *(vectors or ()), labels)
    check_out(out, overwrite, inputs)
    screen = output.screen()
    result: ScoreResult | VectorScores
    if vectors:
        result = score_files(output.call, vectors, labels, settings.seed, screen)
    else:
        model, texts = check_given(model, text, labels)
        check_texts(texts, text_field=given.rows.text_field)
        lm = load(model, given.passes.compute, trust_remote_code, screen, layers=settings.layers)
        from knnlm.pipeline import score as score_pipeline

        result = score_pipeline(lm, texts, settings=settings, stop_early=given.stop_early, progress=screen)
    document = show_scores(result, screen, show)
    if out is not None:
        with all_or_none(out):
            check_out(out, overwrite, inputs)  # again: by now somebody may have made a file there
            write_json(out, document)


def check_out(out: Path | None, overwrite: bool, inputs: Sequence[str | Path | None]) -> None:
    """Check before any work that the scores can be written."""
    from knnlm.places import check_scores_file

    if out is not None:
        check_scores_file(out, overwrite=overwrite, inputs=[one for one in inputs if one is not None])


def score_files(
    call: typer.Context, vectors: Sequence[Path], labels: Path | None, seed: int, screen: Screen
) -> VectorScores:
    """Score .npy files; no language model is loaded.

    :raises InputError: an option was given that does not apply to vectors.
    """
    if others := [
        option for name, option in options_of(call.command).items() if _given(call, name) and name not in TAKES
    ]:
        raise InputError(f"--vectors are scored without a model and a text; leave out {', '.join(others)}")
    from knnlm.scores.vectors import score_vectors  # torch

    return score_vectors(vectors, labels=labels, seed=seed, progress=screen)


def _given(call: typer.Context, name: str) -> bool:
    source = call.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_given(model: str | None, text: Sequence[str] | None, labels: Path | None) -> tuple[str, Sequence[str]]:
    """Return the model and the text, both required without --vectors.

    :raises InputError: one of them is missing, or labels were given.
    """
    if labels is not None:
        raise InputError(f"--labels {labels} are of --vectors, which are missing")
    if model is None or not text:
        raise InputError(
            "knnlm score needs --model and --text, or --vectors alone; knnlm score --help lists the options"
        )
    return model, text

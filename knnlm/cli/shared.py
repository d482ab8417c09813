"""Functions shared by verbs: checking texts, loading the model, showing results."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from knnlm.cli.options import ComputeOptions
from knnlm.cli.screen import Screen

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from knnlm.config import LayerConfig
    from knnlm.knn.retrieval import Retrieval
    from knnlm.model.lm import LanguageModel
    from knnlm.results import EvalResult, ScoreResult, VectorScores
    from knnlm.store.joint import AnyStore


def check_texts(paths: Sequence[str], *, text_field: str) -> None:
    """Read the first document of each path, so that missing text is reported before a model is loaded.

    :raises InputError: a path is missing, or the first document under it cannot be read or has no such field.
    """
    from knnlm.places import HUB_PREFIX
    from knnlm.text.corpus import check_paths, read_documents

    check_paths(paths)
    for path in paths:
        if not path.startswith(HUB_PREFIX):
            next(read_documents([path], text_field=text_field), None)


def load(
    name: str, compute: ComputeOptions, trust: bool, screen: Screen, *, layers: LayerConfig | None = None
) -> LanguageModel:
    """Load a model; its notes go to the screen, and with --verbose its details, such as why float32 was taken.

    :param layers: layer settings to check against the model before its weights are read.
    """
    with screen.stage("loading the model", "bytes") if quiet_loading(name) else nullcontext():
        from knnlm.model.loading import load_model  # seconds

        if layers is not None:
            _check_layers(name, layers, trust)
        lm = load_model(name, dtype=compute.dtype, device=compute.device, trust_remote_code=trust)
    for note in lm.notes:
        screen.note(note)
    for detail in (f"computed in {str(lm.dtype).removeprefix('torch.')} on {lm.device}", *lm.details):
        screen.detail(detail)
    return lm


def load_own(store: AnyStore, model: str | None, compute: ComputeOptions, trust: bool, screen: Screen) -> LanguageModel:
    """Load a datastore's model, or the one given in its place. Raises as `own_model`."""
    from knnlm.inference.own_model import own_model

    with own_model(store, model) as name:
        return load(name, compute, trust, screen)


def _check_layers(model: str, layers: LayerConfig, trust: bool) -> None:
    """:raises LayerError: a pattern matches no layer of the model."""
    from knnlm.errors import LayerError, ModelError
    from knnlm.layer_names import select_layers
    from knnlm.model.loading import read_outline
    from knnlm.pipeline.plan import check_layers

    try:
        names = read_outline(model, trust_remote_code=trust).layer_names
        check_layers(layers, select_layers(layers.layers or "all", names), names)
    except LayerError:
        raise
    except ModelError:  # loading the model reports it in full
        return


def quiet_loading(name: str) -> bool:
    """Return whether the model is a local folder, and if so turn off Hugging Face's progress bars."""
    local = Path(name).is_dir()
    if local:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return local


def read_standard_input(option: str, screen: Screen) -> str:
    """Return the text of standard input, which stands in for an option, without its last line break."""
    if sys.stdin.isatty():
        screen.note("Type a text; Ctrl-D ends it.")
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"standard input is not UTF-8 at byte {error.start}", param_hint=option) from None
    if not text:
        raise typer.BadParameter(f"standard input is empty; give {option} TEXT", param_hint=option)
    return text.removesuffix("\n")


def setting_document(retrieval: Retrieval) -> dict[str, object]:
    """Layer and setting for JSON; `gate` is null where lambda is the same for all queries."""
    return {"layer": retrieval.layer, **with_lambda(retrieval.setting)}


def with_lambda(one: DataclassInstance) -> dict[str, object]:
    """Fields for JSON, with `lam` as `lambda`, which Python does not allow as a name."""
    return {"lambda" if name == "lam" else name: value for name, value in asdict(one).items()}


def check_show(show: str | None) -> None:
    """:raises InputError: `--show` names an unknown score."""
    from knnlm.cli.tables import shown_scores

    shown_scores(show, ())


def show_evaluation(
    result: EvalResult, screen: Screen, folder: Path | None, show: str | None = None, *, all_layers: bool = False
) -> None:
    """Write the report and show the result; if writing fails, the result is still shown."""
    from knnlm.cli.tables import choice_lines, eval_table, rest_line
    from knnlm.documents import to_document
    from knnlm.report import write_reports

    try:
        if folder is not None:
            with screen.stage("writing the report", "files"):
                write_reports(result, folder)
    finally:
        screen.say(eval_table(result, show, all_layers=all_layers))
        if not all_layers and (rest := rest_line(result)):
            screen.say(rest)
        for line in choice_lines(result):
            screen.say(line)
        screen.result(to_document(result))


def show_scores(result: ScoreResult | VectorScores, screen: Screen, show: str | None) -> dict[str, Any]:
    """Show the scores and the choice; return the JSON document."""
    from knnlm.cli.tables import choice_lines, score_table
    from knnlm.documents import score_document

    screen.say(score_table(result, show))
    for line in choice_lines(result):
        screen.say(line)
    document = score_document(result)
    screen.result(document)
    return document

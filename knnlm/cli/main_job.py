"""The verbs of the main job: build, score, choose, index, evaluate; and two that look at what was made.

`knnlm.pipeline` is imported after the model is loaded: what takes seconds to import is imported while loading is shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import options
from knnlm.cli.describe import show_store
from knnlm.cli.shared import check_show, load, settings_from, show_evaluation, show_scores
from knnlm.cli.vectors import check_given, score_files
from knnlm.screen import Screen

if TYPE_CHECKING:
    from knnlm.results import ScoreResult, VectorScores


def run(
    model: options.Model,
    text: options.Text,
    out: options.Out,
    eval_text: options.MaybeEvalText = None,
    layers: options.Layers = None,
    candidates: options.Candidates = "candidates",
    select: options.Select = "dispersion",
    k: options.K = None,
    temperature: options.Temperature = None,
    lam: options.Lambda = None,
    metric: options.Metric = "l2",
    index: options.Index = "auto",
    context: options.Context = None,
    stride: options.Stride = None,
    max_tokens: options.MaxTokens = None,
    eval_tokens: options.EvalTokens = 20_000,
    text_field: options.TextField = "text",
    protocol: options.Protocol = "documents",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    batch_size: options.BatchSize = "auto",
    key_dtype: options.KeyDtype = "float16",
    disk_budget: options.DiskBudget = None,
    seed: options.Seed = 0,
    show: options.Show = None,
    json: options.Json = False,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """The whole way: build, score, choose, evaluate every layer, index the chosen one.

    Example: knnlm run --model gpt2 --text nursing.jsonl --out nursing.knn
    """
    settings = settings_from(locals())
    from knnlm.corpus import check_paths
    from knnlm.places import check_new_folder

    check_show(show)
    check_new_folder(out, overwrite=overwrite)
    check_paths([*text, *(eval_text or ())])
    screen = Screen(json)
    lm = load(model, dtype, device, trust_remote_code, screen)
    from knnlm.pipeline import run as run_pipeline

    result = run_pipeline(lm, text, out, eval_text=eval_text, settings=settings, overwrite=overwrite, progress=screen)
    show_evaluation(result, screen, out, show)


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
    from knnlm.corpus import check_paths
    from knnlm.places import check_new_file
    from knnlm.storage import write_json

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


def build(
    model: options.Model,
    text: options.Text,
    out: options.Out,
    layers: options.Layers = None,
    candidates: options.Candidates = "candidates",
    select: options.Select = "dispersion",
    k: options.K = None,
    metric: options.Metric = "l2",
    index: options.Index = "auto",
    context: options.Context = None,
    stride: options.Stride = None,
    max_tokens: options.MaxTokens = None,
    text_field: options.TextField = "text",
    protocol: options.Protocol = "documents",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    batch_size: options.BatchSize = "auto",
    key_dtype: options.KeyDtype = "float16",
    seed: options.Seed = 0,
    json: options.Json = False,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Choose a layer on a sample (or take --layers), write the datastore and its index.

    Example: knnlm build --model gpt2 --text nursing.jsonl --out nursing.knn
    """
    settings = settings_from(locals())
    from knnlm.corpus import check_paths
    from knnlm.places import check_new_folder

    check_new_folder(out, overwrite=overwrite)
    check_paths(text)
    screen = Screen(json)
    lm = load(model, dtype, device, trust_remote_code, screen)
    from knnlm.pipeline import build as build_pipeline

    store = build_pipeline(lm, text, out, settings=settings, overwrite=overwrite, progress=screen)
    show_store(store.describe(), screen)


def evaluate(
    store: options.Store,
    eval_text: options.EvalText,
    model: options.OtherModel = None,
    layers: options.Layers = None,
    k: options.K = None,
    temperature: options.Temperature = None,
    lam: options.Lambda = None,
    metric: options.Metric = "l2",
    index: Annotated[str, typer.Option("--index", help="auto: the datastore's own; exact: search exactly.")] = "auto",
    context: options.Context = None,
    stride: options.Stride = None,
    eval_tokens: options.EvalTokens = 20_000,
    text_field: options.TextField = "text",
    protocol: options.Protocol = "documents",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    batch_size: options.BatchSize = "auto",
    seed: options.Seed = 0,
    report: Annotated[Path | None, typer.Option("--report", help="Write report.json and report.html here.")] = None,
    show: options.Show = None,
    json: options.Json = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Perplexity of the LM and of the kNN-LM for every layer in the store.

    Example: knnlm eval nursing.knn --eval-text held-out.jsonl
    """
    settings = settings_from(locals())
    from knnlm.corpus import check_paths
    from knnlm.datastore import Datastore
    from knnlm.places import check_report_folder
    from knnlm.search import searched_layers

    check_show(show)
    if report is not None:
        check_report_folder(report)
    opened = Datastore.open(store)
    searched_layers(opened, settings)
    check_paths(eval_text)
    screen = Screen(json)
    lm = load(model or opened.manifest.model, dtype, device, trust_remote_code, screen)
    from knnlm.pipeline import evaluate as evaluate_pipeline

    result = evaluate_pipeline(lm, opened, eval_text, settings=settings, progress=screen)
    show_evaluation(result, screen, report, show)


def info(store: options.Store, json: options.Json = False) -> None:
    """What a datastore is: model, layers, keys, bytes, index, scores.

    Example: knnlm info nursing.knn
    """
    from knnlm.datastore import Datastore

    show_store(Datastore.open(store).describe(), Screen(json))


def verify(store: options.Store, json: options.Json = False) -> None:
    """Whether a datastore is whole: every file's size and checksum, and every index.

    Example: knnlm verify nursing.knn
    """
    from knnlm.indexing import verify_store

    screen = Screen(json)
    problems = verify_store(store, screen)
    screen.result({"store": str(store), "whole": not problems, "problems": problems})
    for problem in problems:
        screen.say(problem)
    if problems:
        raise typer.Exit(2)
    screen.say(f"{store} is whole")

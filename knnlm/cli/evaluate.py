"""`knnlm eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knnlm.cli import options
from knnlm.cli.screen import Screen
from knnlm.cli.shared import check_show, load, settings_from, show_evaluation


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
    from knnlm.files import check_report_folder
    from knnlm.knn.searcher import searched_layers
    from knnlm.store.datastore import Datastore
    from knnlm.text.corpus import check_paths

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

"""`knnlm eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import options
from knnlm.cli.shared import check_show, check_texts, load_own, show_evaluation

if TYPE_CHECKING:
    from knnlm.config import Settings

OwnIndex = Annotated[str, typer.Option("--index", help="auto: the datastore's own index; exact: exact search.")]
FitWeights = Annotated[bool, typer.Option("--fit-weights", help="Also fit what each of several datastores counts for.")]
Report = Annotated[Path | None, typer.Option("--report", help="Folder for report.json and report.html.")]


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options that become the settings of `knnlm.evaluate`."""

    layers: options.Layers = None
    mix: options.MixOptions
    metric: options.Metric = "l2"
    index: OwnIndex = "auto"
    windows: options.WindowOptions
    eval_tokens: options.EvalTokens = 20_000
    rows: options.RowOptions
    passes: options.PassOptions
    memory: options.Memory = None
    seed: options.Seed = 0

    def settings(self) -> Settings:
        """The settings, checked."""
        from knnlm.config import EvalConfig, LayerConfig, Settings

        return Settings(
            text=options.text_config(self.windows, self.rows, self.passes),
            layers=LayerConfig(layers=self.layers),
            knn=self.mix.config(metric=self.metric, index=self.index),
            evaluation=EvalConfig(eval_tokens=self.eval_tokens),
            memory=options.memory_bytes(self.memory),
            seed=self.seed,
        )


def evaluate(
    *,
    stores: options.StoreOptions,
    eval_text: options.EvalText,
    model: options.OtherModel = None,
    given: EvalOptions,
    verify: Annotated[
        bool, typer.Option("--verify", help="First verify the checksums of the files that are read.")
    ] = False,
    report: Report = None,
    fit_weights: FitWeights = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do not store the fitted k, λ and T.")] = False,
    show: options.Show = None,
    all_layers: options.AllLayers = False,
    address: options.Ray = None,
    output: options.Output,
    trust_remote_code: options.Trust = False,
) -> None:
    """Measure the perplexity of the LM, and of the kNN-LM for every layer of a datastore, or of several.

    Example: knnlm eval nursing.knn --eval-text held-out.jsonl
    """
    settings = given.settings()
    from knnlm.knn.indexing import check_before_use
    from knnlm.knn.searcher import is_exact, searched_layers
    from knnlm.places import check_report_folder

    check_show(show)
    if report is not None:
        check_report_folder(report)
    opened = stores.open()
    layers_read = searched_layers(opened, settings)
    check_texts(eval_text, text_field=given.rows.text_field)
    screen = output.screen()
    if verify:
        for one in opened.stores:
            check_before_use(one, layers_read, screen, exact=is_exact(settings.knn.index))
    from knnlm.pipeline import evaluate as evaluate_pipeline

    with options.cluster(address, trust=trust_remote_code) as cluster:
        lm = load_own(opened, model, given.passes.compute, trust_remote_code, screen)
        result = evaluate_pipeline(
            lm,
            opened,
            eval_text,
            settings=settings,
            fit_weights=fit_weights,
            dry_run=dry_run,
            cluster=cluster,
            progress=screen,
        )
    show_evaluation(result, screen, report, show, all_layers=all_layers)
    if report is not None:
        screen.say(f"Report: {report / 'report.html'}")

"""`knnlm run`.

`knnlm.pipeline` takes seconds to import. It is imported after the model, whose loading shows progress.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from knnlm.cli import options
from knnlm.cli.shared import check_show, check_texts, load, show_evaluation

if TYPE_CHECKING:
    from knnlm.config import Settings


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options that become the settings of `knnlm.run`."""

    layers: options.LayerOptions
    mix: options.MixOptions
    metric: options.Metric = "l2"
    index: options.Index = "auto"
    windows: options.WindowOptions
    max_tokens: options.MaxTokens = None
    eval_tokens: options.EvalTokens = 20_000
    rows: options.RowOptions
    passes: options.PassOptions
    key_dtype: options.KeyDtype = "float16"
    disk_budget: options.DiskBudget = None
    memory: options.Memory = None
    seed: options.Seed = 0

    def settings(self) -> Settings:
        """The settings, checked."""
        from knnlm.config import EvalConfig, Settings

        return Settings(
            text=options.text_config(self.windows, self.rows, self.passes, max_tokens=self.max_tokens),
            layers=self.layers.config(),
            knn=self.mix.config(metric=self.metric, index=self.index),
            evaluation=EvalConfig(eval_tokens=self.eval_tokens),
            key_dtype=self.key_dtype,
            disk_budget=None if self.disk_budget is None else self.disk_budget * 1e9,
            memory=options.memory_bytes(self.memory),
            seed=self.seed,
        )


def run(
    *,
    model: options.Model,
    text: options.Text,
    out: options.Out,
    eval_text: options.MaybeEvalText = None,
    given: RunOptions,
    show: options.Show = None,
    all_layers: options.AllLayers = False,
    output: options.Output,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Do everything: score all layers, choose one, build and evaluate those that can matter, index the chosen one.

    Example: knnlm run --model gpt2 --text nursing.jsonl --out nursing.knn
    """
    settings = given.settings()
    from knnlm.places import as_list, check_new_folder, work_of

    check_show(show)
    inputs, work = (model, *text, *as_list(eval_text)), work_of("run", model, text, eval_text, settings)
    check_new_folder(out, overwrite=overwrite, inputs=inputs, work=work)
    check_texts([*text, *(eval_text or ())], text_field=given.rows.text_field)
    screen = output.screen()
    lm = load(model, given.passes.compute, trust_remote_code, screen, layers=settings.layers)
    from knnlm.pipeline import run as run_pipeline

    run_pipeline(
        lm,
        text,
        out,
        eval_text=eval_text,
        settings=settings,
        overwrite=overwrite,
        progress=screen,
        report=lambda result, folder: show_evaluation(result, screen, folder, show, all_layers=all_layers),
    )
    screen.say(f"Report: {out / 'report.html'}")

"""`knnlm build`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import options
from knnlm.cli.groups import Place
from knnlm.cli.shared import check_texts, load
from knnlm.cli.store import show_store

if TYPE_CHECKING:
    from knnlm.config import Settings

FitText = Annotated[
    list[str] | None,
    typer.Option("--eval-text", help="Text to fit k, λ and T on; default: about 1 % of the text is kept back."),
    Place(),
]


Frame = Annotated[
    Path | None, typer.Option("--frame", help="Datastore whose layers, centres and windows are taken, to merge both.")
]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options that become the settings of `knnlm.build`."""

    layers: options.LayerOptions
    k: options.K = None
    metric: options.Metric = "l2"
    index: options.Index = "auto"
    windows: options.WindowOptions
    max_tokens: options.MaxTokens = None
    rows: options.RowOptions
    passes: options.PassOptions
    key_dtype: options.KeyDtype = "float16"
    memory: options.Memory = None
    seed: options.Seed = 0

    def settings(self) -> Settings:
        """The settings, checked."""
        from knnlm.config import KNNConfig, Settings

        return Settings(
            text=options.text_config(self.windows, self.rows, self.passes, max_tokens=self.max_tokens),
            layers=self.layers.config(),
            knn=KNNConfig(k=self.k, metric=self.metric, index=self.index),
            key_dtype=self.key_dtype,
            memory=options.memory_bytes(self.memory),
            seed=self.seed,
        )


def build(
    *,
    model: options.Model,
    text: options.Text,
    out: options.Out,
    eval_text: FitText = None,
    given: BuildOptions,
    output: options.Output,
    frame: Frame = None,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Build a datastore: choose a layer on a sample (or take --layers), store its keys, index them, fit k, λ and T.

    Example: knnlm build --model gpt2 --text nursing.jsonl --out nursing.knn
    """
    settings = given.settings()
    from knnlm.places import as_list, check_new_folder, work_of

    work = work_of("build", model, text, eval_text, settings, frame and str(frame))
    check_new_folder(out, overwrite=overwrite, inputs=(model, *text, *as_list(eval_text)), work=work)
    check_texts([*text, *(eval_text or ())], text_field=given.rows.text_field)
    screen = output.screen()
    lm = load(model, given.passes.compute, trust_remote_code, screen, layers=settings.layers)
    from knnlm.pipeline import build as build_pipeline

    store = build_pipeline(
        lm, text, out, eval_text=eval_text, settings=settings, overwrite=overwrite, frame=frame, progress=screen
    )
    show_store(store.describe(), screen)

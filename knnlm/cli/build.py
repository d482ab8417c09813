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

Text = Annotated[
    list[str] | None,
    typer.Option("--text", help="One or more files, folders (.txt .jsonl .parquet) or hf:NAME/CONFIG:SPLIT."),
    Place(),
]
FitText = Annotated[
    list[str] | None,
    typer.Option("--eval-text", help="Text to fit k, λ and T on; default: about 1 % of the text is kept back."),
    Place(),
]


HiddenStates = Annotated[
    Path | None,
    typer.Option("--hidden-states", help="Folder of given token ids and vectors (.npz .safetensors), not --text."),
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
    text: Text = None,
    hidden_states: HiddenStates = None,
    out: options.Out,
    eval_text: FitText = None,
    given: BuildOptions,
    output: options.Output,
    frame: Frame = None,
    address: options.Ray = None,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Build a datastore: choose a layer on a sample (or take --layers), store its keys, index them, fit k, λ and T.

    Example: knnlm build --model gpt2 --text nursing.jsonl --out nursing.knn
    """
    settings = given.settings()
    _check_source(text, hidden_states, frame, address)
    from knnlm.places import as_list, check_new_folder, work_of

    if hidden_states is None:
        work = work_of("build", model, text, eval_text, settings, frame and str(frame))
    else:
        work = work_of("build from vectors", model, hidden_states, eval_text, settings)
    inputs = (model, *as_list(text or hidden_states), *as_list(eval_text))
    check_new_folder(out, overwrite=overwrite, inputs=inputs, work=work)
    if texts := [*(text or ()), *(eval_text or ())]:
        check_texts(texts, text_field=given.rows.text_field)
    screen = output.screen()
    from knnlm.pipeline import build as build_pipeline
    from knnlm.pipeline import build_from_vectors

    with options.cluster(address, trust=trust_remote_code) as cluster:
        lm = load(model, given.passes.compute, trust_remote_code, screen, layers=settings.layers)
        if hidden_states is None:
            store = build_pipeline(
                lm,
                text or [],
                out,
                eval_text=eval_text,
                settings=settings,
                overwrite=overwrite,
                frame=frame,
                cluster=cluster,
                progress=screen,
            )
        else:
            store = build_from_vectors(
                lm, hidden_states, out, eval_text=eval_text, settings=settings, overwrite=overwrite, progress=screen
            )
    show_store(store.describe(), screen)


def _check_source(text: list[str] | None, hidden_states: Path | None, frame: Path | None, address: str | None) -> None:
    """Refuse what does not say where keys come from, or says it twice."""
    if (text is None) == (hidden_states is None):
        raise typer.BadParameter("give one of them", param_hint="--text, --hidden-states")
    if hidden_states is not None and frame is not None:
        raise typer.BadParameter("--hidden-states makes a frame of its own", param_hint="--frame")
    if hidden_states is not None and address is not None:
        raise typer.BadParameter("--hidden-states needs no passes of a model to share out", param_hint="--ray")
    if hidden_states is not None and not hidden_states.is_dir():
        raise typer.BadParameter(f"{hidden_states} is no folder", param_hint="--hidden-states")

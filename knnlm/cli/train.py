"""The verb `train`: trains a model on text, with or without a push-away loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import options
from knnlm.cli.groups import Place
from knnlm.cli.shared import quiet_loading
from knnlm.report.numbers import MISSING

if TYPE_CHECKING:
    from rich.table import Table

    from knnlm.studies.train.config import PushAway, TrainConfig
    from knnlm.studies.train.result import TrainPoint, TrainResult

OtherText = Annotated[
    list[str] | None,
    typer.Option(
        "--other-text", help="Text of a second domain, half of each batch; push-away is then between the two."
    ),
    Place(),
]
Weight = Annotated[
    float, typer.Option("--push-away", help="λ, the weight of the push-away loss; typically 0.001 to 0.1.")
]
Regularizer = Annotated[
    str,
    typer.Option(
        "--regularizer", help="Push-away loss: push-away, uniformity (Wang & Isola 2020) or different-tokens."
    ),
]
Layer = Annotated[
    str, typer.Option("--layer", help="Layer whose vectors are pushed apart, such as final_norm or -1.ffn_input.")
]
Lora = Annotated[
    int | None, typer.Option("--lora", help="Train LoRA adapters of this rank, merged into the weights at the end.")
]
Scratch = Annotated[
    bool,
    typer.Option("--from-scratch", help="Use only the shape and the tokenizer of --model, with new random weights."),
]
Steps = Annotated[int, typer.Option("--steps", help="Number of training steps.")]
BatchSize = Annotated[str, typer.Option("--batch-size", help="Windows in a step; auto: 8.")]
Context = Annotated[
    int | None, typer.Option("--context", help="Tokens in a window; default: the model's limit, at most 512.")
]
Rate = Annotated[
    float | None,
    typer.Option("--learning-rate", help="Peak learning rate; default 5e-4 from scratch or with LoRA, else 5e-5."),
]
Schedule = Annotated[
    str, typer.Option("--schedule", help="Learning rate after the warm-up: cosine (decays to 0) or constant.")
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Type of matrix products: auto, float32 or bfloat16; weights are float32.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume where the same command was stopped, if it was.")]
Report = Annotated[Path | None, typer.Option("--report", help="Folder for train.json and train.html.")]


@dataclass(frozen=True, kw_only=True)
class PushAwayOptions:
    """The loss added to the cross-entropy."""

    push_away: Weight = 0.0
    regularizer: Regularizer = "push-away"
    layer: Layer = "final_norm"

    def config(self, *, between_domains: bool) -> PushAway:
        """The settings, checked."""
        from knnlm.studies.train.config import PushAway

        return PushAway(
            weight=self.push_away, regularizer=self.regularizer, layer=self.layer, between_domains=between_domains
        )


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options that become the settings of `knnlm.train`."""

    loss: PushAwayOptions
    lora: Lora = None
    from_scratch: Scratch = False
    steps: Steps = 1000
    batch_size: BatchSize = "auto"
    context: Context = None
    learning_rate: Rate = None
    schedule: Schedule = "cosine"
    text_field: options.TextField = "text"

    def config(self, *, between_domains: bool, dtype: str, seed: int) -> TrainConfig:
        """The settings, checked."""
        from knnlm.studies.train.config import TrainConfig

        size = options.batch_windows(self.batch_size)
        return TrainConfig(
            push_away=self.loss.config(between_domains=between_domains),
            steps=self.steps,
            batch_size=TrainConfig.batch_size if size is None else size,
            context=self.context,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            from_scratch=self.from_scratch,
            lora=self.lora,
            text_field=self.text_field,
            dtype=dtype,
            seed=seed,
        )


def train(
    *,
    model: options.Model,
    text: options.Text,
    out: options.Out,
    other_text: OtherText = None,
    given: TrainOptions,
    report: Report = None,
    dtype: Dtype = "auto",
    seed: options.Seed = 0,
    resume: Resume = False,
    output: options.Output,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Train a model on text, from scratch or from its weights, with or without a push-away loss: CE - λ·d.

    Example: knnlm train --model gpt2 --text nursing.jsonl --out gpt2-nursing --push-away 0.01 --lora 8
    """
    config = given.config(between_domains=bool(other_text), dtype=dtype, seed=seed)
    from knnlm.places import TRAINED, check_new_folder, check_report_folder

    check_new_folder(out, overwrite=overwrite, inputs=(model, *text, *(other_text or ())), manifest=TRAINED)
    if report is not None:
        check_report_folder(report)
    screen = output.screen()
    quiet_loading(model)
    from knnlm.studies.train.train import train as train_model
    from knnlm.studies.train.train import train_document

    result = train_model(
        model,
        text,
        out,
        other_text=other_text,
        config=config,
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=screen,
    )
    document = train_document(result)
    screen.say(_table(result))
    for line in _lines(result):
        screen.say(line)
    screen.result(document)
    if report is not None:
        from knnlm.studies.train.page import write_train

        screen.say(f"Report: {write_train(document, report)}")


def _table(result: TrainResult) -> Table:
    from knnlm.cli.tables import compact_table

    other = result.points[0].other is not None
    heads = ("step", "loss", "raised", "dispersion", "validation perplexity", *(["other's"] if other else []))
    table = compact_table(heads, title=f"Training; dispersion of {result.layer}")
    for point in result.points:
        table.add_row(*_cells(point))
    return table


def _cells(point: TrainPoint) -> Iterator[str]:
    yield f"{point.step}"
    for value in (point.cross_entropy, point.spread):
        yield MISSING if value is None else f"{value:.4f}"
    yield f"{point.text.dispersion:.4f}"
    yield f"{point.text.perplexity:.2f}"
    if point.other is not None:
        yield f"{point.other.perplexity:.2f}"


def _lines(result: TrainResult) -> Iterator[str]:
    yield (
        f"{result.trained_parameters:,} of {result.parameters:,} parameters, {result.tokens:,} tokens of a text of "
        f"{result.text_tokens:,}, in {result.seconds:,.0f} s."
    )
    yield f"Model: {result.folder}, for --model of every command; what happened on the way is in its train.json."

"""The verb `slices`: how hard is a set of questions or text, judged without labels?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import options
from knnlm.cli.groups import Place
from knnlm.cli.screen import Screen
from knnlm.cli.shared import load
from knnlm.report.numbers import MISSING

if TYPE_CHECKING:
    from rich.table import Table

    from knnlm.studies.slices.measure import SetSlices, SliceConfig, SlicesResult
    from knnlm.studies.slices.statistics import Estimate

Questions = Annotated[
    list[str] | None,
    typer.Option("--questions", help="Multiple-choice questions: one or more .jsonl files or hf:NAME/CONFIG:SPLIT."),
    Place(),
]
Cloze = Annotated[
    list[str] | None,
    typer.Option("--cloze", help="Text whose next tokens are predicted; files, folders or hub sets."),
    Place(),
]
Layers = Annotated[str | None, typer.Option("--layers", help="Layers whose vectors are used; default final_norm.")]
SliceSize = Annotated[int, typer.Option("--slice-size", help="Items in a slice; fewer if the set is too small.")]
Seeds = Annotated[int, typer.Option("--seeds", help="Random draws of each slice.")]
Tail = Annotated[int | None, typer.Option("--tail", help="Number of items of lowest dispersion to write for each set.")]
TailOut = Annotated[Path | None, typer.Option("--tail-out", help="JSON Lines file for the items of --tail.")]
Context = Annotated[
    int | None, typer.Option("--context", help="Tokens before the predicted one of a cloze item; default 128.")
]
MaxSegments = Annotated[
    int, typer.Option("--max-segments", help="Maximum number of cloze items of a text; drawn at random if it has more.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file --tail-out if knnlm wrote it.")]
Report = Annotated[Path | None, typer.Option("--report", help="Folder for slices.json and slices.html.")]


# Fields in every row of --tail-out.
TAIL_FIELDS = {"set", "rank", "dispersion", "layer"}


@dataclass(frozen=True, kw_only=True)
class SliceOptions:
    """Options that become the settings of the study, and the file for its tail; None keeps the default."""

    layers: Layers = None
    slice_size: SliceSize = 100
    seeds: Seeds = 10
    tail: Tail = None
    tail_out: TailOut = None
    context: Context = None
    max_segments: MaxSegments = 100_000
    text_field: options.TextField = "text"

    def config(self, *, seed: int) -> SliceConfig:
        """The settings, checked."""
        from knnlm.studies.slices.measure import SliceConfig

        usual = SliceConfig()
        return SliceConfig(
            layers=usual.layers if self.layers is None else self.layers,
            slice_size=self.slice_size,
            seeds=self.seeds,
            tail=self.tail,
            context=usual.context if self.context is None else self.context,
            max_segments=self.max_segments,
            text_field=self.text_field,
            seed=seed,
        )


def slices(
    *,
    model: options.Model,
    questions: Questions = None,
    cloze: Cloze = None,
    given: SliceOptions,
    report: Report = None,
    compute: options.ComputeOptions,
    seed: options.Seed = 0,
    output: options.Output,
    overwrite: Overwrite = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Rank sets and items by difficulty, from the dispersion of their prompts; compare with labels, if there are any.

    Example: knnlm slices --model gpt2 --questions hf:allenai/ai2_arc/ARC-Easy:test --cloze nursing.jsonl
    """
    config = given.config(seed=seed)
    from knnlm.studies.slices.document import slices_document
    from knnlm.studies.slices.measure import measure_sets
    from knnlm.studies.slices.sets import read_sets
    from knnlm.version import versions

    screen = output.screen()
    questions, cloze = questions or [], cloze or []
    inputs = [model, *questions, *cloze]
    _check_places(given.tail, given.tail_out, report, overwrite, inputs)
    sets = read_sets(questions, cloze, text_field=given.text_field)
    _check_model(model, config, bool(cloze), trust_remote_code)
    lm = load(model, compute, trust_remote_code, screen)
    result = measure_sets(lm, sets, config=config, progress=screen)
    settings = asdict(config) | {"model": model, "questions": questions, "cloze": cloze, "dtype": compute.dtype}
    document = slices_document(result, model=lm.name, settings=settings, versions=versions())
    _show(result, screen)
    screen.result(document)
    if given.tail_out is not None:
        _check_tail_out(given.tail_out, overwrite, inputs)  # again: by now somebody may have made a file there
        _write_tail(result.sets, given.tail_out)
        screen.say(f"Items of lowest dispersion: {given.tail_out}")
    if report is not None:
        from knnlm.studies.slices.page import write_slices

        screen.say(f"Report: {write_slices(document, report)}")


def _check_places(
    tail: int | None, tail_out: Path | None, report: Path | None, overwrite: bool, inputs: Sequence[str]
) -> None:
    """Check before any work that the files can be written."""
    from knnlm.errors import InputError
    from knnlm.places import check_report_folder

    if (tail is None) != (tail_out is None):
        raise InputError("--tail N and --tail-out FILE go together: how many items, and where to write them")
    if tail_out is not None:
        _check_tail_out(tail_out, overwrite, inputs)
    if report is not None:
        check_report_folder(report)


def _check_tail_out(path: Path, overwrite: bool, inputs: Sequence[str]) -> None:
    from knnlm.places import check_new_file

    if path.is_file():
        _check_tail(path)
    check_new_file(path, field="tail_out", overwrite=overwrite, inputs=inputs)


def _check_tail(path: Path) -> None:
    """:raises InputError: the file to replace is not empty and does not begin with an item of a tail."""
    from knnlm.errors import InputError
    from knnlm.text.textfiles import json_rows

    if not path.stat().st_size:
        return
    try:
        ours = TAIL_FIELDS <= next(json_rows(path)).fields.keys()
    except (InputError, StopIteration):
        ours = False
    if not ours:
        raise InputError(f"--tail-out {path} holds no items of a tail and is not replaced; choose another --tail-out")


def _check_model(model: str, config: SliceConfig, cloze: bool, trust: bool) -> None:
    from knnlm.model.loading import read_outline
    from knnlm.studies.slices.measure import check_model

    outline = read_outline(model, trust_remote_code=trust)
    check_model(model, outline.layer_names, outline.context_limit, config, cloze=cloze)


def _write_tail(sets: Sequence[SetSlices], path: Path) -> None:
    from json import dumps

    from knnlm.files import all_or_none, write_text

    with all_or_none(path):
        write_text(path, "".join(dumps(row, ensure_ascii=False) + "\n" for one in sets for row in one.tail))


def _show(result: SlicesResult, screen: Screen) -> None:
    sets = result.sets
    screen.say(_set_table(sets))
    if any(layer.curve for one in sets for layer in one.layers):
        screen.say(_slice_table(sets))
    if result.set_correlation is not None:
        found, held = result.set_correlation.spearman, result.set_correlation.spearman_interval
        screen.say(
            f"Over sets, dispersion inside a prompt and right answers: Spearman {found:+.2f} ({held.low:+.2f} … "
            f"{held.high:+.2f}); above 0, low dispersion means hard."
        )
    for one in sets:
        for note in one.notes:
            screen.say(f"Note: {note}")


def _set_table(sets: Sequence[SetSlices]) -> Table:
    from knnlm.cli.tables import compact_table

    heads = ("set", "items", "right", "normalised", "chance", "layer", "inside a prompt", "tail AUC", "confidence AUC")
    table = compact_table(
        heads,
        title="Sets by dispersion inside a prompt: the hardest first, if low dispersion means hard",
        left=("set", "layer"),
    )
    for one in sets:
        for layer in one.layers:
            rights = (_percent(part.value if part else None) for part in (one.accuracy, one.accuracy_normalized))
            table.add_row(
                *(one.name, f"{one.items:,}", *rights, _percent(one.chance), layer.layer),
                *(_estimate(layer.within, 4), _estimate(layer.tail_auc, 3), _estimate(one.confidence_auc, 3)),
            )
    table.caption = "AUC: how often a wrong item ranks below a right one; 0.5 is chance. ±: half of the 95 % interval."
    return table


def _slice_table(sets: Sequence[SetSlices]) -> Table:
    from knnlm.cli.tables import compact_table

    heads = ("set", "layer", "items", "0 % right", "50 %", "100 %", "right minus wrong", "Spearman")
    table = compact_table(heads, title="Dispersion between the queries of slices", left=("set", "layer"))
    for one in sets:
        for layer in one.layers:
            if layer.curve is None:
                continue
            shown = (layer.curve.slices[at].dispersion for at in (0, 5, 10))
            table.add_row(
                *(one.name, layer.layer, f"{layer.curve.size}", *(f"{value:.4f}" for value in shown)),
                *(_estimate(layer.right_minus_wrong, 4), f"{layer.curve.correlation.spearman:+.2f}"),
            )
    return table


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}"


def _estimate(estimate: Estimate | None, places: int) -> str:
    if estimate is None or isnan(estimate.value):
        return MISSING
    half = (estimate.interval.high - estimate.interval.low) / 2
    return f"{estimate.value:.{places}f} ± {half:.{places}f}"

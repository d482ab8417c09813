"""The command line: a thin skin over `knnlm.pipeline`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.exceptions

from knnlm.screen import Screen

if TYPE_CHECKING:
    from knnlm.config import Settings
    from knnlm.lm import LanguageModel
    from knnlm.results import EvalResult, ScoreResult

app = typer.Typer(
    name="knnlm",
    help="Give a language model a memory, and choose by geometry where it looks.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Option("--model", help="Hugging Face id or folder of a decoder-only causal LM.")]
OtherModel = Annotated[
    str | None, typer.Option("--model", help="The model, when it is no longer where the datastore says.")
]
Text = Annotated[
    list[str],
    typer.Option("--text", help="Files or folders (.txt .jsonl .parquet) or hf:NAME/CONFIG:SPLIT; one or more."),
]
EvalText = Annotated[list[str], typer.Option("--eval-text", help="Evaluation text, given like --text.")]
MaybeEvalText = Annotated[
    list[str] | None, typer.Option("--eval-text", help="Evaluation text; without it a tenth of the text is held out.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to make.")]
Store = Annotated[Path, typer.Argument(help="Folder of a datastore.")]
Layers = Annotated[
    str | None, typer.Option("--layers", help="Layers: all, *.ffn_input, -1.*, 5.attn_input,final_norm …")
]
Candidates = Annotated[
    str, typer.Option("--candidates", help="Layers that may be chosen: candidates, residual, all, or a pattern.")
]
Select = Annotated[str, typer.Option("--select", help="What chooses: dispersion, probe, or a layer's name.")]
K = Annotated[int | None, typer.Option("--k", help="Neighbours; fitted when not given.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Of the softmax over distances; fitted when not given.")
]
Lambda = Annotated[float | None, typer.Option("--lambda", help="Weight of p_kNN, 0 to 1; fitted when not given.")]
Metric = Annotated[str, typer.Option("--metric", help="l2, cosine or ip.")]
Index = Annotated[str, typer.Option("--index", help="auto, exact, or a FAISS factory string.")]
Context = Annotated[int | None, typer.Option("--context", help="Tokens of a window; the model's limit, at most 1024.")]
Stride = Annotated[int | None, typer.Option("--stride", help="New tokens of each window; half of the context.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Of --text; all when not given.")]
EvalTokens = Annotated[int, typer.Option("--eval-tokens", help="Budget of evaluation tokens, over all documents.")]
Protocol = Annotated[
    str, typer.Option("--protocol", help="documents, or knn-transformers to compare with that project's figures.")
]
TextField = Annotated[str, typer.Option("--text-field", help="Field of .jsonl, .parquet and hub rows.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps …")]
BatchSize = Annotated[
    str, typer.Option("--batch-size", help="Windows in a forward pass; auto: as many as 4,096 tokens hold.")
]
KeyDtype = Annotated[str, typer.Option("--key-dtype", help="Of keys on disk: float16 or float32.")]
DiskBudget = Annotated[
    float | None, typer.Option("--disk-budget", help="Gigabytes that keys may take; half of the free disk.")
]
Seed = Annotated[int, typer.Option("--seed")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, and nothing else.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds, if knnlm made it.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]


INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT."""


@app.command()
def run(
    model: Model,
    text: Text,
    out: Out,
    eval_text: MaybeEvalText = None,
    layers: Layers = None,
    candidates: Candidates = "candidates",
    select: Select = "dispersion",
    k: K = None,
    temperature: Temperature = None,
    lam: Lambda = None,
    metric: Metric = "l2",
    index: Index = "auto",
    context: Context = None,
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    eval_tokens: EvalTokens = 20_000,
    text_field: TextField = "text",
    protocol: Protocol = "documents",
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_size: BatchSize = "auto",
    key_dtype: KeyDtype = "float16",
    disk_budget: DiskBudget = None,
    seed: Seed = 0,
    json: Json = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """The whole way: build, score, choose, evaluate every layer, index the chosen one.

    Example: knnlm run --model gpt2 --text nursing.jsonl --out nursing.knn
    """
    settings = _settings(locals())
    from knnlm.pipeline import run as run_pipeline
    from knnlm.plan import check_new_folder

    screen = Screen(json)
    check_new_folder(out, overwrite=overwrite)
    lm = _load(model, dtype, device, trust_remote_code, screen)
    result = run_pipeline(lm, text, out, eval_text=eval_text, settings=settings, overwrite=overwrite, progress=screen)
    _show_evaluation(result, screen, out)


@app.command()
def score(
    model: Model,
    text: Text,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the scores to this JSON file.")] = None,
    layers: Layers = None,
    candidates: Candidates = "candidates",
    select: Select = "dispersion",
    stop_early: Annotated[
        bool, typer.Option("--stop-early", help="Stop when the leading candidate's interval separates.")
    ] = False,
    context: Context = None,
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    text_field: TextField = "text",
    protocol: Protocol = "documents",
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_size: BatchSize = "auto",
    seed: Seed = 0,
    json: Json = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Dispersion of every candidate layer, and what would be chosen; writes nothing unless --out.

    Example: knnlm score --model gpt2 --text nursing.jsonl --max-tokens 200000
    """
    settings = _settings(locals())
    from knnlm.pipeline import score as score_pipeline
    from knnlm.plan import check_new_file
    from knnlm.report.document import score_document
    from knnlm.storage import write_json

    if out is not None:
        check_new_file(out, overwrite=overwrite)
    screen = Screen(json)
    lm = _load(model, dtype, device, trust_remote_code, screen)
    result = score_pipeline(lm, text, settings=settings, stop_early=stop_early, progress=screen)
    _show_scores(result, screen)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, score_document(result))


@app.command()
def build(
    model: Model,
    text: Text,
    out: Out,
    layers: Layers = None,
    candidates: Candidates = "candidates",
    select: Select = "dispersion",
    k: K = None,
    metric: Metric = "l2",
    index: Index = "auto",
    context: Context = None,
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    text_field: TextField = "text",
    protocol: Protocol = "documents",
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_size: BatchSize = "auto",
    key_dtype: KeyDtype = "float16",
    seed: Seed = 0,
    json: Json = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Choose a layer on a sample (or take --layers), write the datastore and its index.

    Example: knnlm build --model gpt2 --text nursing.jsonl --out nursing.knn
    """
    settings = _settings(locals())
    from knnlm.pipeline import build as build_pipeline
    from knnlm.plan import check_new_folder

    screen = Screen(json)
    check_new_folder(out, overwrite=overwrite)
    lm = _load(model, dtype, device, trust_remote_code, screen)
    store = build_pipeline(lm, text, out, settings=settings, overwrite=overwrite, progress=screen)
    _show_info(store.describe(), screen)


@app.command("eval")
def evaluate(
    store: Store,
    eval_text: EvalText,
    model: OtherModel = None,
    layers: Layers = None,
    k: K = None,
    temperature: Temperature = None,
    lam: Lambda = None,
    metric: Metric = "l2",
    index: Annotated[str, typer.Option("--index", help="auto: the datastore's own; exact: search exactly.")] = "auto",
    context: Context = None,
    stride: Stride = None,
    eval_tokens: EvalTokens = 20_000,
    text_field: TextField = "text",
    protocol: Protocol = "documents",
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_size: BatchSize = "auto",
    seed: Seed = 0,
    report: Annotated[Path | None, typer.Option("--report", help="Write report.json and report.html here.")] = None,
    json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity of the LM and of the kNN-LM for every layer in the store.

    Example: knnlm eval nursing.knn --eval-text held-out.jsonl
    """
    settings = _settings(locals())
    from knnlm.datastore import Datastore
    from knnlm.pipeline import evaluate as evaluate_pipeline
    from knnlm.plan import check_report_folder

    screen = Screen(json)
    if report is not None:
        check_report_folder(report)
    opened = Datastore.open(store)
    lm = _load(model or opened.manifest.model, dtype, device, trust_remote_code, screen)
    result = evaluate_pipeline(lm, opened, eval_text, settings=settings, progress=screen)
    _show_evaluation(result, screen, report)


@app.command()
def info(store: Store, json: Json = False) -> None:
    """What a datastore is: model, layers, keys, bytes, index, scores.

    Example: knnlm info nursing.knn
    """
    from knnlm.datastore import Datastore

    _show_info(Datastore.open(store).describe(), Screen(json))


@app.command()
def verify(store: Store, json: Json = False) -> None:
    """Whether a datastore is whole: every file's size and checksum, and every index.

    Example: knnlm verify nursing.knn
    """
    from knnlm.datastore import Datastore
    from knnlm.indexing import verify_store

    screen = Screen(json)
    problems = verify_store(Datastore.open(store), screen)
    screen.result({"store": str(store), "whole": not problems, "problems": problems})
    for problem in problems:
        screen.say(problem)
    if problems:
        raise typer.Exit(2)
    screen.say(f"{store} is whole")


def _settings(options: dict[str, Any]) -> Settings:
    """The options of a command that are settings; the rest keep their defaults."""
    from knnlm.config import EvalConfig, KNNConfig, LayerConfig, Settings, TextConfig

    def given(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names if name in options}

    size = options["batch_size"]
    if size != "auto" and not size.isdecimal():
        raise typer.BadParameter(f"{size!r} is neither auto nor a number", param_hint="--batch-size")
    budget = options.get("disk_budget")
    return Settings(
        text=TextConfig(
            **given("context", "stride", "max_tokens", "text_field", "protocol"),
            windows=None if size == "auto" else int(size),
        ),
        layers=LayerConfig(**given("layers", "candidates", "select")),
        knn=KNNConfig(**given("k", "temperature", "lam", "metric", "index")),
        evaluation=EvalConfig(**given("eval_tokens")),
        **given("key_dtype"),
        disk_budget=None if budget is None else budget * 1e9,
        seed=options["seed"],
    )


def _load(name: str, dtype: str, device: str, trust: bool, screen: Screen) -> LanguageModel:
    from knnlm.lm import load_model

    lm = load_model(name, dtype=dtype, device=device, trust_remote_code=trust)
    for note in lm.notes:
        screen.note(note)
    return lm


def _show_evaluation(result: EvalResult, screen: Screen, folder: Path | None) -> None:
    """Show it, then write it: where the report cannot be written, the result is not lost."""
    from knnlm.report import write_reports
    from knnlm.report.document import to_document
    from knnlm.tables import choice_lines, eval_table

    screen.say(eval_table(result))
    for line in choice_lines(result):
        screen.say(line)
    screen.result(to_document(result))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        screen.say(f"Report: {write_reports(result, folder).html}")


def _show_scores(result: ScoreResult, screen: Screen) -> None:
    from knnlm.report.document import score_document
    from knnlm.tables import choice_lines, score_table

    screen.say(score_table(result))
    for line in choice_lines(result):
        screen.say(line)
    screen.result(score_document(result))


def _show_info(description: dict[str, object], screen: Screen) -> None:
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in description.items():
        table.add_row(name, _folded(value))
    screen.say(table)
    screen.result(description)


def _folded(value: object) -> str:
    """A value of any size in a line or two: of a mapping of mappings, the names only."""
    if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def main() -> None:
    """Run the command line: exit status 0, 2 with one line for expected errors, 130 for Ctrl-C."""
    from index.errors import VectorIndexError
    from knnlm.errors import KNNLMError

    # Both are read when transformers is imported. Tokenizers warn about forks that are never made here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        status = app(_spread(sys.argv[1:]) or ["--help"], prog_name="knnlm", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except typer.exceptions.TyperException as error:
        _fail(_usage(error), 2)
    except (KNNLMError, VectorIndexError) as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(_refused_by_system(error), 2)
    if status == INTERRUPTED:  # typer catches KeyboardInterrupt itself and returns this
        _fail("stopped by Ctrl-C; nothing half-written was left behind", INTERRUPTED)
    sys.exit(status)


def _spread(arguments: Sequence[str]) -> list[str]:
    """`--text a b` as `--text a --text b`: a shell expands `--text *.jsonl` to the former, typer knows the latter."""
    spread: list[str] = []
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in ("--text", "--eval-text") else ""
        elif option and spread[-1] != option:
            spread.append(option)
        spread.append(argument)
    return spread


def _usage(error: typer.exceptions.TyperException) -> str:
    """What typer says of wrong options, in one line, and where the right ones are listed."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "knnlm"
    return f"{' '.join(error.format_message().split()).rstrip('.')}; {command} --help lists the options"


def _refused_by_system(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}; check the path, its permissions and the free space"


def _fail(message: str, status: int) -> NoReturn:
    """End with one line, whatever a file's name or a library's message holds."""
    sys.stderr.write(f"knnlm: {' '.join(message.split())}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()

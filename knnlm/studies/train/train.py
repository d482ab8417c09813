"""Training of a causal language model, with or without a push-away loss: from scratch, all weights, or LoRA.

    result = train("my-model", ["domain.jsonl"], "my-model-on-domain", config=TrainConfig(steps=500))
    print(result.points[-1].text.perplexity)

The result is an ordinary Hugging Face folder, with `train.json` beside the weights. Checkpoints are in
`OUT.checkpoints` until the training is finished, so that a stopped or failed one can be resumed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from knnlm.config import TextConfig
from knnlm.errors import InputError, not_installed
from knnlm.files import Allowed, claim_folder, disk_errors, put_in_place, write_json
from knnlm.locks import LOCK
from knnlm.model.adapters import add_lora
from knnlm.model.hardware import trains_in_bfloat16
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model, random_model
from knnlm.places import FORMATS, TRAINED, as_list, check_new_folder
from knnlm.progress import Advance, Progress, Silent
from knnlm.scores.choose import one_layer
from knnlm.studies.train.checkpoints import check_checkpoints, checkpoints_of, keep_checkpoints
from knnlm.studies.train.config import TrainConfig
from knnlm.studies.train.result import TrainPoint, TrainResult, Validation
from knnlm.studies.train.trainer import PushAwayTrainer, Watch, training_arguments
from knnlm.studies.train.windows import Domain, read_domain, training_windows, validation_windows
from knnlm.text.windows import window_config
from knnlm.version import versions

Paths = Sequence[str | Path]
FORMAT, VERSION = FORMATS[TRAINED], 1
DEFAULT_CONTEXT = 512
FROM_SCRATCH_RATE, FULL_RATE = 5e-4, 5e-5

PAPER = (
    "the loss: the cross-entropy minus λ times the mean cosine distance of all pairs of vectors in batch and sequence, "
    "or with two domains of all pairs of a vector of each",
    "the last layer, after the final norm",
    "GPT-2 from scratch on WikiText: learning rate 5e-4, λ = 0.1; on WikiText with Python code: 7e-4, λ = 0.01",
    "perplexity at steps 500 and 1,000",
)
"""Of arXiv 2506.24106, from summaries of it."""
OURS = (
    "AdamW of transformers' Trainer, no weight decay, gradients clipped at 1",
    "a linear rise over a twentieth of the steps, at most 100, then a cosine to 0, or constant",
    "documents closed by the end token, cut into windows in another order and from another offset in each epoch",
    "LoRA: every linear layer of the blocks, alpha twice the rank",
    "two domains: windows of each by turns",
    "pairs inside a micro-batch of one process, of positions that have a target",
    "a tenth of each text held out, and perplexity on at most 16,384 tokens of it, evenly spread",
    "the regularizers uniformity and different-tokens, other layers than the last",
)
"""What is not known of the paper's settings, or was added."""


def train(
    model: str | Path,
    text: Paths,
    out: str | Path,
    *,
    other_text: Paths | None = None,
    config: TrainConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a model on the texts and write it to the folder `out`.

    A tenth of each text is held out for validation, the same as in `knnlm run` with the same seed. With `other_text`,
    half of each batch comes from each text, and a push-away loss is between the two. LoRA adapters are merged into the
    weights at the end.

    :param resume: resume from the last checkpoint that an earlier call with the same arguments left, if any.
    :raises InputError: an option or a text cannot be used, or a checkpoint is of another training.
    :param overwrite: replace what `out` holds, if knnlm made it, and restart a stopped training.
    :param trust_remote_code: run Python code that comes with the model.
    :raises DatastoreExists: `out` or the folder for checkpoints must not be replaced; nothing was done.
    """
    config, progress, begun = config or TrainConfig(), progress or Silent(), time.perf_counter()
    inputs = (str(model), *as_list(text), *as_list(other_text))
    check_new_folder(out, overwrite=overwrite, inputs=inputs, manifest=TRAINED)
    checkpoints = checkpoints_of(out)
    check_checkpoints(checkpoints, resume=resume, overwrite=overwrite)
    _check_libraries(config)
    if other_text:
        config = replace(config, push_away=replace(config.push_away, between_domains=True))
    allowed = Allowed(overwrite, TRAINED)
    with claim_folder(out, allowed, inputs) as folder:
        load = partial(random_model, seed=config.seed) if config.from_scratch else load_model
        lm = load(model, dtype="float32", device="cpu", trust_remote_code=trust_remote_code)
        config = _settle(config, lm)
        texts = {"text": text} | ({"other_text": other_text} if other_text else {})
        domains = [_read(lm, paths, config, option) for option, paths in texts.items()]
        identity = _identity(lm, domains, config)
        # The checkpoints are removed once the model is in its place.
        with keep_checkpoints(checkpoints, identity, resume=resume, overwrite=overwrite) as last:
            with put_in_place(folder, out, allowed):
                with progress.stage("training", "steps") as advance:
                    trainer = _make_trainer(lm, domains, config, str(checkpoints), advance)
                    trainer.train(resume_from_checkpoint=None if last is None else str(last))
                result = _result(trainer, lm, domains, config, Path(out), time.perf_counter() - begun)
                return _save(trainer, lm, result, folder)


def _check_libraries(config: TrainConfig) -> None:
    for name in ("accelerate", *(["peft"] if config.lora else [])):
        if find_spec(name) is None:
            raise InputError(not_installed("training", name, "train"))


def _settle(config: TrainConfig, lm: LanguageModel) -> TrainConfig:
    """Fill in the settings that depend on the model.

    :raises LayerError: the model has no such layer.
    :raises InputError: the context is over the model's limit.
    """
    layer = one_layer(config.push_away.layer, lm.layer_names, field="layer")
    context = config.context or min(lm.context_limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    low = trains_in_bfloat16() if config.dtype == "auto" else config.dtype == "bfloat16"
    return replace(
        config,
        push_away=replace(config.push_away, layer=layer),
        context=window_config(TextConfig(context=context), lm.name, lm.context_limit).context,
        learning_rate=config.learning_rate or (FROM_SCRATCH_RATE if config.from_scratch or config.lora else FULL_RATE),
        dtype="bfloat16" if low else "float32",
    )


def _read(lm: LanguageModel, paths: Paths, config: TrainConfig, field: str) -> Domain:
    assert config.context is not None
    return read_domain(lm, paths, text_field=config.text_field, context=config.context, seed=config.seed, field=field)


def _identity(lm: LanguageModel, domains: Sequence[Domain], config: TrainConfig) -> dict[str, Any]:
    """Values that must be equal for one run to resume from another's checkpoints."""
    texts = {f"text {number}": domain.fingerprint for number, domain in enumerate(domains, 1)}
    return {f"model's {name}": value for name, value in lm.fingerprint.items()} | texts | _flat(config)


def _flat(config: TrainConfig) -> dict[str, Any]:
    settings = asdict(config)
    push_away: dict[str, Any] = settings.pop("push_away")
    return settings | push_away


# The training


def _make_trainer(
    lm: LanguageModel, domains: Sequence[Domain], config: TrainConfig, folder: str, advance: Advance
) -> PushAwayTrainer:
    assert config.context is not None and config.learning_rate is not None
    # Unset for GPT-2, where the Trainer would divide by one target too many in each window.
    lm.model.loss_type = "ForCausalLM"
    model: nn.Module = lm.model.requires_grad_(not config.lora)
    if config.lora:
        model = add_lora(model, config.lora, config.seed)
    arguments = training_arguments(folder, config, config.learning_rate, use_bfloat16=config.dtype == "bfloat16")
    rows = [domain.training_N for domain in domains]
    held_out = [validation_windows(domain.validation_N, config.context) for domain in domains]
    return PushAwayTrainer(
        model,
        arguments,
        push_away=config.push_away,
        train_dataset=training_windows(rows, config.context, config.steps * config.batch_size, config.seed),
        eval_dataset=dict(zip(("text", "other"), held_out, strict=False)),
        callbacks=[Watch(advance)],
    )


def _points(log: Sequence[Mapping[str, float]]) -> Iterator[TrainPoint]:
    """Points by step, from the Trainer's log; the first evaluation of a resumed training replaces the one before."""
    by_step: dict[int, dict[str, float]] = {}
    for entry in log:
        by_step.setdefault(int(entry["step"]), {}).update(entry)
    for step, found in by_step.items():
        text, other = _validation(found, "eval_text_"), _validation(found, "eval_other_")
        if text is not None:
            means = (found.get(name) for name in ("cross_entropy", "dispersion", "spread"))
            yield TrainPoint(step, text, other, *means)


def _validation(found: Mapping[str, float], prefix: str) -> Validation | None:
    if f"{prefix}loss" not in found:
        return None
    return Validation(math.exp(found[f"{prefix}loss"]), found[f"{prefix}dispersion"])


def _result(
    trainer: PushAwayTrainer,
    lm: LanguageModel,
    domains: Sequence[Domain],
    config: TrainConfig,
    out: Path,
    seconds: float,
) -> TrainResult:
    assert config.context is not None
    trained = [one.numel() for one in lm.model.parameters() if one.requires_grad]
    return TrainResult(
        folder=str(out),
        points=tuple(_points(trainer.state.log_history)),
        layer=config.push_away.layer,
        parameters=lm.model.num_parameters() - (sum(trained) if config.lora else 0),
        trained_parameters=sum(trained),
        tokens=config.steps * config.batch_size * config.context,
        text_tokens=sum(len(domain.training_N) for domain in domains),
        seconds=seconds,
        settings={"model": lm.name} | _flat(config),
        versions=versions(),
    )


def _save(trainer: PushAwayTrainer, lm: LanguageModel, result: TrainResult, folder: Path) -> TrainResult:
    """Write model, tokenizer and train.json into the folder; return the result with their names."""
    model: Any = trainer.model
    if result.settings["lora"]:
        model = model.merge_and_unload()
    model.config.use_cache = True  # the Trainer turns it off for itself
    with disk_errors(result.folder):
        model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    saved = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    result = replace(result, files=tuple(sorted({TRAINED, *saved} - {LOCK})))
    write_json(folder / TRAINED, train_document(result))
    return result


def train_document(result: TrainResult) -> dict[str, Any]:
    """JSON document of a training, as in `train.json`."""
    protocol = {"paper": list(PAPER), "ours": list(OURS)}
    return {"format": FORMAT, "version": VERSION} | asdict(result) | {"protocol": protocol}

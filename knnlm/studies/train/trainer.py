"""A subclass of transformers' Trainer with a push-away loss: L = CE - λ·d.

    trainer = PushAwayTrainer(model, arguments, push_away=PushAway(weight=0.1), train_dataset=windows)
    trainer.train()

`knnlm.studies.train.train` uses it for text files; use it directly for other data.

Legend: B windows in a batch, T positions, D dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from knnlm.errors import InputError, ModelError
from knnlm.model.decoder import find_decoder
from knnlm.model.hardware import pick_device
from knnlm.progress import Advance
from knnlm.scores.choose import one_layer
from knnlm.studies.train.config import PushAway, TrainConfig
from knnlm.studies.train.push_away import different_token_distance, distance_between, mean_distance, uniformity

Rows = Dataset[dict[str, Tensor]]


class PushAwayTrainer(Trainer):
    """A Trainer whose training loss is the cross-entropy minus λ times the mean distance between a layer's vectors.

    The evaluation loss is the plain cross-entropy. Besides `loss`, logs have means since the last log: `cross_entropy`,
    `dispersion` (mean distance over batch and sequence) and `spread` (the maximised term: one of the distances, or
    minus the uniformity); evaluations have `eval_dispersion`. A position counts if `labels` give it a target and
    `attention_mask` is not 0. Pairs are formed within a micro-batch of gradient accumulation and within a process. For
    several GPUs, `accelerate launch` starts a process for each.

    :param model: a decoder-only causal LM, or a peft model of one.
    :param args: with `between_domains`, remove_unused_columns must be False, as the Trainer else drops `domain`.
    :raises LayerError: the model has no such layer.
    :raises InputError: the pattern matches several layers, or one process drives several GPUs.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        push_away: PushAway,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.push_away = push_away
        base: Any = getattr(model, "get_base_model", lambda: model)
        self._decoder = find_decoder(base())
        self._layer = one_layer(push_away.layer, self._decoder.names, field="layer")
        self._means = _Means()
        if args.n_gpu > 1:
            raise InputError(f"{args.n_gpu} GPUs in one process; hide all but one, as CUDA_VISIBLE_DEVICES=0 does")
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, callbacks=list(callbacks))
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401 - the loss, or the loss and a transformers ModelOutput
        """Return the loss of one batch, with the push-away term in training; see the class."""
        domain_B = inputs.get("domain")
        inputs = {name: value for name, value in inputs.items() if name != "domain"}
        learns = model.training and self.push_away.weight > 0
        counts_BT, next_BT = _targets(inputs)  # before the Trainer takes `labels` out, for label smoothing
        held: list[Tensor] = []
        # Copied, as a later module may modify the tensor in place.
        with self._decoder.attach([self._layer], lambda _, v: held.append(v.clone()), detach=not learns):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        vectors_BTD = held[0][:, :-1]
        if learns and not vectors_BTD.requires_grad:
            raise self._no_gradient(model)
        share = self._share(model, num_items_in_batch)
        record = {"cross_entropy": loss.detach() / share}
        if model.training:
            spread = self._spread(vectors_BTD, next_BT, counts_BT, domain_B)
            record["spread"] = spread.detach()
            loss = loss - self.push_away.weight * share * spread if learns else loss
        record["dispersion"] = mean_distance(vectors_BTD.detach(), counts_BT)
        self._means.add(record)
        return (loss, outputs) if return_outputs else loss

    def _no_gradient(self, model: nn.Module) -> ModelError:
        """Return the error for vectors that depend on no trained weight."""
        if any(map(_checkpoints_reentrantly, model.modules())):
            return ModelError(
                f"gradient checkpointing with use_reentrant=True cuts layer {self._layer} off from the weights; "
                "turn it on with use_reentrant=False"
            )
        return ModelError(f"no weight that is trained comes before layer {self._layer}; take another, deeper `layer`")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with means since the last log."""
        prefix = next((name.removesuffix("loss") for name in logs if name.endswith("loss")), None)
        if prefix is not None and not prefix.startswith("train"):
            found = self._means.take()
            logs |= {prefix + name: value for name, value in found.items() if not prefix or name == "dispersion"}
        super().log(logs, start_time)

    def _share(self, model: nn.Module, num_items_in_batch: Tensor | int | None) -> float:
        """Share of this micro-batch in a step, if the cross-entropy was divided by the tokens of the whole step."""
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return 1 / self.current_gradient_accumulation_steps if scaled and model.training else 1.0

    def _spread(self, vectors_BTD: Tensor, next_BT: Tensor, counts_BT: Tensor, domain_B: Tensor | None) -> Tensor:
        if self.push_away.between_domains:
            if domain_B is None:
                raise InputError("batches have no `domain`; give it, and remove_unused_columns=False in the arguments")
            a_B = domain_B == 0
            return distance_between(vectors_BTD[a_B], vectors_BTD[~a_B], counts_BT[a_B], counts_BT[~a_B])
        if self.push_away.regularizer == "uniformity":
            return -uniformity(vectors_BTD, counts_BT, generator=self._draw())
        if self.push_away.regularizer == "different-tokens":
            return different_token_distance(vectors_BTD, next_BT, counts_BT)
        return mean_distance(vectors_BTD, counts_BT)

    def _draw(self) -> torch.Generator:
        """Generator for one step: the same in a resumed training, and independent of dropout's random numbers."""
        return torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)


def _targets(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return which positions except the last have a target, and these targets.

    Only the push-away loss would act on a position without a target, and would push all vectors of the last position to
    one point opposite to the others: a model trained that way predicted badly there on longer text.
    """
    next_BT = inputs["labels"][:, 1:]
    counts_BT = next_BT != -100
    mask_BT = inputs.get("attention_mask")
    return counts_BT if mask_BT is None else counts_BT & mask_BT[:, :-1].bool(), next_BT


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    """Whether a module uses reentrant checkpointing: then only its result has a gradient, not what is inside."""
    settings = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(getattr(module, "gradient_checkpointing", False) and settings.get("use_reentrant"))


class _Means:
    """Means over batches, without synchronising with the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        self._sums = {name: self._sums.get(name, 0) + value for name, value in values.items()}
        self._count += 1

    def take(self) -> dict[str, float]:
        found = {name: float(value) / self._count for name, value in self._sums.items()}
        self._sums, self._count = {}, 0
        return found


class Watch(TrainerCallback):
    """Reports progress, and ends the training if a loss is NaN or infinite."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: object
    ) -> None:
        """Report the step."""
        self._advance(state.global_step, state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: object) -> None:
        """Check the newest numbers.

        :raises ModelError: one of them is NaN or infinite.
        """
        bad = [name for name, value in state.log_history[-1].items() if not math.isfinite(value)]
        if bad:
            rate = args.learning_rate
            raise ModelError(
                f"the training diverged: {bad[0]} is no number at step {state.global_step}; take a lower "
                f"`learning_rate` than {rate:g}"
            )


def training_arguments(
    folder: str, config: TrainConfig, learning_rate: float, *, use_bfloat16: bool
) -> TrainingArguments:
    """Return the Trainer's settings: rows in the given order, evaluations and checkpoints at intervals.

    :param folder: folder for checkpoints, of which the last is kept.
    """
    every = math.ceil(config.steps / config.evaluations)
    return TrainingArguments(
        output_dir=folder,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine" if config.schedule == "cosine" else "constant_with_warmup",
        warmup_steps=min(config.steps // 20, 100),
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_on_start=True,
        eval_steps=every,
        logging_steps=every,
        save_steps=every,
        save_total_limit=1,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        bf16=use_bfloat16,
        use_cpu=pick_device("auto").type == "cpu",
        seed=config.seed,
        disable_tqdm=True,
        report_to="none",
    )

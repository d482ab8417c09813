"""The Trainer with a push-away loss, against transformers' own Trainer, gradients by hand, and its own logs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import Trainer, TrainingArguments

from knnlm.errors import InputError, LayerError, ModelError
from knnlm.studies.train.config import REGULARIZERS, PushAway, TrainConfig
from knnlm.studies.train.trainer import PushAwayTrainer, Watch, training_arguments
from knnlm.studies.train.windows import Windows
from tests.tiny_models import VOCABULARY, tiny_model

CONTEXT = 16
CONFIG = TrainConfig(steps=8, batch_size=4, context=CONTEXT, evaluations=2, dtype="float32")


def windows(count: int, seed: int = 0, domains: int = 1) -> Windows:
    """Random tokens, some of them often, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(torch.rand(count * CONTEXT, generator=generator) ** 3 * 250).int().numpy() for _ in range(domains)]
    starts = torch.arange(0, count * CONTEXT, CONTEXT).numpy()
    return Windows(rows, [starts] * domains, CONTEXT)


def batch(rows: Windows, size: int) -> dict[str, torch.Tensor]:
    items = [rows[number] for number in range(size)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def arguments(folder: Path, **changed):
    made = training_arguments(str(folder), CONFIG, 1e-2, use_bfloat16=False)
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def make(model, folder: Path, push_away: PushAway, *, callbacks=(), domains: int = 1, **changed) -> PushAwayTrainer:
    return PushAwayTrainer(
        model,
        arguments(folder, **changed),
        push_away=push_away,
        train_dataset=windows(CONFIG.steps * CONFIG.batch_size, domains=domains),
        eval_dataset=windows(6, seed=1),
        callbacks=callbacks,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weight_zero_is_a_plain_trainer_to_the_last_bit(kind, tmp_path):
    # GPT-2 has dropout: the random numbers must be the same too.
    plain_model, model = tiny_model(kind), tiny_model(kind)
    rows = windows(CONFIG.steps * CONFIG.batch_size)
    plain = Trainer(plain_model, arguments(tmp_path / "plain"), train_dataset=_Plain(rows), eval_dataset=_Plain(rows))
    plain.train()
    make(model, tmp_path / "ours", PushAway(weight=0.0)).train()
    for name, value in weights(plain_model).items():
        assert torch.equal(value, weights(model)[name]), name


def test_weight_zero_is_a_plain_trainer_where_uniformity_draws_vectors(tmp_path):
    # 80 rows of 15 vectors are more than the 1,024 that uniformity looks at; dropout comes after the drawing.
    rows, ended = windows(240), []
    changed = {"max_steps": 3, "per_device_train_batch_size": 80, "eval_strategy": "no", "eval_on_start": False}
    for push_away in (None, PushAway(weight=0.0, regularizer="uniformity")):
        model, settings = tiny_model("gpt2"), arguments(tmp_path / "run", **changed)
        if push_away is None:
            Trainer(model, settings, train_dataset=_Plain(rows)).train()
        else:
            PushAwayTrainer(model, settings, push_away=push_away, train_dataset=rows).train()
        ended.append(weights(model))
    assert [name for name in ended[0] if not torch.equal(ended[0][name], ended[1][name])] == []


def test_uniformity_draws_by_seed_and_step(tmp_path):
    model = tiny_model("llama")
    trainer = make(model, tmp_path, PushAway(weight=1.0, regularizer="uniformity"))
    rows, found = batch(windows(80), 80), []
    for step, seed in ((4, 0), (4, 0), (5, 0), (4, 1)):
        trainer.state.global_step, trainer.args.seed = step, seed
        found.append(trainer.compute_loss(model.train(), rows).item())
    assert found[0] == found[1] and len(set(found)) == 3


class _Plain(torch.utils.data.Dataset):
    """The same windows without the number of the domain."""

    def __init__(self, rows: Windows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        item = self._rows[number]
        return {name: item[name] for name in ("input_ids", "labels")}


def test_loss_falls_and_vectors_are_pushed_apart(tmp_path):
    ended = {}
    for weight in (0.0, 1.0):
        trainer = make(tiny_model("gpt2"), tmp_path / str(weight), PushAway(weight=weight))
        trainer.train()
        first, last = [entry for entry in trainer.state.log_history if "cross_entropy" in entry]
        assert last["cross_entropy"] < first["cross_entropy"]
        assert last["loss"] == pytest.approx(last["cross_entropy"] - weight * last["spread"], rel=1e-4)
        assert last["spread"] == pytest.approx(last["dispersion"], rel=1e-6)
        ended[weight] = last["dispersion"]
    assert ended[1.0] > ended[0.0] + 0.05


# Gradients against a loss written out by hand: every pair, the layer's vectors from the model's own modules.


def by_hand(model, inputs, regularizer: str, layer: str):
    """The cross-entropy, and the distance to be raised, in float64, in the plainest way."""
    held = {}
    place = {"final_norm": model.transformer.ln_f, "1.ffn_input": model.transformer.h[1].ln_2}[layer]
    handle = place.register_forward_hook(lambda module, args, output: held.setdefault("vectors", output))
    logits = model(inputs["input_ids"]).logits
    handle.remove()
    # transformers computes the cross-entropy in float32.
    loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    vectors, tokens = held["vectors"].flatten(0, 1), inputs["input_ids"].roll(-1, dims=1).flatten()
    last = torch.arange(len(tokens)) % CONTEXT == CONTEXT - 1
    distances = 1 - cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    pairs = ~torch.eye(len(tokens), dtype=torch.bool) & ~last[:, None] & ~last
    if regularizer == "different-tokens":
        pairs &= tokens[:, None] != tokens
    if regularizer == "between":
        domain = inputs["domain"].repeat_interleave(CONTEXT)
        pairs &= domain[:, None] < domain
    if regularizer == "uniformity":
        return loss, -torch.exp(-4 * distances[pairs]).mean().log()
    return loss, distances[pairs].mean()


@pytest.mark.parametrize("layer", ["final_norm", "1.ffn_input"])
@pytest.mark.parametrize("regularizer", ["push-away", "uniformity", "different-tokens", "between"])
def test_gradient_is_that_of_the_loss_by_hand(regularizer, layer, tmp_path):
    model = tiny_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double()
    between = regularizer == "between"
    push_away = PushAway(
        weight=0.7, regularizer="push-away" if between else regularizer, layer=layer, between_domains=between
    )
    trainer = make(model, tmp_path, push_away, domains=2)
    inputs = batch(windows(2, domains=2), 4)
    loss, spread = by_hand(model.train(), inputs, regularizer, layer)
    (loss - 0.7 * spread).backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    found = trainer.compute_loss(model, inputs)
    torch.testing.assert_close(found, loss - 0.7 * spread, rtol=1e-10, atol=0, check_dtype=False)
    found.backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, expected[name], rtol=1e-7, atol=1e-12, msg=name)


def test_padding_does_not_count(tmp_path):
    model = tiny_model("llama")
    trainer = make(model, tmp_path, PushAway(weight=0.5))
    short = batch(windows(2, domains=2), 4) | {"attention_mask": torch.ones(4, CONTEXT, dtype=torch.long)}
    padded = {
        name: torch.nn.functional.pad(value, (0, 5)) if value.ndim == 2 else value for name, value in short.items()
    }
    padded["labels"][:, CONTEXT:] = -100
    model.train()
    kinds = [PushAway(weight=0.5, regularizer=name) for name in REGULARIZERS]
    for push_away in (*kinds, PushAway(weight=0.5, between_domains=True)):
        trainer.push_away = push_away
        wanted, found = trainer.compute_loss(model, short), trainer.compute_loss(model, padded)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_position_without_a_target_is_not_pushed_alone(tmp_path):
    # The last one, and those whose label is -100: nothing else would hold them.
    model = tiny_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    trainer = make(model, tmp_path, PushAway(weight=0.5))
    inputs = batch(windows(4), 4)
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][:, 10:] = -100
    trainer.compute_loss(model.train(), inputs).backward()
    positions = model.transformer.wpe.weight.grad.abs().sum(dim=1)
    # Causal: position 9 and later ones see earlier ones only, and 8 is the last that predicts.
    assert (positions[:9] > 0).all() and (positions[9:] == 0).all()


def test_accumulated_micro_batches_weigh_as_one_batch(tmp_path):
    # Both micro-batches are the same rows, so that their distances are those of either.
    ended = []
    for micro_batches in (1, 2):
        model = tiny_model("llama")
        rows = windows(4)
        doubled = torch.utils.data.ConcatDataset([rows] * micro_batches)
        changed = {"max_steps": 1, "gradient_accumulation_steps": micro_batches, "logging_steps": 1}
        trainer = PushAwayTrainer(
            model,
            arguments(
                tmp_path / str(micro_batches), **changed, eval_on_start=False, eval_strategy="no", max_grad_norm=0
            ),
            push_away=PushAway(weight=1.0),
            train_dataset=doubled,
        )
        trainer.create_optimizer = lambda model=None, t=trainer: _plain_descent(t)
        trainer.train()
        ended.append((weights(model), trainer.state.log_history[0]))
    for name, value in ended[0][0].items():
        torch.testing.assert_close(ended[1][0][name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert ended[1][1]["cross_entropy"] == pytest.approx(ended[0][1]["cross_entropy"], rel=1e-5)


def test_labels_are_smoothed_as_a_plain_trainer_smooths_them(tmp_path):
    rows, ended = windows(CONFIG.steps * CONFIG.batch_size), []
    changed = {"label_smoothing_factor": 0.2, "eval_strategy": "no", "eval_on_start": False}
    for kind in (Trainer, PushAwayTrainer):
        model, own = tiny_model("gpt2"), {} if kind is Trainer else {"push_away": PushAway(weight=0.0)}
        settings = arguments(tmp_path / "run", **changed)
        kind(model, settings, train_dataset=_Plain(rows) if kind is Trainer else rows, **own).train()
        ended.append(weights(model))
    assert [name for name in ended[0] if not torch.equal(ended[0][name], ended[1][name])] == []


def _plain_descent(trainer) -> torch.optim.Optimizer:
    """Adam would hide a gradient that is too large by a factor."""
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    return trainer.optimizer


def test_evaluation_is_the_plain_cross_entropy(tmp_path):
    model = tiny_model("gpt2")
    model.loss_type = "ForCausalLM"  # without it, transformers divides GPT-2's loss by a target too many a row
    trainer = make(model, tmp_path, PushAway(weight=0.5))
    metrics = trainer.evaluate()
    inputs = batch(windows(6, seed=1), 6)["input_ids"]
    with torch.no_grad():
        output = model.eval()(inputs, output_hidden_states=True)
    loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    vectors = output.hidden_states[-1][:, :-1]
    parts = [_dispersion(part.flatten(0, 1).double()) for part in vectors.split(4)]
    assert metrics["eval_dispersion"] == pytest.approx(sum(parts) / 2, rel=1e-5)


def _dispersion(vectors: torch.Tensor) -> float:
    distances = 1 - cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    return distances[~torch.eye(len(vectors), dtype=torch.bool)].mean().item()


def count_hooks(model) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_no_hook_stays(tmp_path):
    model = tiny_model("gpt2")
    trainer = make(model, tmp_path, PushAway(weight=0.1, layer="-1.ffn_input"))
    trainer.train()
    assert count_hooks(model) == 0
    with pytest.raises(Exception, match=r"out of range|index"):
        trainer.compute_loss(model, {"input_ids": torch.tensor([[VOCABULARY + 5]]), "labels": torch.tensor([[1]])})
    assert count_hooks(model) == 0


def test_bfloat16_products_and_their_vectors_in_float32(tmp_path):
    trainer = make(tiny_model("llama"), tmp_path, PushAway(weight=0.1, layer="1.ffn_output"), bf16=True)
    trainer.train()
    assert trainer.state.global_step == CONFIG.steps
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())


# What cannot be


def test_layer_that_does_not_exist(tmp_path):
    with pytest.raises(LayerError, match=r"no layer fits '9.ffn_input'; there are 0-2.attn_input"):
        make(tiny_model("gpt2"), tmp_path, PushAway(layer="9.ffn_input"))


def test_pattern_of_several_layers(tmp_path):
    with pytest.raises(InputError, match=r"`layer` '\*.ffn_input' fits 3 layers, but has to name one"):
        make(tiny_model("gpt2"), tmp_path, PushAway(layer="*.ffn_input"))


def test_layer_before_everything_that_is_trained(tmp_path):
    model = tiny_model("gpt2").requires_grad_(False)
    model.transformer.h[1].requires_grad_(True)
    trainer = make(model, tmp_path, PushAway(weight=0.1, layer="0.block_output"))
    with pytest.raises(ModelError, match=r"no weight that is trained comes before layer 0.block_output; take another"):
        trainer.train()


def test_reentrant_checkpointing_is_named_as_the_cause_and_the_other_kind_works(tmp_path):
    for reentrant in (True, False):
        model = tiny_model("gpt2")
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        trainer = make(model, tmp_path, PushAway(weight=0.1, layer="1.ffn_input"), eval_on_start=False)
        if reentrant:
            with pytest.raises(ModelError, match=r"use_reentrant=True cuts layer 1.ffn_input off .*use_reentrant=F"):
                trainer.train()
        else:
            trainer.train()
            assert trainer.state.log_history[0]["spread"] > 0


def test_several_gpus_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(InputError, match=r"2 GPUs in one process; hide all but one, as CUDA_VISIBLE_DEVICES=0 does"):
        make(tiny_model("gpt2"), tmp_path, PushAway())


def test_batches_without_domains(tmp_path):
    trainer = make(tiny_model("gpt2"), tmp_path, PushAway(weight=0.1, between_domains=True))
    inputs = {name: value for name, value in batch(windows(4), 4).items() if name != "domain"}
    with pytest.raises(InputError, match=r"no `domain`; give it, and remove_unused_columns=False"):
        trainer.compute_loss(trainer.model.train(), inputs)


def test_diverged_training_is_stopped(tmp_path):
    model = tiny_model("gpt2")
    trainer = make(model, tmp_path, PushAway(weight=0.1), callbacks=[Watch(lambda done, total: None)])
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(math.nan)
    with pytest.raises(ModelError, match=r"the training diverged: eval_loss is no number at step 0; take a lower"):
        trainer.train()


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weight_that_cannot_be(weight):
    with pytest.raises(InputError, match=r"`weight` is .*, but λ must be a finite number of at least 0"):
        PushAway(weight=weight)


def test_other_settings_that_cannot_be():
    for changed, words in [
        ({"regularizer": "repel"}, "`regularizer` is 'repel', but must be one of push-away"),
        ({"regularizer": "uniformity", "between_domains": True}, "`regularizer='uniformity'` has no form between"),
    ]:
        with pytest.raises(InputError, match=words):
            PushAway(**changed)
    for changed, words in [
        ({"steps": 0}, "`steps` is 0, but"),
        ({"learning_rate": math.nan}, "`learning_rate` is nan, but"),
        ({"context": 1}, "`context` is 1, but a window needs"),
        ({"lora": 4, "from_scratch": True}, "leave one of them out"),
        ({"schedule": "linear"}, "`schedule` is 'linear', but must be one of cosine, constant"),
        ({"dtype": "float16"}, "`dtype` is 'float16', but training takes"),
        ({"seed": -1}, "`seed` is -1, but"),
        ({"batch_size": 3, "push_away": PushAway(between_domains=True)}, "`batch_size` is 3, but has to be even"),
    ]:
        with pytest.raises(InputError, match=words):
            replace(CONFIG, **changed)

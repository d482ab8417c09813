"""`knnlm train`: the folder that it makes, LoRA, two domains, going on after a stop, and what cannot be."""

from __future__ import annotations

import html
import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import knnlm.studies.train.train
from knnlm.cli.screen import Screen
from knnlm.config import Settings, TextConfig
from knnlm.errors import DatastoreExists, InputError, LayerError, ModelError
from knnlm.files import new_folder
from knnlm.model.loading import load_model
from knnlm.pipeline import score
from knnlm.report import numbers
from knnlm.studies.train.config import PushAway, TrainConfig
from knnlm.studies.train.page import render_train
from knnlm.studies.train.train import train, train_document
from knnlm.studies.train.trainer import Watch
from knnlm.studies.train.windows import VALIDATION_TOKENS, training_windows, validation_windows
from knnlm.text.corpus import read_documents, tokenize
from knnlm.text.held_out import split_documents
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import tiny_model

CONFIG = TrainConfig(
    steps=6, batch_size=4, context=32, evaluations=3, learning_rate=1e-2, push_away=PushAway(weight=0.1)
)


class StopAt:
    """A Progress that is interrupted after some steps: as by Ctrl-C, or by an error."""

    def __init__(self, step: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self._step, self._error = step, error

    @contextmanager
    def stage(self, name: str, unit: str) -> Iterator:
        def advance(done: int, total: int | None) -> None:
            assert (name, unit, total) == ("training", "steps", CONFIG.steps)
            if done == self._step:
                raise self._error

        yield advance

    def note(self, line: str) -> None:
        raise AssertionError(line)


def kept(out: Path, step: int) -> str:
    return (
        f"the training is kept up to step {step} in {out}.checkpoints; the same training with `resume=True` goes on "
        "with it, with `overwrite=True` in its place begins anew"
    )


@pytest.fixture
def stopped(gpt2_folder, text_file, tmp_path) -> Path:
    """Where a training of CONFIG was to go that was stopped after its first checkpoint, at step 2."""
    with pytest.raises(KeyboardInterrupt):
        train(gpt2_folder, [text_file], tmp_path / "out", config=CONFIG, progress=StopAt(3))
    return tmp_path / "out"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if torch.equal(a[name], b[name])]


# The result


def test_result_is_a_model_folder_with_what_happened(gpt2_folder, text_file, tmp_path):
    result = train(gpt2_folder, [text_file], tmp_path / "out", config=CONFIG)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not list((tmp_path / "out").glob("*.bin")) and not list((tmp_path / "out").glob("*.pt"))
    assert json.loads((tmp_path / "out" / "train.json").read_text()) == json.loads(json.dumps(train_document(result)))
    assert [point.step for point in result.points] == [0, 2, 4, 6]
    first, last = result.points[0], result.points[-1]
    assert first.cross_entropy is None and last.text.perplexity < first.text.perplexity
    assert result.tokens == 6 * 4 * 32 and result.parameters == result.trained_parameters
    lm = load_model(tmp_path / "out")
    assert lm.model.config.use_cache is True
    assert not same(weights(gpt2_folder), weights(tmp_path / "out"))
    assert score(lm, [text_file], settings=Settings(text=TextConfig(context=32, max_tokens=500))).tokens > 480


def test_validation_perplexity_is_that_of_transformers_on_the_held_out_tenth(gpt2_folder, text_file, tmp_path):
    result = train(gpt2_folder, [text_file], tmp_path / "out", config=replace(CONFIG, dtype="float32"))
    lm = load_model(gpt2_folder)
    documents = split_documents(tokenize(read_documents([text_file]), lm.encode))
    end = [lm.tokenizer.eos_token_id]
    row = np.concatenate([part for held_out, one in documents if held_out for part in (one.tokens, end)])
    inputs = torch.from_numpy(row[: len(row) // 32 * 32].reshape(-1, 32)).long()
    for folder, point in ((gpt2_folder, result.points[0]), (tmp_path / "out", result.points[-1])):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder).eval()(inputs).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
        assert point.text.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_lora_changes_the_linear_layers_of_the_blocks_only_and_is_merged(gpt2_folder, text_file, tmp_path):
    config = replace(CONFIG, lora=2)
    result = train(gpt2_folder, [text_file], tmp_path / "out", config=config)
    kept = same(weights(gpt2_folder), weights(tmp_path / "out"))
    changed = set(weights(gpt2_folder)) - set(kept)
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"transformer.h.{block}.{part}.weight" for block in range(3) for part in parts}
    # Rank 2: (in + out) of each of the four matrices.
    assert result.trained_parameters == 2 * 3 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    assert result.parameters == tiny_model("gpt2").num_parameters()
    assert load_model(tmp_path / "out").layer_names == load_model(gpt2_folder).layer_names


def test_from_scratch_takes_the_shape_only(gpt2_folder, text_file, tmp_path):
    shape = tmp_path / "shape"
    shape.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (shape / name).write_bytes((gpt2_folder / name).read_bytes())
    config = replace(CONFIG, from_scratch=True, learning_rate=1e-9)
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(shape, [text_file], tmp_path / name, config=replace(config, seed=seed))
        made.append(weights(tmp_path / name)["transformer.wte.weight"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert made[0].std().item() == pytest.approx(0.02, rel=0.05)  # GPT-2's initialisation


def test_two_domains_share_each_batch_and_are_validated_apart(gpt2_folder, text_file, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", ["zebra quilt " * 100] * 24)
    result = train(gpt2_folder, [text_file], tmp_path / "out", other_text=[other], config=CONFIG)
    assert result.settings["between_domains"] is True
    last = result.points[-1]
    assert last.other is not None and last.other.perplexity < last.text.perplexity
    assert last.spread != pytest.approx(last.dispersion, rel=1e-3)


# Windows


def test_an_epoch_has_each_window_once_and_the_next_has_other_borders():
    row = np.arange(100, dtype=np.int32)
    windows = training_windows([row], 10, 27, seed=3)
    starts = [int(windows[number]["input_ids"][0]) for number in range(27)]
    assert all((windows[n]["input_ids"] == torch.arange(10) + starts[n]).all() for n in range(27))
    first, second = starts[:9], starts[9:18]
    for epoch in (first, second):
        # An offset of 1 to 9 leaves nine whole windows.
        assert len({start % 10 for start in epoch}) == 1 and len(set(epoch)) == 9
        assert epoch != sorted(epoch)
    assert first[0] % 10 != second[0] % 10


def test_domains_take_turns():
    rows = [np.full(50, domain, np.int32) for domain in (7, 8)]
    windows = training_windows(rows, 10, 12, seed=0)
    assert len(windows) == 12
    assert [int(windows[number]["input_ids"][0]) for number in range(12)] == [7, 8] * 6
    assert [int(windows[number]["domain"]) for number in range(12)] == [0, 1] * 6


def test_validation_windows_do_not_overlap_and_have_a_budget():
    row = np.arange(VALIDATION_TOKENS * 3, dtype=np.int32)
    windows = validation_windows(row, 128)
    starts = [int(windows[number]["input_ids"][0]) for number in range(len(windows))]
    assert len(starts) == VALIDATION_TOKENS // 128 and starts[0] == 0 and starts[-1] == len(row) - 128
    assert min(np.diff(starts)) >= 128
    assert len(validation_windows(row[:700], 128)) == 5


# Going on


@pytest.mark.parametrize("lora", [None, 2])
def test_a_training_that_was_stopped_ends_as_one_that_was_not(lora, gpt2_folder, text_file, tmp_path):
    # GPT-2 has dropout, so the random numbers have to go on too.
    config = replace(CONFIG, lora=lora)
    whole = train(gpt2_folder, [text_file], tmp_path / "whole", config=config)
    with pytest.raises(KeyboardInterrupt) as stop:
        train(gpt2_folder, [text_file], tmp_path / "out", config=config, progress=StopAt(5))
    assert stop.value.__notes__ == [kept(tmp_path / "out", 4)]
    assert not (tmp_path / "out").exists() and (tmp_path / "out.checkpoints" / "checkpoint-4").is_dir()
    resumed = train(gpt2_folder, [text_file], tmp_path / "out", config=config, resume=True)
    assert not (tmp_path / "out.checkpoints").exists()
    assert resumed.points == whole.points
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out")) == list(weights(tmp_path / "out"))


def test_a_half_written_checkpoint_is_passed_over(stopped, gpt2_folder, text_file):
    half = stopped.with_name("out.checkpoints") / "checkpoint-4"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    result = train(gpt2_folder, [text_file], stopped, config=CONFIG, resume=True)
    assert [point.step for point in result.points] == [0, 2, 4, 6]


def test_another_training_does_not_go_on(stopped, gpt2_folder, text_file, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", texts(5, 24))
    for text, config, words in [
        (text_file, replace(CONFIG, steps=8), "another training: steps was 6, and now is 8; give the same"),
        (text_file, replace(CONFIG, push_away=PushAway(weight=0.2)), "another training: weight was 0.1, and now is"),
        (other, CONFIG, "another training: text 1 was"),
    ]:
        with pytest.raises(InputError, match=words) as raised:
            train(gpt2_folder, [text], stopped, config=config, resume=True)
        assert "to begin anew" in str(raised.value) and not hasattr(raised.value, "__notes__")


def test_a_training_that_was_stopped_is_neither_lost_nor_taken_for_another(stopped, gpt2_folder, text_file):
    with pytest.raises(
        InputError, match=r"holds a training that was stopped; add `resume=True` to .*, or `overwrite=True` to"
    ):
        train("not looked at", [text_file], stopped, config=CONFIG)
    result = train(gpt2_folder, [text_file], stopped, config=replace(CONFIG, steps=3), overwrite=True)
    assert [point.step for point in result.points] == [0, 1, 2, 3]
    assert [path.name for path in stopped.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}])
def test_what_was_put_beside_checkpoints_is_kept(options, stopped, text_file):
    notes = stopped.with_name("out.checkpoints") / "notes.txt"
    notes.write_text("mine")
    before = sorted(notes.parent.rglob("*"))
    with pytest.raises(DatastoreExists, match=r"holds notes\.txt, which knnlm did not make; move that, or choose"):
        train("not looked at", [text_file], stopped, config=CONFIG, **options)
    assert sorted(notes.parent.rglob("*")) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["mine.txt", "training.json"])
def test_a_folder_of_somebody_else_is_never_taken_for_checkpoints(name, overwrite, resume, text_file, tmp_path):
    mine = tmp_path / "out.checkpoints" / name
    mine.parent.mkdir()
    mine.write_text('{"steps": 6}')
    with pytest.raises(DatastoreExists, match="where checkpoints would lie, but holds something else; choose another"):
        train("not looked at", [text_file], tmp_path / "out", config=CONFIG, resume=resume, overwrite=overwrite)
    assert mine.read_text() == '{"steps": 6}'


@pytest.mark.parametrize(
    ("place", "replacement", "error"),
    [
        ("_make_trainer", ModelError("no"), ModelError),
        ("training_arguments", RuntimeError("no"), RuntimeError),
        ("_save", OSError(28, "No space left on device"), OSError),
    ],
)
def test_an_error_of_any_kind_leaves_checkpoints_and_says_so(
    place, replacement, error, stopped, gpt2_folder, text_file, monkeypatch
):
    def fail(*given, **named):
        raise replacement

    with monkeypatch.context() as patched:
        patched.setattr(knnlm.studies.train.train, place, fail)
        with pytest.raises(error) as raised:
            train(gpt2_folder, [text_file], stopped, config=CONFIG, resume=True)
    assert raised.value.__notes__ == [kept(stopped, 6 if place == "_save" else 2)]
    result = train(gpt2_folder, [text_file], stopped, config=CONFIG, resume=True)
    assert [point.step for point in result.points] == [0, 2, 4, 6]


def test_a_training_that_diverges_leaves_its_last_good_checkpoint(gpt2_folder, text_file, tmp_path, monkeypatch):
    on_log = Watch.on_log

    def diverge(self, args, state, control, **rest):
        if state.global_step == 4:
            state.log_history[-1]["loss"] = math.nan
        on_log(self, args, state, control, **rest)

    monkeypatch.setattr(Watch, "on_log", diverge)
    with pytest.raises(ModelError, match="the training diverged: loss is no number at step 4") as raised:
        train(gpt2_folder, [text_file], tmp_path / "out", config=CONFIG)
    assert raised.value.__notes__ == [kept(tmp_path / "out", 2)]
    assert (tmp_path / "out.checkpoints" / "checkpoint-2" / "trainer_state.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_before_the_first_checkpoint_nothing_is_kept_and_nothing_said(error, gpt2_folder, text_file, tmp_path):
    with pytest.raises(error) as raised:
        train(gpt2_folder, [text_file], tmp_path / "deep" / "out", config=CONFIG, progress=StopAt(1, error))
    assert not hasattr(raised.value, "__notes__")
    assert list(tmp_path.iterdir()) == []


def test_resume_without_a_checkpoint_starts_from_the_beginning(gpt2_folder, text_file, tmp_path):
    result = train(gpt2_folder, [text_file], tmp_path / "out", config=CONFIG, resume=True)
    assert result.points[0].step == 0


# What cannot be: found before the training, and nothing is left


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"push_away": PushAway(layer="9.ffn_input")}, LayerError, r"no layer fits '9.ffn_input'; there are"),
        # Found out in the first step, when a loss has no weight to change.
        ({"lora": 2, "push_away": PushAway(weight=1, layer="0.attn_input")}, ModelError, "no weight that is trained"),
        ({"context": 129}, InputError, "`context` is 129, but .* sees at most 128 tokens"),
    ],
)
def test_settings_that_the_model_cannot_have(changed, error, words, gpt2_folder, text_file, tmp_path):
    with pytest.raises(error, match=words):
        train(gpt2_folder, [text_file], tmp_path / "out", config=replace(CONFIG, **changed))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        (texts(0, 1), r"`text` has \d+ tokens, too few to train on; give at least 640"),
        (texts(0, 4), r"`text` has [\d,]+ tokens to train on and \d+ held out, but a window takes 128; give more text"),
    ],
)
def test_text_that_is_too_short(documents, words, gpt2_folder, tmp_path):
    text = write_jsonl(tmp_path / "short.jsonl", documents)
    with pytest.raises(InputError, match=words):
        train(gpt2_folder, [text], tmp_path / "out", config=replace(CONFIG, context=128))
    with pytest.raises(InputError, match=words.replace("`text`", "`other_text`")):
        long = write_jsonl(tmp_path / "long.jsonl", texts(1, 40))
        train(gpt2_folder, [long], tmp_path / "out", other_text=[text], config=replace(CONFIG, context=128))
    assert {path.name for path in tmp_path.iterdir()} == {"short.jsonl", "long.jsonl"}


def test_place_that_is_taken_unless_it_is_ours(gpt2_folder, text_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(DatastoreExists, match="exists and is not empty"):
        train(gpt2_folder, [text_file], tmp_path / "out", config=CONFIG)
    with pytest.raises(DatastoreExists, match="is no model that knnlm trained"):
        train(gpt2_folder, [text_file], tmp_path / "out", config=CONFIG, overwrite=True)
    (tmp_path / "out" / "mine.txt").unlink()
    train(gpt2_folder, [text_file], tmp_path / "out", config=CONFIG)
    train(gpt2_folder, [text_file], tmp_path / "out", config=replace(CONFIG, steps=3), overwrite=True)
    document = json.loads((tmp_path / "out" / "train.json").read_text())
    assert document["settings"]["steps"] == 3
    assert document["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(DatastoreExists, match=r"holds mine\.txt, which knnlm did not make; move that, or choose"):
        train("not looked at", [text_file], tmp_path / "out", config=CONFIG, overwrite=True)


def test_second_training_in_one_place_learns_it_before_its_work(stopped, text_file):
    """And leaves the checkpoints of the first alone."""
    before = sorted(stopped.with_name("out.checkpoints").rglob("*"))
    for options in ({"overwrite": True}, {"resume": True}):
        with new_folder(stopped), pytest.raises(DatastoreExists, match="another run is writing"):
            train("not looked at", [text_file], stopped, config=CONFIG, **options)
    assert before and sorted(stopped.with_name("out.checkpoints").rglob("*")) == before


@pytest.mark.parametrize(("missing", "lora"), [("accelerate", None), ("peft", 4)])
def test_extra_that_is_not_installed(missing, lora, gpt2_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(knnlm.studies.train.train, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(InputError, match=rf"training needs {missing}, which is not installed; pip install '\.\[train"):
        train(gpt2_folder, [text_file], tmp_path / "out", config=replace(CONFIG, lora=lora))


def test_the_current_folder_and_places_below_no_folder(gpt2_folder, text_file, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train(gpt2_folder, [text_file], ".", config=CONFIG)
    assert (tmp_path / "here" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    with pytest.raises(DatastoreExists, match="mount point"):
        train("not looked at", [text_file], "/", config=CONFIG)


# The command line

COMMAND = ("train", "--steps", 4, "--batch-size", 4, "--context", 32, "--dtype", "float32")


def test_command_prints_one_document(call, gpt2_folder, text_file, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", texts(5, 24))
    places = ("--model", gpt2_folder, "--text", text_file, "--other-text", other, other, "--out", tmp_path / "out")
    ended = call(*COMMAND, *places, "--push-away", 0.01, "--json")
    assert (ended.status, ended.errors) == (0, ())
    document = json.loads(ended.out)
    assert document == json.loads((tmp_path / "out" / "train.json").read_text())
    assert document["settings"]["weight"] == 0.01 and document["points"][-1]["other"]["perplexity"] > 1


def test_command_shows_a_table(call, gpt2_folder, text_file, tmp_path):
    ended = call(*COMMAND, "--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out", "--lora", 2)
    assert (ended.status, ended.errors) == (0, ())
    assert "validation perplexity" in ended.out and "3,072 of 51,488 parameters" in ended.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--push-away", "-1"), ("--push-away is -1.0", "finite number of at least 0")),
        (("--push-away", "nan"), ("--push-away is nan", "finite number")),
        (("--regularizer", "repel"), ("--regularizer is 'repel'", "push-away, uniformity, different-tokens")),
        (("--layer", "9.ffn_input"), ("no layer fits '9.ffn_input'", "final_norm")),
        (("--layer", "*.ffn_input"), ("--layer '*.ffn_input' fits 3 layers", "has to name one")),
        (("--lora", "0"), ("--lora is 0",)),
        (("--dtype", "float16"), ("--dtype is 'float16'", "training takes auto, float32 or bfloat16")),
        (("--batch-size", "few"), ("'few' is neither auto nor a number", "--batch-size")),
        (("--steps", "0"), ("--steps is 0",)),
        (("--context", "4000"), ("--context is 4000", "sees at most 128 tokens")),
        (("--text", "nowhere.txt"), ("there is no file or folder nowhere.txt", "check the path")),
    ],
)
def test_command_refuses_in_one_line(options, words, call, gpt2_folder, text_file, tmp_path):
    given = {"--model": gpt2_folder, "--text": text_file, "--out": tmp_path / "out"} | {options[0]: options[1]}
    ended = call(*COMMAND, *(part for pair in given.items() for part in pair))
    assert (ended.status, ended.out, len(ended.errors)) == (2, "", 1)
    assert [word for word in words if word not in ended.errors[0]] == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a job in the background is started with ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_stop_is_told_in_one_true_sentence(number, status, name, call, gpt2_folder, text_file, tmp_path, monkeypatch):
    command = (*COMMAND, "--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out")
    at_step = 0

    @contextmanager
    def stage(self, name: str, unit: str) -> Iterator:
        yield lambda done, total: os.kill(os.getpid(), number) if done == at_step else None

    monkeypatch.setattr(Screen, "stage", stage)
    note = kept(tmp_path / "out", 2).replace("`resume=True`", "--resume").replace("`overwrite=True`", "--overwrite")
    for at_step, told in ((1, "nothing half-written was left behind"), (3, note)):
        ended = call(*command)
        assert (ended.status, ended.out) == (status, "")
        assert ended.errors == (f"knnlm: stopped by {name}; {told}",)
        assert [path.name for path in tmp_path.iterdir()] == ([] if at_step == 1 else ["out.checkpoints"])


def test_report_has_every_number_and_the_protocol(call, gpt2_folder, text_file, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", texts(5, 24))
    places = ("--model", gpt2_folder, "--text", text_file, "--other-text", other, "--out", tmp_path / "out")
    ended = call(*COMMAND, *places, "--push-away", 0.01, "--report", tmp_path / "a" / "b")
    assert (ended.status, ended.errors) == (0, ()) and "a/b/train.html" in ended.out
    document = json.loads((tmp_path / "a" / "b" / "train.json").read_text())
    assert document == json.loads((tmp_path / "out" / "train.json").read_text())
    page = html.unescape((tmp_path / "a" / "b" / "train.html").read_text())
    for point in document["points"]:
        for held_out in (point["text"], point["other"]):
            assert f"<td>{held_out['dispersion']:.4f}</td><td>{numbers.perplexity(held_out['perplexity'])}</td>" in page
        if point["step"]:
            shown = "</td><td>".join(f"{point[name]:.4f}" for name in ("cross_entropy", "spread", "dispersion"))
            assert f"<td>{shown}</td>" in page
    sentences = document["protocol"]["paper"] + document["protocol"]["ours"]
    assert [line for line in (*sentences, "weight: 0.01", "seed: 0") if f"<li>{line}</li>" not in page] == []
    assert "minus 0.01 times what is raised: the mean distance between the texts" in page
    assert [key for key in ("perplexity", "dispersion", "spread") if f'id="chart-{key}"' not in page] == []


def test_report_of_plain_training_claims_nothing_of_a_loss(gpt2_folder, text_file, tmp_path):
    config = replace(CONFIG, push_away=PushAway())
    page = render_train(train_document(train(gpt2_folder, [text_file], tmp_path / "out", config=config)))
    assert "The loss is the cross-entropy alone" in page
    assert "held-out other text" not in page and 'id="chart-spread"' not in page


def test_report_folder_that_is_taken_is_found_before_the_training(call, gpt2_folder, text_file, tmp_path):
    places = ("--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out", "--report", text_file.parent)
    ended = call(*COMMAND, *places)
    assert ended.status == 2 and "is not an empty folder; choose another --report" in ended.errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_model_is_run_only_where_it_is_trusted(trusted, call, gpt2_folder, text_file, tmp_path):
    model = shutil.copytree(gpt2_folder, tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "modeling_own.py").write_text(
        "from transformers import GPT2LMHeadModel\n\n\nclass Own(GPT2LMHeadModel):\n    pass\n"
    )
    options = ("--text", text_file, "--out", tmp_path / "out", *(["--trust-remote-code"] if trusted else []))
    ended = call(*COMMAND, "--model", model, *options)
    assert ended.status == 0, ended.errors
    assert (tmp_path / "out" / "modeling_own.py").exists() == trusted

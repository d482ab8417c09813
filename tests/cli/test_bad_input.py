"""What a user can do wrong: one line that says the fact, the value and the way out, status 2 or 130, nothing left."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from knnlm.cli.screen import Screen
from knnlm.errors import InputError
from knnlm.model.hardware import pick_device
from knnlm.model.lm import LanguageModel
from tests.cli.refusals import PLAN, RUN, check_complete, check_whole, tree
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import save_tiny, tiny_bert, tiny_model, tiny_tokenizer

# Text


def test_missing_text(run_refused, tmp_path: Path) -> None:
    run_refused("there is no file or folder", "nowhere.txt", "check the path", text=tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("text.txt is empty (0 bytes)", "give a file")),
        (b" \n\t\n", ("text.txt has no text", "white space", "give a file")),
        (b"abc\x00\x01def", ("text.txt looks binary", "byte 3 is NUL", "give text in UTF-8")),
        (b"abc\xff\xfedef", ("text.txt is not UTF-8", "byte 3 is 0xff", "convert it")),
        (b"a", ("no document of the text has two tokens", "give more text")),
        (b"too short to hold any of it out", ("too short to hold some out", "--eval-text")),
    ],
)
def test_text_that_cannot_be_used(content: bytes, words: tuple[str, ...], run_refused, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    run_refused(*words, text=tmp_path / "text.txt")


@pytest.mark.parametrize("command", ["score", "build"])
def test_text_of_one_token(command: str, check_refused, gpt2_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a")
    options = ("--model", gpt2_folder, "--text", tmp_path / "text.txt", "--out", tmp_path / "out")
    check_refused(command, *options, words=("no document of the text has two tokens", "give more text"))


def test_evaluation_text_is_looked_at_before_the_work(run_refused, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("knnlm.pipeline.verbs.make_plan", None)  # the work cannot begin
    (tmp_path / "short.txt").write_text("too short")
    run_refused("gives 7 tokens", "at least 32 are needed in each", options=("--eval-text", tmp_path / "short.txt"))
    run_refused("nowhere.txt", "check the path", options=("--eval-text", tmp_path / "nowhere.txt"))


def test_json_line_without_the_field(run_refused, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"body": "words"}\n')
    run_refused("line 1 of", "no field 'text', only body", "--text-field", text=tmp_path / "text.jsonl")


@pytest.mark.parametrize(("command", "found"), [("run", "gives only about"), ("build", "has only")])
def test_fewer_keys_than_k(
    command: str, found: str, check_refused, gpt2_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Known when the keys are counted; where they are so few that an estimate tells, before."""
    options = ("--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out", "--layers", "-1.ffn_input")
    check_refused(command, *options, "--k", 99_999, words=("--k is 99999", found, "take a smaller k"))


def test_fewer_keys_than_the_index_needs(run_refused) -> None:
    words = ("'IVF9999,Flat' needs at least 9999 keys", "there are 5", "take auto, exact")
    run_refused(*words, options=("--index", "IVF9999,Flat", "--layers", "-1.ffn_input"))


# Options


WRONG_OPTIONS = {
    "--lambda 1.5": ("--lambda is 1.5", "from 0 to 1"),
    "--lambda nan": ("--lambda is nan", "from 0 to 1"),
    "--temperature 0": ("--temperature is 0", "above 0"),
    "--temperature inf": ("--temperature is inf", "finite"),
    "--k 0": ("--k is 0", "a whole number of at least 1"),
    "--k ten": ("'--k'", "valid integer", "knnlm run --help lists the options"),
    "--stride 64": ("--stride 64 is over --context 32", "take a stride of at most"),
    "--stride 0": ("--stride is 0", "above 0"),
    "--context 4096": ("--context is 4096", "at most 128 tokens", "take that"),
    "--max-tokens 0": ("--max-tokens is 0", "above 0"),
    "--eval-tokens 0": ("--eval-tokens is 0", "above 0"),
    "--eval-tokens 40": ("--eval-tokens is 40", "at least 128"),
    "--metric hamming": ("--metric is 'hamming'", "l2, cosine, ip"),
    "--index IVFnonsense": ("'IVFnonsense'", "FAISS", "take auto, exact"),
    "--index IVF0,Flat": ("'IVF0,Flat'", "no size in it may be 0", "take auto, exact"),
    "--index PCA64,Flat": ("'PCA64,Flat' for 32 dimensions", "a projection from 32 to 64", "take another size"),
    "--index IVF4,PQ7": ("'IVF4,PQ7' for 32 dimensions", "FAISS", "take auto, exact"),
    "--dtype int3": ("--dtype is 'int3'", "take auto, float32"),
    "--device abacus": ("--device is 'abacus'", "take auto, cpu"),
    "--device cpu:one": ("--device is 'cpu:one'", "take auto, cpu"),
    "--batch-size many": ("'many'", "--batch-size", "auto nor a number"),
    "--batch-size 0": ("--batch-size is 0", "above 0"),
    "--layers 9.ffn_input": ("no layer fits '9.ffn_input'", "0-2.attn_input", "0-2.ffn_input", "final_norm"),
    "--layers 1.middle": ("no layer fits '1.middle'", "0-2.attn_input", "0-2.ffn_input", "final_norm"),
    "--select 7.ffn_input": ("no layer fits '7.ffn_input'", "0-2.ffn_input", "final_norm"),
    "--select *.ffn_input": ("--select '*.ffn_input' fits 3 layers", "name one"),
    "--candidates 7.*": ("no layer fits '7.*'", "0-2.ffn_input", "final_norm"),
    "--key-dtype int8": ("--key-dtype is 'int8'", "float16, float32"),
    "--protocol mine": ("mine", "knn-transformers"),
    "--disk-budget 0.000001": ("over the 1000 bytes allowed", "--disk-budget", "take fewer --layers"),
    "--disk-budget nan": ("--disk-budget is nan", "above 0"),
    "--disk-budget inf": ("--disk-budget is inf", "finite"),
    "--memory 2": ("--memory is '2'", "such as 2GB"),
    "--memory 1MB": ("--memory is 0.0 GB", "the model and libraries take", "or more"),
    "--seed -1": ("--seed is -1", "from 0 to 2147483647"),
    "--seed 2147483648": ("--seed is 2147483648", "from 0 to 2147483647"),
    "--nonsense": ("--nonsense", "knnlm run --help lists the options"),
}


@pytest.mark.parametrize("given", WRONG_OPTIONS)
def test_wrong_option(given: str, run_refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knnlm.pipeline.steps.collect", None)  # the work cannot begin
    run_refused(*WRONG_OPTIONS[given], options=tuple(given.split()))


def test_cuda_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert pick_device("cuda:1").index == 1
    with pytest.raises(InputError, match="'cuda:2', but this machine has 2 of them; take cuda:0 to cuda:1"):
        pick_device("cuda:2")


def test_limit_of_one_token(run_refused) -> None:
    run_refused("--max-tokens is 1", "at least 2", options=("--max-tokens", 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "--text", "x"), ("Missing option '--model'", "knnlm run --help")),
        (("run", "--text"), ("'--text' requires an argument", "knnlm run --help")),
        (("verify",), ("Missing argument 'store'", "knnlm verify --help")),
        (("eval", "--eval-text", "a.txt", "store"), ("STORE comes first: knnlm eval STORE --eval-text …",)),
        (("walk",), ("No such command 'walk'", "knnlm --help")),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], words: tuple[str, ...], check_refused) -> None:
    check_refused(*arguments, words=words)


# Models


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_no_such_model(run_refused, tmp_path: Path) -> None:
    run_refused("there is no folder", "gone", "give the folder of a model", model=tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    run_refused("not a model", "config.json", "save_pretrained", model=tmp_path / "empty")
    run_refused("no-such/model could not be read as a model", model="no-such/model")


def test_model_without_a_tokenizer(run_refused, tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "bare")
    run_refused("bare has no tokenizer", model=tmp_path / "bare")


def test_encoder_only_model(run_refused, tmp_path: Path) -> None:
    run_refused("bert is an encoder-only model", "GPT-2 or Llama", model=save(tiny_bert(), tmp_path / "bert"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_model_that_is_not_finite_names_the_layer(value: float, run_refused, tmp_path: Path) -> None:
    broken = tiny_model("gpt2")
    broken.transformer.h[1].mlp.c_proj.bias.data[0] = value
    words = ("broken gives NaN or infinite values in layer 1.ffn_output", "try --dtype float32")
    run_refused(*words, model=save(broken, tmp_path / "broken"))


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose position 20 is broken, which the probe at loading does not reach."""
    broken = tiny_model("gpt2")
    broken.transformer.wpe.weight.data[20] = float("inf")
    return save(broken, tmp_path_factory.mktemp("models") / "late")


PLACE = ("layer 0.attn_input gives a vector that is not finite, at token 20 of text.jsonl, document 1", "try --dtype")


@pytest.mark.parametrize("command", ["run", "score", "build"])
def test_vector_that_is_not_finite_names_layer_and_place(
    command: str, late: Path, check_refused, text_file: Path, tmp_path: Path
) -> None:
    options = ("--model", late, "--text", text_file, "--out", tmp_path / "out", "--layers", "0.attn_input")
    check_refused(command, *options, words=PLACE)


def test_query_that_is_not_finite_names_layer_and_place(
    late: Path, call, check_refused, text_file: Path, tmp_path: Path
) -> None:
    """Keys from windows of 16 tokens are good."""
    options = ("--model", late, "--text", text_file, "--out", tmp_path / "store", "--layers", "0.attn_input")
    assert call("build", *options, "--context", 16).status == 0
    check_refused("eval", tmp_path / "store", "--eval-text", text_file, "--context", 32, words=PLACE)


def test_lm_that_is_not_finite_above_the_keys_names_layer_and_place(
    check_refused, store_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are good; without a check the LM's perplexity would be NaN."""
    model = tiny_model("gpt2")

    def break_position_20(_module, _given, vectors_BTD):
        vectors_BTD = vectors_BTD.clone()
        vectors_BTD[:, 20:21] = float("nan")
        return vectors_BTD

    model.transformer.ln_f.register_forward_hook(break_position_20)
    lm = LanguageModel.from_model(model, tiny_tokenizer(), name="broken")
    monkeypatch.setattr("knnlm.model.loading.load_model", lambda *_given, **_named: lm)
    words = ("layer final_norm gives a vector that is not finite, at token 20 of text.jsonl", "try --dtype")
    check_refused("eval", store_folder, "--eval-text", text_file, "--layers", "1.ffn_input", words=words)


# Places for output


ANY = ("--model", "any", "--text", "any")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["run", "build"])
def test_folder_that_holds_something(command: str, check_refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    options = (command, *ANY, "--out", tmp_path / "out")
    check_refused(*options, words=("out exists and is not empty", "choose another --out"))
    check_refused(*options, "--overwrite", words=("out is no datastore and is kept", "mine.txt; choose another --out"))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["run", "build", "score"])
def test_place_below_a_file(command: str, check_refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    words = ("--out", "cannot be made", "file is a file", "choose another --out")
    check_refused(command, *ANY, "--out", tmp_path / "file" / "out", words=words)


@pytest.mark.usefixtures("no_model")
def test_file_for_scores_that_is_there(check_refused, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("mine")
    options = ("score", "--model", "any", "--text", text_file, "--out")
    check_refused(
        *options, tmp_path / "scores.json", words=("scores.json exists", "choose another --out, or add --overwrite")
    )
    check_refused(*options, tmp_path, words=("is a folder", "name a file in it"))
    check_refused(*options, tmp_path, "--overwrite", words=("is a folder", "name a file in it"))
    words = ("scores.json holds no scores of knnlm and is not replaced", "choose another --out")
    check_refused(*options, tmp_path / "scores.json", "--overwrite", words=words)
    (tmp_path / "scores.json").write_text('{"format": "knnlm-report", "kind": "score"}')
    check_refused(*options, tmp_path / "scores.json", "--overwrite", words=("work began",))


@pytest.mark.usefixtures("no_model")
def test_folder_for_a_report_that_holds_something(
    check_refused, store_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_text("mine")
    options = ("eval", store_folder, "--eval-text", text_file, "--report")
    check_refused(*options, tmp_path, words=("exists and is not an empty folder", "choose another --report"))
    check_refused(*options, store_folder, words=("exists and is not an empty folder", "choose another --report"))
    check_refused(*options, tmp_path / "new", words=("work began",))


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory, where we may mount one."""
    folder.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        gc.collect()  # what a failed call had mapped
        subprocess.run(("umount", str(folder)), check=True)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["run", "build", "score"])
def test_read_only_file_system(command: str, check_refused, tmp_path: Path) -> None:
    words = ("disk/out cannot be made", "cannot be written", "choose another --out")
    with mounted(tmp_path / "disk", "ro,size=64k") as disk:
        check_refused(command, *ANY, "--out", disk / "out", words=words)


@pytest.mark.usefixtures("no_model")
def test_read_only_folder(check_refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root no folder is read-only, so the system's answer is given here."""
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked)
    words = ("deep/out cannot be made", "locked cannot be written", "choose another --out")
    check_refused("run", *ANY, "--out", locked / "deep" / "out", words=words)


def test_full_disk(gpt2_folder: Path, text_file: Path, call, tmp_path: Path) -> None:
    """Keys of 16 layers take 6 MB: refused before the work, or, where the user insists, when the disk is full."""
    with mounted(tmp_path / "disk", "size=1m") as disk:
        options = (*RUN, "--layers", "all", "--model", gpt2_folder, "--text", text_file)
        options = (*options, "--out", disk / "deep" / "out")
        planned, full = call(*options), call(*options, "--disk-budget", 1)
        assert (planned.status, full.status, list(disk.rglob("*"))) == (2, 2, [])
    assert "half of the free disk" in planned.errors[-1]
    assert full.errors[-1].startswith(f"knnlm: cannot write in {disk / 'deep'}: No space left on device; free some")


def full_disk(*_given: object, **_named: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "some file")


def test_full_disk_while_keys_are_written(
    call, gpt2_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, on machines where nothing can be mounted."""
    monkeypatch.setattr("knnlm.store.npy.NpyWriter._write", full_disk)
    ended = call(*RUN, "--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out")
    assert ended.status == 2 and list(tmp_path.iterdir()) == []
    for word in ("knnlm: cannot write", "No space left on device", "free some space or choose another --out"):
        assert word in ended.errors[-1]


@pytest.mark.parametrize(
    "place", ["index.storage._write_manifest", "knnlm.store.changeable.write_json", "knnlm.report.html.write_text"]
)
def test_full_disk_after_the_datastore_is_whole(
    place: str, call, gpt2_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, full_disk)
    options = ("--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out", "--layers", "-1.ffn_input")
    ended = call(*RUN, *options)
    assert ended.status == 2
    assert ended.errors[-1].startswith("knnlm: ")
    assert "No space left on device" in ended.errors[-1]
    assert "free" in ended.errors[-1]
    assert f"{tmp_path / 'out'} is a whole datastore" in ended.errors[-1] and ".partial" not in ended.errors[-1]
    # The report comes last: what it would say has been shown by then.
    assert ("Chosen: 2.ffn_input" in ended.out) == ("report" in place)
    check_whole(call, tmp_path)
    monkeypatch.undo()
    again = call(*RUN, *options)
    assert again.status == 0, again.errors
    check_complete(call, tmp_path)


def test_full_disk_while_a_report_is_written(
    call, store_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("eval", store_folder, "--eval-text", text_file, "--eval-tokens", 300, "--dry-run")
    options = (*options, "--report", tmp_path / "a" / "b")
    with monkeypatch.context() as patched:
        patched.setattr("knnlm.report.html.write_text", full_disk)
        ended = call(*options)
    assert ended.status == 2 and "No space left on device" in ended.errors[-1]
    assert list(tmp_path.iterdir()) == []
    assert call(*options).status == 0
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"report.html", "report.json"}


@pytest.mark.parametrize("select", ["9.ffn_input", "*.ffn_input"])
def test_layer_to_select_is_looked_for_before_the_scoring(
    select: str, check_refused, gpt2_folder: Path, text_file: Path, monkeypatch
):
    monkeypatch.setattr("knnlm.pipeline.job.read_documents", None)  # the work cannot begin
    options = ("--model", gpt2_folder, "--text", text_file, "--select", select)
    check_refused("score", *options, words=(select, "ffn_input"))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["run", "build", "score"])
def test_text_is_looked_for_before_the_model_is_loaded(command: str, check_refused, tmp_path: Path) -> None:
    place = () if command == "score" else ("--out", tmp_path / "out")
    check_refused(command, "--model", "any", "--text", "nowhere.txt", *place, words=("nowhere.txt", "check the path"))


# Datastores


@pytest.mark.parametrize("command", ["info", "verify", "eval"])
def test_no_datastore(command: str, check_refused, text_file: Path, tmp_path: Path) -> None:
    text = ("--eval-text", text_file) if command == "eval" else ()
    words = ("is not a datastore: it has no datastore.json", "make one with knnlm build")
    check_refused(command, tmp_path, *text, words=words)
    check_refused(command, tmp_path / "nowhere", *text, words=words)


@pytest.mark.parametrize("command", ["info", "eval"])
def test_file_of_a_datastore_is_gone(
    command: str, check_refused, store_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(store_folder, tmp_path / "store")
    next((tmp_path / "store" / "parts").glob("*/values.npy")).unlink()
    text = ("--eval-text", text_file) if command == "eval" else ()
    words = ("values.npy is missing", "build the datastore again")
    check_refused(command, tmp_path / "store", *text, words=words)


NOT_IN_THE_DATASTORE = {
    "--k 99999": ("--k is 99999", "has only ", " keys", "take a smaller k"),
    "--layers 0.ffn_input": ("no layer fits '0.ffn_input'", "1-2.ffn_input"),
    "--metric cosine": ("built for --metric l2, not cosine", "--index exact"),
    "--index IVF4,Flat": ("--index is 'IVF4,Flat'", "take auto, or exact"),
    "--stride 33": ("--stride 33 is over --context 32, which the datastore was made with", "take a stride of at most"),
}


@pytest.mark.parametrize("given", NOT_IN_THE_DATASTORE)
def test_eval_of_what_the_datastore_does_not_have(
    given: str, check_refused, store_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knnlm.pipeline.job.read_documents", None)  # the work cannot begin
    options = ("--eval-text", text_file, "--eval-tokens", 300, *given.split())
    check_refused("eval", store_folder, *options, words=NOT_IN_THE_DATASTORE[given])


def test_datastore_of_another_model(check_refused, store_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("eval", store_folder, "--eval-text", text_file, "--model")
    other = save_tiny("llama", tmp_path / "llama")
    check_refused(*options, other, words=("was made with another model", "config", "weights", "take the model"))
    trained = tiny_model("gpt2")
    trained.transformer.h[0].mlp.c_fc.weight.data.mul_(1.5)
    check_refused(
        *options, save(trained, tmp_path / "trained"), words=("another model", ": weights ", "take the model")
    )


# Ctrl-C


def stopped(*_given: object, **_named: object) -> None:
    raise KeyboardInterrupt


def stop_in_stage(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Ctrl-C when the stage has done its first piece."""
    original = Screen.stage

    @contextmanager
    def stage_that_is_stopped(self: Screen, name: str, unit: str) -> Iterator[Callable[..., None]]:
        with original(self, name, unit) as advance:
            yield stopped if name.startswith(stage) else advance

    monkeypatch.setattr(Screen, "stage", stage_that_is_stopped)


def stop_in_text(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Ctrl-C after five documents; the plan has read the text's beginning before."""
    from knnlm.text.corpus import read_documents

    def read(*given, **named):
        yield from itertools.islice(read_documents(*given, **named), 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(place, read)


def stop_in_call(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(place, stopped)


# phase of `run`: (how it is stopped, where, whether the datastore is whole by then)
PHASES = {
    "loading": (stop_in_call, "knnlm.model.loading.load_model", False),
    "planning": (stop_in_text, "knnlm.pipeline.plan.read_documents", False),
    "reading text": (stop_in_text, "knnlm.pipeline.job.read_documents", False),
    "extracting": (stop_in_stage, "extracting keys", False),
    "writing keys": (stop_in_call, "knnlm.store.npy.NpyWriter._write", False),
    "scoring": (stop_in_stage, "pilots and other scores", False),
    "writing the manifest": (stop_in_call, "knnlm.store.writer.write_json", False),
    "moving the datastore": (stop_in_call, "knnlm.files._swap", False),
    "overlap": (stop_in_stage, "looking for the evaluation text", True),
    "evaluation text": (stop_in_stage, "evaluation text through the model", True),
    "evaluating": (stop_in_stage, "evaluating", True),
    "examples": (stop_in_call, "knnlm.pipeline.steps.find_examples", True),
    "indexing": (stop_in_stage, "indexing", True),
    "writing the index": (stop_in_call, "index.storage._write_manifest", True),
    "noting the index": (stop_in_call, "knnlm.store.changeable.write_json", True),
    "drawing the report": (stop_in_call, "knnlm.report.html.make_charts", True),
    "writing the report": (stop_in_call, "knnlm.report.html.write_text", True),
}


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where temporary files go."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_in_each_phase(
    phase: str, call, gpt2_folder: Path, text_file: Path, tmp_path: Path, queries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, place, whole = PHASES[phase]
    options = ("--model", gpt2_folder, "--text", text_file, "--layers", "1.ffn_input,2.ffn_input")
    with monkeypatch.context() as patched:
        stop(patched, place)
        ended = call(*RUN, *options, "--out", tmp_path / "deep" / "out")
    assert ended.status == 130
    *others, line = ended.errors
    assert [other for other in others if not other.startswith(PLAN)] == []
    out = tmp_path / "deep" / "out"
    kept = f"{out} is a whole datastore, though without all that was to come (index, fitted settings, report): "
    left = f"{kept}use it as it is, or give the same command again" if whole else "nothing half-written was left behind"
    assert line == f"knnlm: stopped by Ctrl-C; {left}"
    assert list(queries.iterdir()) == []
    if whole:
        check_whole(call, tmp_path / "deep")
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("phase", ["indexing", "noting the index"])
def test_datastore_works_after_ctrl_c_while_it_was_indexed(
    phase: str, call, gpt2_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options = ("--model", gpt2_folder, "--text", text_file, "--layers", "-1.ffn_input", "--out", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patched:
        stop, place, _ = PHASES[phase]
        stop(patched, place)
        assert call("build", *options, "--context", 32).status == 130
    check_whole(call, tmp_path)
    evaluated = call("eval", tmp_path / "out", "--eval-text", text_file, "--eval-tokens", 300)
    assert evaluated.status == 0, evaluated.errors


@pytest.mark.parametrize("phase", ["extracting", "evaluating", "noting the index", "writing the report"])
def test_ctrl_c_keeps_what_would_have_been_overwritten(
    phase: str,
    call,
    store_folder: Path,
    gpt2_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(store_folder, tmp_path / "out")
    before = tree(tmp_path)
    stop, place, _ = PHASES[phase]
    stop(monkeypatch, place)
    layers = ("--layers", "1.ffn_input,2.ffn_input")
    options = ("--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out", "--overwrite", *layers)
    ended = call(*RUN, *options)
    assert ended.status == 130
    assert f"{tmp_path / 'out'} is as it was, and nothing half-written was left behind" in ended.errors[-1]
    assert tree(tmp_path) == before


def test_ctrl_c_leaves_no_scores_and_no_report(
    call, store_folder: Path, gpt2_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_in_stage(monkeypatch, "")
    scores, report = ("--out", tmp_path / "deep" / "scores.json"), ("--report", tmp_path / "deep" / "report")
    assert call("score", "--model", gpt2_folder, "--text", text_file, *scores).status == 130
    assert call("eval", store_folder, "--eval-text", text_file, *report).status == 130
    assert call("verify", store_folder).status == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "status", "says"),
    [
        (signal.SIGINT, 130, "stopped by Ctrl-C; nothing half-written was left behind"),
        (signal.SIGTERM, 143, "stopped by SIGTERM; nothing half-written was left behind"),
    ],
)
def test_interrupt_of_a_real_process(
    gpt2_folder: Path, tmp_path: Path, number: signal.Signals, status: int, says: str
) -> None:
    text = write_jsonl(tmp_path / "long.jsonl", texts(0, 1000))
    command = [sys.executable, "-m", "knnlm", *RUN, "--model", str(gpt2_folder), "--text", str(text)]
    out = tmp_path / "out" / "store"
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while not list(out.parent.glob(".store.*/parts/.*/keys/*.npy")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    said, told = process.communicate(timeout=240)
    assert (process.returncode, said) == (status, ""), told
    *_, line = told.splitlines()
    assert f"\n{PLAN}" in f"\n{told}"  # on a slow machine after a line on loading
    assert line == f"knnlm: {says}"
    assert [path.name for path in tmp_path.iterdir()] == ["long.jsonl"]

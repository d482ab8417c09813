"""The real lm-eval with the model `knnlm`, on tasks made here, against our own numbers, a float64 loop, and its `hf`.

Run where lm-eval is, as after `scripts/install test train eval`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import knnlm
from knnlm import KNNLM
from knnlm.config import LayerConfig, Settings, TextConfig
from knnlm.errors import InputError
from knnlm.model.loading import load_model
from knnlm.pipeline import build
from knnlm.store.datastore import Datastore
from knnlm.studies.slices.likelihoods import score_choices
from knnlm.studies.slices.questions import read_questions
from tests.damage import rewrite
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.inference.test_generation import CONTEXT, LAMBDA, STRIDE, TEMPERATURE, Counting, K, brute_force, forced
from tests.source_files import ROOT
from tests.tiny_models import save_tiny

pytest.importorskip("lm_eval", reason="lm-eval is not installed: scripts/install eval")

# What lm-eval's own libraries say when they are imported is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

LAYER, KINDS = "2.ffn_input", ("gpt2", "llama")
QUESTIONS = [
    {"question": "Who counts the pulse?", "choices": ["the nurse", "a patient each morning", "Holmes"], "answer": 0},
    {"question": "What does each patient read?", "choices": ["one reference", "it"], "answer": 1},
    {"question": "Where does the pulse end?", "choices": ["in the ward of the nurse", "here", "a"], "answer": 2},
    {"question": "Which one is longest? " + texts(3, 1)[0][:260], "choices": ["this one", "that"], "answer": 1},
]
TEXTS = [texts(1, 1)[0], "the nurse counts", " ".join(texts(2, 3))]
MULTIPLE_CHOICE = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    "task": "tiny_text",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
GENERATE = {
    "task": "tiny_words",
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks, and the files that they read."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    data = {"tiny_choice": questions, "tiny_words": questions, "tiny_text": write_jsonl(folder / "text.jsonl", TEXTS)}
    for task in (MULTIPLE_CHOICE, ROLLING, GENERATE):
        source = {"data_files": {"test": str(data[task["task"]])}, "cache_dir": str(folder / "cache")}
        whole = {**task, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(whole))
    return folder


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """For each kind the folder of a model, and that of a datastore of its keys."""
    folder = tmp_path_factory.mktemp("stores")
    text = write_jsonl(folder / "text.jsonl", texts(0, 6))
    settings = Settings(
        text=TextConfig(context=CONTEXT, stride=STRIDE), layers=LayerConfig(layers=LAYER), key_dtype="float32"
    )
    for kind in KINDS:
        model = save_tiny(kind, folder / f"{kind}-model")
        build(load_model(model, device="cpu"), [text], folder / kind, eval_text=[text], settings=settings)
    return folder


@pytest.fixture(autouse=True)
def _quick_and_silent(monkeypatch) -> None:
    """The harness adds what pip, gcc and ten more programs say of this machine to each result, for 2 seconds.

    And it logs, for the rest of the process, to what standard error was at first.
    """
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr(logging.getLogger("lm_eval"), "handlers", [])


@pytest.fixture
def own_tasks_only(monkeypatch) -> None:
    """The harness reads the ten thousand files of its own tasks where no task manager is given, for 10 seconds."""
    from lm_eval.tasks import TaskManager

    for place in ("lm_eval.tasks.TaskManager", "lm_eval.evaluator.TaskManager"):
        monkeypatch.setattr(place, partial(TaskManager, include_defaults=False))


def evaluate(tasks: Path, task: str, model: object, arguments: object = None, **options: object) -> dict:
    """`simple_evaluate` on one task; its results, and of each document the model's answers."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    knnlm.register_lm_eval()
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    done = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=manager, bootstrap_iters=0, **options
    )
    samples = sorted(done["samples"][task], key=lambda one: one["doc_id"])
    return {"results": done["results"][task], "answers": [one["filtered_resps"] for one in samples]}


def ours(stores: Path, kind: str, lam: float = LAMBDA, **others: object) -> str:
    given = {"store": stores / kind, "k": K, "temperature": TEMPERATURE, "lambda": lam, "device": "cpu", **others}
    return ",".join(f"{name}={value}" for name, value in given.items())


def knn_of(stores: Path, kind: str, lam: float = LAMBDA) -> KNNLM:
    return KNNLM.from_store(stores / kind, LAYER, K, TEMPERATURE, lam)


def likelihoods(answers: list) -> list[list[float]]:
    return [[float(value) for value, _ in one] for one in answers]


def teacher_forced(model: KNNLM) -> list[list[float]]:
    """Of each choice, from the whole of its text alone; what is too long for the model loses its beginning."""
    found = []
    for one in QUESTIONS:
        prompt = f"Question: {one['question']}\nAnswer:"
        before = len(model.tokenizer(prompt)["input_ids"])
        rows = [model.tokenizer(f"{prompt} {choice}")["input_ids"] for choice in one["choices"]]
        found.append([])
        for row in rows:
            inputs, targets = row[:-1][-128:], torch.tensor(row[before:])
            log_probs = forced(model, inputs)[-len(targets) :].double()
            found[-1].append(float(log_probs.gather(1, targets[:, None]).sum()))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_choices_equal_teacher_forcing(kind, stores, tasks) -> None:
    expected = teacher_forced(knn_of(stores, kind))
    found = evaluate(tasks, "tiny_choice", "knnlm", ours(stores, kind))
    for got, due in zip(likelihoods(found["answers"]), expected, strict=True):
        assert got == pytest.approx(due, abs=1e-4)
    right = [int(np.argmax(due)) == one["answer"] for due, one in zip(expected, QUESTIONS, strict=True)]
    assert found["results"]["acc,none"] == np.mean(right)
    plain = likelihoods(evaluate(tasks, "tiny_choice", "knnlm", ours(stores, kind, 0))["answers"])
    assert max(abs(a - b) for pair in zip(plain, expected, strict=True) for a, b in zip(*pair, strict=True)) > 1


def test_choices_with_what_was_fitted_equal_teacher_forcing(stores, tasks) -> None:
    """λ by query and text: the trust at an answer is that of the question before it."""
    model = KNNLM.from_store(stores / "gpt2", LAYER)
    assert model.retrieval.setting.by_text
    expected = teacher_forced(model)
    found = likelihoods(evaluate(tasks, "tiny_choice", "knnlm", f"store={stores / 'gpt2'},device=cpu")["answers"])
    for got, due in zip(found, expected, strict=True):
        assert got == pytest.approx(due, abs=1e-4)
    model.retrieval = replace(model.retrieval, setting=replace(model.retrieval.setting, by_text=False))
    assert np.abs(np.subtract(np.concatenate(found), np.concatenate(teacher_forced(model)))).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_zero_equals_our_own_scores_of_questions(kind, stores, tasks) -> None:
    lm = load_model(stores / f"{kind}-model", device="cpu")
    scores = score_choices(lm, read_questions(tasks / "questions.jsonl"))
    found = evaluate(tasks, "tiny_choice", "knnlm", ours(stores, kind, 0))
    for got, due in zip(likelihoods(found["answers"]), scores.log_likelihoods, strict=True):
        assert got == pytest.approx(due.tolist(), abs=1e-4)
    assert scores.cut == 1


@pytest.mark.parametrize("task", ["tiny_choice", "tiny_text", "tiny_words"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_lambda_zero_is_exactly_hf(kind, batch_size, task, stores, tasks) -> None:
    model = f"pretrained={stores / f'{kind}-model'},dtype=float32"
    expected = evaluate(tasks, task, "hf", model, batch_size=batch_size, device="cpu")
    found = evaluate(tasks, task, "knnlm", ours(stores, kind, 0), batch_size=batch_size)
    assert found == expected


def windows(tokens: list[int], prefix: int, length: int) -> list[tuple[list[int], list[int]]]:
    """Inputs and scored tokens of lm-eval's rolling: windows side by side, the last one with a whole context."""
    found = []
    for begin in range(0, len(tokens), length):
        scored = tokens[begin : begin + length]
        end = begin + len(scored)
        context = [prefix, *tokens][max(0, end - length) : end] if begin else [prefix, *tokens[: end - 1]]
        found.append((context, scored))
    return found


@pytest.mark.parametrize("max_length", [128, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_rolling_perplexity_equals_a_float64_loop(kind, max_length, stores, tasks) -> None:
    lm = load_model(stores / f"{kind}-model", device="cpu")
    sums = []
    for text in TEXTS:
        total = 0.0
        for inputs, scored in windows(lm.encode(text).tolist(), lm.tokenizer.bos_token_id, max_length):
            log_probs = brute_force(lm, kind, LAYER, inputs)[-len(scored) :]
            total += float(log_probs[np.arange(len(scored)), scored].sum())
        sums.append(total)
    found = evaluate(tasks, "tiny_text", "knnlm", ours(stores, kind, max_length=max_length))
    assert [float(one[0]) for one in found["answers"]] == pytest.approx(sums, rel=1e-5)
    words, size = sum(len(text.split()) for text in TEXTS), sum(len(text.encode()) for text in TEXTS)
    assert found["results"]["word_perplexity,none"] == pytest.approx(math.exp(-sum(sums) / words), rel=1e-4)
    assert found["results"]["bits_per_byte,none"] == pytest.approx(-sum(sums) / size / math.log(2), rel=1e-5)


@pytest.mark.parametrize("task", ["tiny_choice", "tiny_text"])
def test_batch_sizes_agree(task, stores, tasks) -> None:
    one, four, auto = (
        evaluate(tasks, task, "knnlm", ours(stores, "gpt2"), batch_size=size)["answers"] for size in (1, 4, "auto")
    )
    for other in (four, auto):
        for got, due in zip(other, one, strict=True):
            np.testing.assert_allclose(np.array(got, float), np.array(due, float), atol=1e-4, rtol=0)


def test_generated_text_is_that_of_generate(stores, tasks) -> None:
    model = knn_of(stores, "gpt2")
    found = evaluate(tasks, "tiny_words", "knnlm", ours(stores, "gpt2"), batch_size=4)["answers"]
    for got, one in zip(found[:3], QUESTIONS, strict=False):
        ids = model.tokenizer(f"Question: {one['question']}\nAnswer:", return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert got == [model.tokenizer.decode(new, skip_special_tokens=True).split("\n\n")[0]]


def test_only_scored_tokens_are_searched_for(stores, tasks) -> None:
    from knnlm.inference.harness import HarnessModel

    harness = HarnessModel(stores / "gpt2", None, K, TEMPERATURE, LAMBDA, device="cpu", batch_size=4)
    counting = Counting(harness.model.retrieval.searcher)
    harness.model.retrieval = replace(harness.model.retrieval, searcher=counting)
    evaluate(tasks, "tiny_choice", harness)
    encode = harness.tokenizer.encode
    # Choices of one token share one forward pass.
    most = sum(len(encode(f" {choice}")) for one in QUESTIONS for choice in one["choices"])
    assert 0 < counting.queries <= most


def test_a_knnlm_goes_into_hf_as_it_is(stores, tasks) -> None:
    from lm_eval.models.huggingface import HFLM

    model = knn_of(stores, "gpt2")
    found = evaluate(tasks, "tiny_choice", HFLM(model, tokenizer=model.tokenizer, batch_size=4))
    for got, due in zip(likelihoods(found["answers"]), teacher_forced(model), strict=True):
        assert got == pytest.approx(due, abs=1e-4)


def test_registration_is_public_and_can_be_repeated() -> None:
    from lm_eval.api.registry import get_model

    knnlm.register_lm_eval()
    first = get_model("knnlm")
    knnlm.register_lm_eval()
    assert get_model("knnlm") is first and first.__name__ == "HarnessModel"


def test_an_open_store_may_be_given(stores) -> None:
    from knnlm.inference.harness import HarnessModel

    store = Datastore.open(stores / "gpt2")
    made = HarnessModel(store, None, K, TEMPERATURE, LAMBDA, device="cpu")
    assert made.model.retrieval.searcher.store is store


def test_several_stores_are_searched_as_one(stores, tasks, tmp_path) -> None:
    """As on the command line, in lm-eval's two ways to write a list; beside KNNLM with the same datastores."""
    from lm_eval._cli.utils import key_val_to_dict

    text = write_jsonl(tmp_path / "more.jsonl", texts(5, 6))
    settings = Settings(
        text=TextConfig(context=CONTEXT, stride=STRIDE), layers=LayerConfig(layers=LAYER), key_dtype="float32"
    )
    lm = load_model(stores / "gpt2-model", device="cpu")
    build(lm, [text], tmp_path / "7", eval_text=[text], settings=settings)
    names = [str(stores / "gpt2"), str(tmp_path / "7")]
    given = key_val_to_dict(f"store={names!r},k={K},temperature={TEMPERATURE},lambda={LAMBDA},device=cpu")
    found = {}
    for weights in (None, [1, 0.125]):
        joint = knnlm.open_datastores(names, weights)
        due = teacher_forced(KNNLM.from_store(joint, LAYER, K, TEMPERATURE, LAMBDA, lm=lm))
        more = {} if weights is None else {"weights": weights}
        found[str(weights)] = likelihoods(evaluate(tasks, "tiny_choice", "knnlm", given | more)["answers"])
        for got, expected in zip(found[str(weights)], due, strict=True):
            assert got == pytest.approx(expected, abs=1e-4)
    alone = likelihoods(evaluate(tasks, "tiny_choice", "knnlm", ours(stores, "gpt2"))["answers"])
    assert np.abs(np.subtract(np.concatenate(alone), np.concatenate(found["None"]))).max() > 0.1
    assert np.abs(np.subtract(np.concatenate(found["None"]), np.concatenate(found["[1, 0.125]"]))).max() > 0.01


def test_a_store_may_have_a_number_for_its_name(stores, tmp_path, monkeypatch) -> None:
    """lm-eval reads 7 as a number."""
    from knnlm.inference.harness import HarnessModel

    shutil.copytree(stores / "gpt2", tmp_path / "7")
    monkeypatch.chdir(tmp_path)
    model = str(stores / "gpt2-model")
    for given in (7, [7]):
        made = HarnessModel(given, None, K, TEMPERATURE, LAMBDA, model, device="cpu")
        assert made.model.retrieval.searcher.store.folder.name == "7"
    with pytest.raises(InputError, match="`weights` are for several datastores, but only 7 is given"):
        HarnessModel(7, None, K, TEMPERATURE, LAMBDA, model, weights=[1])


def test_unknown_argument_is_refused(stores) -> None:
    from knnlm.inference.harness import HarnessModel

    with pytest.raises(InputError, match=r"knnlm has no argument pretrained; see docs/lm-eval\.md"):
        HarnessModel.create_from_arg_string(f"store={stores / 'gpt2'},pretrained=gpt2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that lm-eval asks for by itself")
@pytest.mark.parametrize("given", [{}, {"device": "cpu", "batch_size": 3}])
def test_arguments_come_before_what_lm_eval_fills_in(given, stores) -> None:
    from knnlm.inference.harness import HarnessModel

    arguments = {"store": stores / "gpt2", "k": K, "temperature": TEMPERATURE, "lam": LAMBDA, **given}
    made = HarnessModel.create_from_arg_obj(arguments, {"device": "cuda:0", "batch_size": 1, "max_batch_size": None})
    assert made.device.type == "cpu" and made.batch_size == given.get("batch_size", 1)


@pytest.mark.usefixtures("own_tasks_only")
def test_command_line_is_that_of_lm_eval(stores, tasks, tmp_path, call) -> None:
    asked = ["--tasks", "tiny_choice", "--include_path", tasks, "--output_path", tmp_path, "--log_samples"]
    done = call("lm-eval", "--model", "knnlm", "--model_args", ours(stores, "gpt2"), *asked)
    assert done.status == 0, done.errors
    assert "|tiny_choice|" in done.out
    lines = next(tmp_path.rglob("samples_*.jsonl")).read_text().splitlines()
    answers = [one["filtered_resps"] for one in sorted(map(json.loads, lines), key=lambda one: one["doc_id"])]
    for got, due in zip(likelihoods(answers), teacher_forced(knn_of(stores, "gpt2")), strict=True):
        assert got == pytest.approx(due, abs=1e-4)


@pytest.mark.usefixtures("own_tasks_only")
def test_command_line_says_in_one_line_what_is_missing(stores, tasks, call, tmp_path) -> None:
    copy = Path(shutil.copytree(stores / "gpt2", tmp_path / "book.knn"))
    rewrite(copy / "datastore.json", lambda one: one.update(fitted=None))
    asked = ["--tasks", "tiny_choice", "--include_path", tasks]
    refused = call("lm-eval", "--model", "knnlm", "--model_args", f"store={copy}", *asked)
    assert refused.status == 2
    assert refused.errors[-1].startswith("knnlm: nothing was fitted for 2.ffn_input")
    assert "Traceback" not in "\n".join(refused.errors)


def test_help_is_that_of_lm_eval(call) -> None:
    assert "Language Model Evaluation Harness" in call("lm-eval", "--help").out


@pytest.mark.usefixtures("own_tasks_only")
@pytest.mark.parametrize("page", ["README.md", "docs/lm-eval.md"])
def test_lines_in_the_documentation_run(page, stores, tasks, tmp_path, capsys) -> None:
    """As they stand but for the store and the task, which are ours."""
    (block,) = re.findall(r"```python\n(import knnlm\nimport lm_eval\n.*?)```", (ROOT / page).read_text(), re.DOTALL)
    copy = shutil.copytree(stores / "gpt2", tmp_path / "book.knn")
    shutil.copytree(stores / "gpt2-model", tmp_path / "gpt2-model")
    Datastore.open(copy).update_manifest(fitted={LAYER: {"k": K, "temperature": TEMPERATURE, "lambda": LAMBDA}})
    task = yaml.safe_load((tasks / "tiny_choice.yaml").read_text())
    for shown, used in (("book.knn", str(copy)), ('"arc_easy"', repr(task))):
        assert block.count(shown) == 1
        block = block.replace(shown, used)
    exec(block)
    assert "'tiny_choice'" in capsys.readouterr().out

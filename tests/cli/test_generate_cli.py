"""`knnlm generate`: what it prints, that its options arrive, and what it refuses."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from knnlm import KNNLM
from knnlm.inference.writer import Decoding, Writer
from knnlm.knn.retrieval import open_retrieval
from knnlm.model.loading import load_model
from knnlm.store.datastore import Datastore
from tests.source_files import ROOT
from tests.tiny_models import save_tiny

SETTING = ("--layer", "2.ffn_input", "--k", 64, "--temperature", 4, "--lambda", 0.6)
PROMPT = "the nurse counts"


@pytest.fixture(scope="module")
def knn(store_folder: Path) -> KNNLM:
    return KNNLM.from_store(store_folder, "2.ffn_input", 64, 4.0, 0.6)


def expected_text(knn: KNNLM, prompt: str, tokens: int, **options) -> str:
    """generate() and decode(), without our own way from tokens to text."""
    ids = knn.tokenizer(prompt, return_tensors="pt").input_ids
    end = knn.tokenizer.eos_token_id
    found = knn.generate(ids, max_new_tokens=tokens, pad_token_id=end, eos_token_id=end, **options)
    return knn.tokenizer.decode(found[0], skip_special_tokens=True)


def test_help_has_an_example(call) -> None:
    asked = call("generate", "--help")
    assert (asked.status, asked.errors) == (0, ())
    assert "Example: knnlm generate nursing.knn --prompt" in asked.out


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_prompt_and_continuation_are_printed_as_one_text(stream, call, knn, store_folder: Path) -> None:
    done = call("generate", store_folder, "--prompt", PROMPT, "--max-new-tokens", 12, *SETTING, *stream)
    assert (done.status, done.errors) == (0, ())
    assert done.out == expected_text(knn, PROMPT, 12, do_sample=False) + "\n"
    assert done.out.startswith(PROMPT) and len(done.out) > len(PROMPT) + 5


def test_json_is_one_document(call, knn, store_folder: Path) -> None:
    prompts = (PROMPT, "each patient", "")
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    done = call("generate", store_folder, *asked, "--max-new-tokens", 5, *SETTING, "--json")
    document = json.loads(done.out)
    assert (document["layer"], document["k"], document["temperature"], document["lambda"]) == (
        "2.ffn_input",
        64,
        4,
        0.6,
    )
    assert [one["prompt"] for one in document["continuations"]] == list(prompts)
    for one in document["continuations"][:2]:
        assert one["prompt"] + one["text"] == expected_text(knn, one["prompt"], 5, do_sample=False)
        assert (one["tokens"], one["ended"]) == (5, False)


def test_seed_and_sampling_options_arrive(call, knn, store_folder: Path) -> None:
    options = ("--temperature-lm", 0.8, "--top-p", 0.7, "--max-new-tokens", 12)
    first, again, other = (
        call("generate", store_folder, "--prompt", PROMPT, *options, *SETTING, "--seed", seed).out for seed in (3, 3, 4)
    )
    torch.manual_seed(3)
    drawn = expected_text(knn, PROMPT, 12, do_sample=True, temperature=0.8, top_p=0.7, top_k=0)
    assert first == again == drawn + "\n"
    assert other != first


def test_lambda_arrives(call, store_folder: Path) -> None:
    lm = load_model(store_folder_model(store_folder))
    ids = lm.tokenizer(PROMPT, return_tensors="pt").input_ids
    plain = lm.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    asked = ("--prompt", PROMPT, "--max-new-tokens", 12, *SETTING[:-1])
    assert call("generate", store_folder, *asked, 0).out == lm.tokenizer.decode(plain[0]) + "\n"


def store_folder_model(store_folder: Path) -> str:
    return Datastore.open(store_folder).model


def feed(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_prompt_may_come_from_standard_input(call, knn, store_folder: Path, monkeypatch) -> None:
    feed(monkeypatch, f"{PROMPT}\n".encode())
    done = call("generate", store_folder, "--max-new-tokens", 4, *SETTING)
    assert done.out == expected_text(knn, PROMPT, 4, do_sample=False) + "\n"


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "standard input is empty; give --prompt TEXT"), (b"ab\xff", "not UTF-8 at byte 2")]
)
def test_standard_input_that_is_no_prompt_is_refused(data, message, call, store_folder: Path, monkeypatch) -> None:
    feed(monkeypatch, data)
    refused = call("generate", store_folder, *SETTING)
    assert refused.status == 2 and len(refused.errors) == 1 and message in refused.errors[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*SETTING, "--layer", "0.ffn_input"), "has no keys of layer 0.ffn_input; it has 1.ffn_input, 2.ffn_input"),
        ((*SETTING, "--k", 0), "--k is 0"),
        ((*SETTING, "--lambda", 2), "--lambda is 2.0"),
        ((*SETTING, "--max-new-tokens", 0), "--max-new-tokens is 0, but must be at least 1"),
        ((*SETTING, "--max-new-tokens", 500), "--max-new-tokens 500 are more than the 128 that"),
        ((*SETTING, "--temperature-lm", 0), "--temperature-lm is 0.0, but must be finite and at least 1e-06"),
        ((*SETTING, "--temperature-lm", "1e-320"), "--temperature-lm is 1e-320, but must be finite and at least 1e-06"),
        ((*SETTING, "--temperature-lm", "1e999"), "--temperature-lm is inf, but must be finite and at least 1e-06"),
        ((*SETTING, "--top-p", 1.5), "--top-p is 1.5"),
        ((*SETTING, "--seed", -1), "--seed is -1, but must be from 0"),
        ((*SETTING, "--seed", 10**20), "--seed is 100000000000000000000, but must be from 0"),
        ((*SETTING, "--stream", "--json"), "--stream shows text, --json one document"),
        ((*SETTING, "--model", "./nowhere"), "there is no folder ./nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(options, message, call, store_folder: Path) -> None:
    refused = call("generate", store_folder, "--prompt", PROMPT, *options)
    assert (refused.status, refused.out, len(refused.errors)) == (2, "", 1)
    assert message in refused.errors[0]


def test_another_model_is_refused(call, store_folder: Path, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "llama")
    refused = call("generate", store_folder, "--prompt", PROMPT, *SETTING, "--model", other)
    assert refused.status == 2 and "was made with another model" in refused.errors[0]


# From tokens to text


def make_writer(store_folder: Path, **decoding) -> Writer:
    lm = load_model(store_folder_model(store_folder))
    retrieval = open_retrieval(Datastore.open(store_folder), "2.ffn_input", 64, 4.0, 0.6)
    return Writer(KNNLM.from_retrieval(lm, retrieval), lm, Decoding(**decoding))


def scripted(writer: Writer, tokens: list[int]) -> None:
    """Let generate() give these tokens."""

    def generate(ids, *, streamer, **options):
        streamer.put(ids.cpu())
        for token in tokens:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([ids, torch.tensor([tokens])], 1)

    writer._model.generate = generate


@pytest.mark.parametrize(("end", "shown"), [(True, "é€ x"), (False, "é€ x�")])
def test_pieces_end_with_whole_characters(end, shown, store_folder: Path) -> None:
    writer = make_writer(store_folder)
    tokens = writer.encode("é€ x")
    assert len(tokens) == 7  # of bytes: no merge of the tiny tokenizer has them
    half = writer.encode("é")[:1]
    scripted(writer, [*tokens, *([writer._lm.tokenizer.eos_token_id] if end else half)])
    pieces: list[str] = []
    done = writer("the", pieces.append)
    assert pieces[:4] == ["é", "€", " ", "x"]
    assert "".join(pieces) == done.text == shown
    assert (done.tokens, done.ended) == (8, end)


def test_what_the_model_prefers_does_not_count(store_folder: Path) -> None:
    lm = load_model(store_folder_model(store_folder))
    lm.model.generation_config.repetition_penalty = 50.0
    retrieval = open_retrieval(Datastore.open(store_folder), "2.ffn_input", 64, 4.0, 0.6)
    found = Writer(KNNLM.from_retrieval(lm, retrieval), lm, Decoding(max_new_tokens=12))(PROMPT)
    assert found == make_writer(store_folder, max_new_tokens=12)(PROMPT)
    assert lm.model.generation_config.repetition_penalty == 50.0


@pytest.mark.parametrize("page", ["README.md", "docs/generate.md"])
def test_lines_in_the_documentation_run(page, store_folder: Path, tmp_path: Path, capsys) -> None:
    (block,) = re.findall(r"```python\n(from knnlm import KNNLM\n.*?)```", (ROOT / page).read_text(), re.DOTALL)
    copy = Path(shutil.copytree(store_folder, tmp_path / "book.knn"))
    layer = Datastore.open(copy).describe()["choice"]["layer"]
    Datastore.open(copy).update_manifest(fitted={layer: {"k": 8, "temperature": 4.0, "lambda": 0.5}})
    assert block.count('"book.knn"') == 1
    exec(block.replace('"book.knn"', repr(str(copy))))
    assert capsys.readouterr().out.startswith("The borrow checker")

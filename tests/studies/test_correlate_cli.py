"""`knnlm correlate` on the command line: what it prints and writes, and what it refuses before any work."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from knnlm.studies.correlate.page import render_correlate
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.tiny_models import save_tiny

LENGTHS = ("--context", 24, "--contexts", "16,48")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", texts(1, 16))


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


def test_json_is_one_document_with_every_model_and_length(call, gpt2_folder, llama_folder, corpus):
    options = ("--group-size", 5, "--random", "--json")
    done = call("correlate", "--model", gpt2_folder, "--model", llama_folder, "--text", corpus, *LENGTHS, *options)
    assert done.status == 0, done.errors
    document = json.loads(done.out)
    layers = ["0.block_output", "1.block_output", "2.block_output", "final_norm"]
    assert [row["layer"] for row in document["layers"]] == layers
    assert [row["layer"] for row in document["final_token"]["layers"]] == layers
    assert document["segments"] == document["layers"][0]["ungrouped"]["count"]
    assert document["groups"] == document["layers"][0]["grouped"]["count"] >= 3
    found = [(one["model"], one["context"]) for one in (document, *document["others"])]
    names = (str(gpt2_folder), str(llama_folder), f"{gpt2_folder} (random)")
    assert found == [(name, length) for name in names for length in (24, 16, 48)]
    assert (document["settings"]["context"], document["settings"]["contexts"]) == (24, [16, 48])


def test_table_notes_and_report(call, gpt2_folder, corpus, tmp_path):
    options = ("--clusters", "ngram,kmeans", "--ngram", 2, "--cluster-size", 6, "--report", tmp_path / "a" / "b")
    done = call("correlate", "--model", gpt2_folder, "--text", corpus, "--context", 24, *options)
    assert (done.status, done.errors) == (0, ())
    document = json.loads((tmp_path / "a" / "b" / "correlate.json").read_text())
    for row in document["layers"]:
        pearson = re.escape(f"{row['ungrouped']['pearson']:+.2f}")
        assert re.search(rf"{row['layer']} +{row['within']:.4f} +{pearson} ", done.out)
    for row in document["clusters"]:
        assert re.search(rf"{row['layer']} +{row['kind']} +{row['within']:.4f} +{row['between']:.4f}", done.out)
    # 100 in a group are too many for this text.
    note = (
        document["notes"][0]
        .replace("`group_size=16`", "--group-size 16")
        .replace("`max_perplexity`", "--max-perplexity")
    )
    assert "`" not in note and f"Note: {note}" in done.out
    assert done.out.splitlines()[-1] == f"Report: {tmp_path / 'a' / 'b' / 'correlate.html'}"
    assert (tmp_path / "a" / "b" / "correlate.html").read_text().startswith("<!doctype html>")


def test_another_score_is_named_wherever_it_is_shown(call, gpt2_folder, corpus, tmp_path):
    options = ("--score", "effective_rank", "--group-size", 5, "--report", tmp_path)
    done = call("correlate", "--model", gpt2_folder, "--text", corpus, *LENGTHS, *options)
    document = json.loads((tmp_path / "correlate.json").read_text())
    assert (document["score"], document["settings"]["score"]) == ("effective_rank", "effective_rank")
    for row in document["layers"]:
        assert re.search(rf"{row['layer']} +{row['score']:.1f} ", done.out)
        assert row["score"] > 1 > row["within"]
    assert "eff. rank" in done.out
    page = (tmp_path / "correlate.html").read_text()
    assert "Effective rank and perplexity" in page and "of perplexity and dispersion" not in page


def test_page_tells_what_was_released_and_what_was_ours(call, gpt2_folder, corpus):
    done = call("correlate", "--model", gpt2_folder, "--text", corpus, *LENGTHS, "--group-size", 5, "--json")
    document = json.loads(done.out)
    document["model"] = "a<b>/c&d"
    page = render_correlate(document)
    assert "a<b>" not in page.split("<script")[0] and "a&lt;b&gt;/c&amp;d" in page
    for key in ("scatter", "ungrouped", "grouped", "contexts"):
        assert f'id="chart-{key}"' in page
    for sentence in document["protocol"]["ours"]:
        assert sentence.split(" (")[0].replace("`", "") in html.unescape(page)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--model": "absent/model/folder"}, "there is no folder absent/model/folder"),
        ({"--text": "absent.txt"}, "there is no file or folder absent.txt"),
        ({"--context": 129}, "--context is 129, but"),
        ({"--contexts": "16,many"}, "'many' is no number of tokens"),
        ({"--contexts": "16,200"}, "--contexts is 200, but"),
        ({"--score": "probe"}, "--score is 'probe', but a segment has within, standardized, effective_rank,"),
        ({"--layers": "7.ffn_input"}, "no layer fits '7.ffn_input'"),
        ({"--clusters": "words"}, "--clusters is 'words'"),
        ({"--clusters": "ngram"}, "no two 10-grams that follow 100 contexts"),
        ({"--group-size": 60}, "group(s) of 60, but a correlation needs 3"),
        ({"--max-segments": 0}, "--max-segments is 0"),
        ({"--report": __file__}, "is not an empty folder"),
    ],
)
def test_bad_input_is_one_line(changed, words, call, gpt2_folder, corpus):
    given = {"--model": gpt2_folder, "--text": corpus, "--context": 24} | changed
    done = call("correlate", *[part for pair in given.items() for part in pair])
    assert (done.status, done.out) == (2, "")
    (line,) = done.errors
    assert line.startswith("knnlm: ") and words in line


def test_text_shorter_than_a_segment_is_one_line(call, gpt2_folder, tmp_path):
    short = write_jsonl(tmp_path / "short.jsonl", ["The nurse.", "Holmes."])
    done = call("correlate", "--model", gpt2_folder, "--text", short, "--context", 64)
    assert done.status == 2 and "no document of the text is as long as one segment" in done.errors[-1]


def test_every_model_is_checked_before_the_first_is_measured(call, gpt2_folder, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "knnlm.studies.correlate.study.study_correlation", lambda *_, **__: pytest.fail("a model was measured")
    )
    short = save_tiny("llama", tmp_path / "short", max_position_embeddings=20)
    done = call("correlate", "--model", gpt2_folder, "--model", short, "--text", corpus, "--context", 24)
    assert done.status == 2 and "sees at most 20" in done.errors[-1]

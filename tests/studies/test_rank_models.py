"""The dispersion gap against all pairs in float64, the tokens of a domain by hand, and measured figures."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from knnlm.errors import InputError, ModelError
from knnlm.model.loading import load_tokenizer
from knnlm.studies.rank_models.figures import match_scores, read_scores
from knnlm.studies.rank_models.page import render_rank_models
from knnlm.studies.rank_models.ranking import dispersion_gap, rank_models
from knnlm.studies.rank_models.token_sets import (
    DOMAINS,
    EVERYDAY_WORDS,
    TokenSource,
    choose_tokens,
    file_tokens,
    log_odds,
    text_counts,
    top_tokens,
    word_tokens,
)
from tests.tiny_models import save_tiny, tiny_tokenizer


def cosine_distance(a, b) -> float:
    return 1 - math.fsum(a * b) / math.sqrt(math.fsum(a * a) * math.fsum(b * b))


def gap_by_pairs(domain_ND, general_ND) -> tuple[float, float]:
    """The definition: every pair, one by one."""
    within = [cosine_distance(a, b) for a, b in itertools.combinations(domain_ND, 2)]
    between = [cosine_distance(a, b) for a, b in itertools.product(domain_ND, general_ND)]
    return math.fsum(within) / len(within), math.fsum(between) / len(between)


def write(path: Path, content: object) -> Path:
    path.write_text("\n".join(map(str, content)) if isinstance(content, list | tuple | range) else str(content))
    return path


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Three models that differ in what they are made of."""
    return [save_tiny(kind, tmp_path / kind) for kind in ("gpt2", "llama", "gpt-neox")]


@pytest.fixture
def ids(tmp_path: Path) -> TokenSource:
    domain, general = write(tmp_path / "domain.txt", range(40, 60)), write(tmp_path / "general.txt", range(80, 95))
    return TokenSource(domain_tokens=domain, general_tokens=general)


# The gap


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_gap_is_that_of_all_pairs(scale: float) -> None:
    rng = np.random.default_rng(0)
    # A common direction and lengths of many orders, as output matrices have.
    domain_ND, general_ND = (
        rng.normal(1, 1, size=(count, 24)) * rng.lognormal(0, 3, size=(count, 1)) for count in (31, 17)
    )
    found = dispersion_gap(domain_ND * scale, general_ND * scale)
    assert found == pytest.approx(gap_by_pairs(domain_ND, general_ND), abs=1e-9)


def test_gap_of_orthogonal_and_of_equal_rows() -> None:
    assert dispersion_gap(np.eye(4)[:2], np.eye(4)[2:]) == pytest.approx((1, 1), abs=1e-15)
    assert dispersion_gap(np.ones((3, 4)), np.ones((2, 4))) == pytest.approx((0, 0), abs=1e-15)
    assert dispersion_gap(np.ones((2, 4)), -np.ones((2, 4))) == pytest.approx((0, 2), abs=1e-15)


def test_ranking_is_that_of_the_models_own_head(models, ids) -> None:
    expected = {}
    for folder in models:
        head = AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight.detach().double().numpy()
        expected[str(folder)] = gap_by_pairs(head[40:60], head[80:95])
    found = rank_models(models, ids).models
    assert [one.model for one in found] == sorted(expected, key=lambda name: -sum(expected[name]))
    for one in found:
        assert (one.within, one.between) == pytest.approx(expected[one.model], abs=1e-9)
        assert one.gap == one.within + one.between
        assert (one.domain_tokens, one.general_tokens, one.measured) == (20, 15, None)
    assert {one.tied for one in found if "gpt2" in one.model} == {True}


def test_repeated_tokens_and_models_count_once(models, ids, tmp_path: Path) -> None:
    twice = TokenSource(
        domain_tokens=write(tmp_path / "twice.txt", [*range(40, 60), *range(40, 60)]), general_tokens=ids.general_tokens
    )
    assert rank_models([*models, *models], twice) == rank_models(models, ids)


def test_token_of_both_sets_is_the_domains(models, ids, tmp_path: Path) -> None:
    both = TokenSource(
        domain_tokens=ids.domain_tokens, general_tokens=write(tmp_path / "both.txt", [*range(50, 60), *range(80, 95)])
    )
    assert rank_models(models, both) == rank_models(models, ids)


def test_ids_need_no_tokenizer(models, ids) -> None:
    expected = rank_models(models, ids)
    for folder in models:
        for file in folder.glob("tokenizer*"):
            file.unlink()
    assert rank_models(models, ids) == expected
    with pytest.raises(ModelError, match="no tokenizer"):
        rank_models(models, TokenSource(domain="code"))


def test_models_that_are_alike_are_told(models, ids, tmp_path: Path) -> None:
    copy = shutil.copytree(models[0], tmp_path / "copy")
    (note,) = rank_models([*models, copy], ids).notes
    assert note.startswith(f"{models[0]}, {copy} have the same rows")
    assert rank_models(models, ids).notes == ()


def test_other_tokenizers_are_told(models, ids, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other", vocab_size=280)
    tiny_tokenizer(280).save_pretrained(other)
    (note,) = rank_models([*models, other], ids).notes
    assert "280 and 288 tokens" in note
    text = write(tmp_path / "text.txt", "The nurse takes the patient's temperature in the morning. " * 9)
    general = write(tmp_path / "everyday.txt", "They walk along the river and talk about the town. " * 9)
    found = rank_models([models[0], other], TokenSource(domain_text=text, general_text=general))
    assert found.notes == ("the models have different tokenizers: their gaps are of different tokens",)


def test_row_of_zeros(tmp_path: Path, ids) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny("gpt2", tmp_path / "zero"))
    model.get_output_embeddings().weight.data[45] = 0
    model.save_pretrained(tmp_path / "zero")
    with pytest.raises(InputError, match=r"the row of token 45 in .*zero is zero or not finite; leave the token out"):
        rank_models([tmp_path / "zero"], ids)


# Which tokens


def test_words_with_and_without_their_space() -> None:
    tokenizer = load_tokenizer(Path(__file__).parents[2] / "scripts" / "demo_data" / "model")
    tokens = word_tokens(("if", "nonlocal", "9"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(tokens)) == ["if", "Ġif", "9", "Ġ9"]
    assert [tokenizer.decode([token]).strip() for token in tokens] == ["if", "if", "9", "9"]


@pytest.mark.parametrize("space", ["▁", " "])
def test_words_of_other_tokenizers(space: str) -> None:
    class Pieces:
        def get_vocab(self):
            return {"if": 3, f"{space}if": 5, "iffy": 6, "for</w>": 7, "<0x39>": 8}

    assert word_tokens(("if", "for", "9"), Pieces()) == (3, 5, 7)


def test_built_in_sets_are_apart() -> None:
    assert len(set(EVERYDAY_WORDS)) == len(EVERYDAY_WORDS) > 100
    assert not set(EVERYDAY_WORDS) & {word for words in DOMAINS.values() for word in words}


def test_log_odds_by_hand() -> None:
    domain, general = [8.0, 1.0, 0.0, 3.0, 0.0], [2.0, 1.0, 4.0, 9.0, 0.0]
    found = log_odds(np.array(domain), np.array(general))
    total_d, total_g = sum(domain), sum(general)
    for token, (d, g) in enumerate(zip(domain, general, strict=True)):
        if d + g == 0:
            assert found[token] == 0
            continue
        # Monroe et al. 2008, equations 16, 20 and 22, with the prior a = d + g and its sum total_d + total_g.
        a, a0 = d + g, total_d + total_g
        delta = math.log((d + a) / (total_d + a0 - d - a)) - math.log((g + a) / (total_g + a0 - g - a))
        assert found[token] == pytest.approx(delta / math.sqrt(1 / (d + a) + 1 / (g + a)), abs=1e-12)
    assert found[0] > 0 > found[2] and top_tokens(found) == (0, 1)


def test_counts_are_those_of_the_documents(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = ["The nurse reads.", "The town.<|endoftext|>"]
    path = write(tmp_path / "text.jsonl", [json.dumps({"body": text}) for text in texts])
    expected = Counter(itertools.chain(*(tokenizer(text)["input_ids"] for text in texts)))
    assert expected.pop(tokenizer.eos_token_id) == 1
    counts = text_counts(path, tokenizer, text_field="body")
    assert {token: int(count) for token, count in enumerate(counts) if count} == expected


def test_sets_of_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    domain = write(tmp_path / "domain.txt", "zzzz qqqq " * 30 + "the town " * 30)
    general = write(tmp_path / "general.txt", "they walk along the river " * 50)
    sets = choose_tokens(TokenSource(domain_text=domain, general_text=general), tokenizer)
    assert {tokenizer.decode([token]) for token in sets.domain} >= {"z", "q"}
    assert not set(sets.domain) & set(sets.general)
    # The most frequent first, without those of the domain.
    counts = text_counts(general, tokenizer)
    assert [counts[token] for token in sets.general] == sorted(counts[list(sets.general)], reverse=True)
    assert counts[list(sets.general)].all()


def test_text_for_the_general_set_alone(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    general = write(tmp_path / "general.txt", "they walk along the river 1 2 3 " * 5)
    sets = choose_tokens(TokenSource(domain="mathematics", general_text=general), tokenizer)
    assert {tokenizer.decode([token]).strip() for token in sets.domain} == set("0123456789")
    assert len(sets.general) == np.count_nonzero(text_counts(general, tokenizer)) - 3


def test_domain_takes_no_place_of_a_general_token(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    text = "0123456789" * 9 + "".join(map(chr, range(0x21, 0x250)))
    general = write(tmp_path / "general.txt", text)
    assert np.count_nonzero(text_counts(general, tokenizer)) > 120
    sets = choose_tokens(TokenSource(domain="mathematics", general_text=general), tokenizer)
    assert len(sets.general) == 100


def test_models_with_one_tokenizer_share_the_work(models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "knnlm.studies.rank_models.ranking.choose_tokens", lambda *args: calls.append(args) or choose_tokens(*args)
    )
    assert (
        len(rank_models(models, TokenSource(domain="mathematics", general_tokens=write(tmp_path / "g", [1]))).models)
        == 3
    )
    assert len(calls) == 1


# Measured figures


def test_perfect_and_reversed_order(models, ids) -> None:
    names = [one.model for one in rank_models(models, ids).models]
    good = rank_models(models, ids, scores={name: 10.0 + place for place, name in enumerate(names)})
    assert good.correlation.spearman == -1 and good.regret == 0
    assert [one.measured for one in good.models] == [10, 11, 12]
    bad = rank_models(models, ids, scores={Path(name).name: 12.0 - place for place, name in enumerate(names)})
    assert bad.correlation.spearman == 1 and bad.regret == pytest.approx(0.2)


def test_no_regret_of_figures_that_have_no_ratio(models, ids) -> None:
    assert rank_models(models, ids, scores={str(name): -1.0 for name in models}).regret is None


@pytest.mark.parametrize(
    "content",
    [
        '{"a": 3.5, "b/c": 2}',
        "model,perplexity\na,3.5\nb/c,2\n",
        "a, 3.5\n\nb/c ,2,remark\n",
        "\ufeffa,3.5\r\nb/c,2",
    ],
)
def test_scores(content: str, tmp_path: Path) -> None:
    assert read_scores(write(tmp_path / "scores", content)) == {"a": 3.5, "b/c": 2.0}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no figures"),
        ("model,perplexity", "has no figures"),
        ("a,1\nb,much", "the figure of b in .* is 'much'"),
        ("a,1\nb", "the figure of b in .* is ''"),
        ("a,1\na,2", "has a twice"),
        ('{"a": 1, "a": 2}', "has a twice"),
        ('{"a": NaN}', "the figure of a in .* is nan; give a finite number"),
        ('{"a": true}', "the figure of a"),
        ('{"a": ', "not readable as JSON"),
        ("[1]", "no JSON object"),
    ],
)
def test_scores_that_cannot_be_used(content: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        read_scores(write(tmp_path / "scores", content))


@pytest.mark.parametrize(
    ("models", "scores", "due"),
    [
        (["a/final", "b/other"], {"final": 1.0, "other": 2.0}, [1, 2]),
        (["final", "b/final"], {"final": 1.0, "b/final": 2.0}, [1, 2]),
        (["x/a/final", "x/b/final"], {"b/final": 2.0, "a/final": 1.0}, [1, 2]),
        (["x/a/final"], {"final": 3.0, "a/final": 1.0}, [1]),
        (["a/final/"], {"a/final": 1.0}, [1]),
    ],
)
def test_a_model_has_the_figure_of_its_longest_end(models, scores, due):
    assert list(match_scores(models, scores).values()) == due


@pytest.mark.parametrize(
    ("models", "scores"),
    [
        (["a/final", "b/final"], {"final": 1.0}),
        (["runA/step-100", "runB/step-100"], {"runA/step-100": 1.0, "step-100": 2.0}),
        (["step-100", "runB/step-100"], {"step-100": 2.0}),
    ],
)
def test_a_figure_that_could_be_of_two_models(models, scores):
    with pytest.raises(InputError, match=r"could be that of 2 models; name (b|runB|a)/.* by more of its path"):
        match_scores(models, scores)


def test_a_first_line_that_names_a_model_is_no_heading(tmp_path: Path):
    path = write(tmp_path / "scores.csv", "base,n/a\ntuned,5")
    assert read_scores(path, ["other", "runs/tuned"]) == {"tuned": 5}
    for models in (["base", "tuned"], ["runs/base"]):
        with pytest.raises(InputError, match=r"the figure of base in .* is 'n/a'; give a finite number"):
            read_scores(path, models)


def test_a_folder_with_and_without_its_slash_is_one_model(models, ids) -> None:
    assert rank_models([models[0], f"{models[0]}/"], ids) == rank_models(models[:1], ids)


def test_high_figures_that_are_good(models, ids) -> None:
    names = [one.model for one in rank_models(models, ids).models]
    found = rank_models(models, ids, scores=dict(zip(names, (40.0, 50.0, 20.0), strict=True)), higher_is_better=True)
    assert found.regret == pytest.approx(0.2) and found.higher_is_better
    none = rank_models(models, ids, scores=dict.fromkeys(names, -1.0), higher_is_better=True)
    assert none.regret is None


def test_tokens_that_were_used_are_told(models, ids) -> None:
    (by_file,) = rank_models(models, ids).tokens
    assert (by_file.domain, by_file.general, by_file.domain_text) == (tuple(range(40, 60)), tuple(range(80, 95)), None)
    (built_in,) = rank_models(models, TokenSource(domain="mathematics")).tokens
    assert {text.strip() for text in built_in.domain_text} == set("0123456789")
    assert len(built_in.general_text) == len(built_in.general)


def test_model_without_a_figure(models, ids) -> None:
    with pytest.raises(InputError, match=r"no figure for .*gpt-neox among those of gpt2, llama; add it"):
        rank_models(models, ids, scores={"gpt2": 1.0, "llama": 2.0})


# Bad input


def test_token_out_of_range(models, ids, tmp_path: Path) -> None:
    source = TokenSource(domain_tokens=write(tmp_path / "high", [3, 288]), general_tokens=ids.general_tokens)
    with pytest.raises(InputError, match="token 288 is none of the 288"):
        rank_models(models, source)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no token ids"),
        (b"\n \n", "has no token ids"),
        (b"3\nif\n", "line 2 of .* is 'if', no token id"),
        (b"-1", "is '-1', no token id"),
        (b"3 4", "is '3 4', no token id"),
        ("\u0663".encode(), "no token id"),
        (b"9" * 5000, "line 1 of .* is '9{40}', no token id"),
        (b"\x00\x01", "looks binary"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_file_of_garbage(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "ids").write_bytes(content)
    with pytest.raises(InputError, match=words):
        file_tokens(tmp_path / "ids")


def test_one_domain_token_has_no_pairs(models, ids, tmp_path: Path) -> None:
    one = TokenSource(domain_tokens=write(tmp_path / "one", [7, 7]), general_tokens=ids.general_tokens)
    with pytest.raises(InputError, match="1 domain token has no pairs; at least 2"):
        rank_models(models, one)


def test_general_tokens_that_are_all_of_the_domain(models, ids) -> None:
    same = TokenSource(domain_tokens=ids.domain_tokens, general_tokens=ids.domain_tokens)
    with pytest.raises(InputError, match="no general tokens beside those of the domain"):
        rank_models(models, same)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for read in (file_tokens, read_scores):
        with pytest.raises(InputError, match=r"there is no file .*gone; check the path"):
            read(tmp_path / "gone")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "one of `domain`, `domain_tokens` and `domain_text`, got 0"),
        ({"domain": "code", "domain_text": "x"}, "got 2"),
        ({"domain": "law"}, "`domain` is 'law'; take mathematics or code, or give `domain_text`"),
        ({"domain_text": "x"}, "`domain_text` needs `general_text`"),
        ({"domain": "code", "general_tokens": Path("x"), "general_text": "x"}, "both given; leave one out"),
    ],
)
def test_sources_that_do_not_fit(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        TokenSource(**options)


def test_no_models(ids) -> None:
    with pytest.raises(InputError, match="no model was given"):
        rank_models([], ids)


# The verb


def test_verb_gives_the_ranking_as_json(models, ids, tmp_path: Path, call) -> None:
    scores = write(tmp_path / "scores.csv", [f"{model},{place}" for place, model in enumerate(models, start=10)])
    files = ("--domain-tokens", ids.domain_tokens, "--general-tokens", ids.general_tokens)
    done = call("rank-models", *models, *files, "--scores", scores, "--json")
    assert (done.status, done.errors) == (0, ())
    document, expected = json.loads(done.out), rank_models(models, ids, scores=read_scores(scores))
    shown = [(row["model"], row["gap"], row["within"], row["between"], row["measured"]) for row in document["models"]]
    assert shown == [(one.model, one.gap, one.within, one.between, one.measured) for one in expected.models]
    assert document["spearman"] == expected.correlation.spearman
    assert document["spearman_interval"] == [-1, 1]
    assert document["regret"] == expected.regret
    assert (document["format"], document["version"]) == ("knnlm-rank-models", 1)
    assert document["protocol"].keys() == {"released", "ours"}
    assert document["settings"]["domain_tokens"] == str(ids.domain_tokens)
    assert document["settings"]["models"] == list(map(str, models)) and document["settings"]["scores"] == str(scores)
    assert document["tokens"][0]["general"] == list(range(80, 95)) and "knnlm" in document["versions"]
    again = TokenSource(**{name: document["settings"][name] for name in ("domain", "domain_tokens", "general_tokens")})
    assert rank_models(document["settings"]["models"], again).models[0].gap == document["models"][0]["gap"]


def test_verb_tells_where_tokens_come_from(models, ids, call) -> None:
    files = ("--domain-tokens", ids.domain_tokens, "--general-tokens", ids.general_tokens)
    told = " ".join(call("rank-models", *models, *files).out.split())
    assert f"Domain tokens: ids of {ids.domain_tokens}." in told and "built-in" not in told
    told = " ".join(call("rank-models", *models, "--domain", "mathematics").out.split())
    assert "Domain tokens: the built-in ones for mathematics. Everyday tokens: built-in words." in told


def test_verb_with_accuracies(models, ids, call, tmp_path: Path) -> None:
    files = ("--domain-tokens", ids.domain_tokens, "--general-tokens", ids.general_tokens)
    scores = write(tmp_path / "s.csv", "gpt2,10\nllama,20\ngpt-neox,40")
    done = call("rank-models", *models, *files, "--scores", scores, "--higher-is-better")
    assert "Where high figures are good, a gap that ranks well has a correlation near +1." in done.out
    assert re.search("The first model’s figure is (the highest|.* below the highest)", done.out)
    alone = call("rank-models", *models, *files, "--higher-is-better")
    assert alone.status == 2 and "--higher-is-better is of --scores, which are missing" in alone.errors[-1]


def test_report(models, ids, call, tmp_path: Path) -> None:
    scores = write(tmp_path / "s.csv", "gpt2,10\nllama,20\ngpt-neox,400")
    options = ("--domain", "mathematics", "--scores", scores, "--report", tmp_path / "a" / "b")
    done = call("rank-models", *models, *options)
    assert (done.status, done.out.splitlines()[-1]) == (0, f"Report: {tmp_path / 'a' / 'b' / 'rank-models.html'}")
    document = json.loads((tmp_path / "a" / "b" / "rank-models.json").read_text())
    page = (tmp_path / "a" / "b" / "rank-models.html").read_text()
    assert 'id="chart-gap"' in page and 'id="chart-measured"' in page and "was ours" in page
    document["models"][0]["model"] = "a<b>/c&d"
    assert "a<b>" not in render_rank_models(document).split("<script")[0]
    bare = call("rank-models", *models, "--domain", "mathematics", "--json")
    assert 'id="chart-measured"' not in render_rank_models(json.loads(bare.out))
    refused = call("rank-models", *models, *options)
    assert refused.status == 2 and "is not an empty folder" in refused.errors[-1]


def test_verb_without_figures_has_nulls_for_them(models, call) -> None:
    done = call("rank-models", *models, "--domain", "mathematics", "--json")
    document = json.loads(done.out)
    assert document["spearman"] is document["pearson_interval"] is document["regret"] is None
    assert [row["measured"] for row in document["models"]] == [None] * 3


def test_verb_shows_the_ranking(models, tmp_path: Path, call) -> None:
    done = call(
        "rank-models",
        *models,
        "--domain",
        "mathematics",
        "--scores",
        write(tmp_path / "s.csv", "gpt2,1\nllama,2\ngpt-neox,3"),
    )
    assert done.status == 0
    assert all(str(model)[-9:] in done.out for model in models)
    assert "Spearman of the gap with what was measured" in done.out and "3 models" in done.out
    assert "token lists are not published" in done.out and "ranked in reverse" in done.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give one of --domain, --domain-tokens and --domain-text"),
        (("--domain", "law"), "--domain is 'law'"),
        (("--domain", "code", "--scores", "gone.csv"), "there is no file gone.csv"),
        (("--domain", "code", "--general-tokens", "gone.txt"), "there is no file gone.txt"),
        (("--domain-text", "gone.txt", "--general-text", "gone.txt"), "there is no file or folder gone.txt"),
        (("--nonsense",), "knnlm rank-models --help lists the options"),
    ],
)
def test_verb_refuses_in_one_line(options: tuple[str, ...], words: str, models, call) -> None:
    done = call("rank-models", models[0], *options)
    assert (done.status, done.out, len(done.errors)) == (2, "", 1)
    assert words in done.errors[0]


def test_a_csv_cell_that_is_too_large_is_refused_in_one_line(tmp_path):
    path = tmp_path / "figures.csv"
    path.write_text("model," + "9" * 200_000)
    with pytest.raises(InputError, match=r"figures\.csv is not readable as CSV: field larger than field limit"):
        read_scores(path)

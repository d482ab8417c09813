"""Tables for people: what is unknown is a dash, never nan; both ends of the regret."""

from __future__ import annotations

import math
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from knnlm.cli.tables import choice_lines, eval_table, rest_line, score_table, unevaluated
from knnlm.results import Correlation, EvalResult, Interval, Regret, ScoreResult
from tests.report.test_report import infinite_perplexity
from tests.sample_results import sample_result, sample_scores, sample_short_result


def shown(result: EvalResult | ScoreResult) -> str:
    console = Console(width=200, color_system=None)
    table = eval_table(result) if isinstance(result, EvalResult) else score_table(result)
    with console.capture() as captured:
        console.print(table, *choice_lines(result), sep="\n")
    return captured.get()


def rows_of(table: Table) -> list[str]:
    return [str(cell).split(" ")[0] for cell in table.columns[0].cells]


def test_table_has_the_ten_best_the_chosen_and_the_last_ffn_input() -> None:
    layers = sample_result(30).layers
    ranked = [one.layer for one in sorted(layers, key=lambda one: one.perplexity)]
    result = replace(sample_result(30), selected=ranked[100])
    assert rows_of(eval_table(result)) == [*ranked[:10], ranked[100]]
    assert "29.ffn_input" in ranked[:10]
    worst = replace(next(one for one in layers if one.layer == "29.ffn_input"), perplexity=1e9)
    others = tuple(worst if one.layer == worst.layer else one for one in layers)
    assert rows_of(eval_table(replace(result, layers=others)))[-2:] == [ranked[100], "29.ffn_input"]
    assert rest_line(result) == "Not in the table: 140 more that were evaluated; --all shows them, as does report.html."
    assert rows_of(eval_table(result, all_layers=True)) == ranked


def test_layers_that_were_only_scored_are_shown_when_asked_for() -> None:
    result = sample_short_result(30)
    rest = [one.layer for one in unevaluated(result)]
    assert len(rest) == 151 - len(result.layers)
    assert rows_of(eval_table(result, all_layers=True))[len(result.layers) :] == rest
    assert rest_line(result) == (
        f"Not in the table: {len(rest)} that have scores and a pilot only; --all shows them, as does report.html."
    )
    assert rest_line(replace(result, examined=())) == ""


def test_title_has_the_plain_lms_interval_and_tells_of_too_few_tokens() -> None:
    result = sample_result(4)
    title = "Perplexity on 24,310 tokens, 412,345 keys; the plain LM: 77.700 (73.10 … 82.60)"
    assert eval_table(result).title == title
    near = Interval(-0.01, 0.02)
    layers = tuple(replace(one, versus_best_interval=near) if one.layer[0] > "0" else one for one in result.layers)
    assert eval_table(replace(result, layers=layers)).title == (
        f"{title}\nToo few tokens to tell 15 of 21 layers from the best"
    )


def test_regret_has_two_ends_in_one_line() -> None:
    result = replace(sample_result(), regret=Regret(-0.0004, Interval(-0.0073, 0.006), 0.0041))
    line = "Regret of the choice: -0.04% (95 % interval -0.73% … +0.60%); against the best in hindsight +0.41%.\n"
    assert line in shown(result)


def test_lambda_by_query_of_the_chosen_layer_is_a_line() -> None:
    result = sample_result()
    chosen = next(one for one in result.layers if one.layer == result.selected)
    assert chosen.by_query
    perplexity = f"{chosen.by_query.perplexity:.3f}"
    line = f"λ by query: {chosen.layer} has perplexity {perplexity}, -3.8% ± 1.0% against its fixed λ.\n"
    assert line in shown(result)
    assert shown(result).count("λ by query") == 1
    fixed = tuple(replace(one, by_query=None) for one in result.layers)
    assert "λ by query" not in shown(replace(result, layers=fixed))


def test_infinite_perplexity_makes_dashes_of_what_depends_on_it() -> None:
    text = shown(infinite_perplexity())
    row = next(line for line in text.splitlines() if "7.ffn_input ◀ chosen " in line)
    assert row.split()[-5:-3] == ["inf", "–"]
    assert "Regret" not in text
    assert "best" not in text
    assert "over all 41 layers: dispersion –, " in text
    assert "nan" not in text.lower()
    assert "100" not in row


def test_correlation_of_every_score_is_shown() -> None:
    """A line for all layers, one for the candidates."""
    scores = ("dispersion", "dispersion_within", "dispersion_segments", "dispersion_standardized", "effective_rank")
    groups = (("all", 9, 0.0), ("candidates", 4, 0.5))
    found = [
        Correlation(score, place / 10 - more, layers, among)
        for among, layers, more in groups
        for place, score in enumerate((*scores, "probe"))
    ]
    text = shown(replace(sample_result(), correlations=tuple(found)))
    said = "dispersion {}, within {}, segments {}, standardised {}, eff. rank {}, probe {}."
    first = said.format("+0.00", "+0.10", "+0.20", "+0.30", "+0.40", "+0.50")
    second = said.format("-0.50", "-0.40", "-0.30", "-0.20", "-0.10", "+0.00")
    assert f"Rank correlation with perplexity over all 9 layers: {first}\n" in text
    assert f"Rank correlation with perplexity over 4 candidates: {second}\n" in text


def test_probe_of_a_single_cluster_is_a_dash() -> None:
    result, scores = sample_result(), sample_scores()
    layers = tuple(replace(one, score=replace(one.score, probe=math.nan)) for one in result.layers if one.score)
    assert "nan" not in shown(replace(result, layers=layers, warnings=()))
    unknown = {"probe": math.nan, "dispersion_segments": math.nan, "dispersion_within": math.nan}
    assert "nan" not in shown(replace(scores, layers=tuple(replace(one, **unknown) for one in scores.layers)))

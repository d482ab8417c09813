"""report.json and report.html: numbers as people read them, nothing lost in JSON, no text that becomes markup."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import fields, replace
from html.parser import HTMLParser

import pytest

from knnlm.documents import (
    dumps,
    from_document,
    score_document,
    score_from_document,
    to_document,
)
from knnlm.errors import InputError
from knnlm.layer_names import FINAL, PARTS, network_order, split
from knnlm.report import numbers, write_reports
from knnlm.report.charts import SYMBOLS, make_charts
from knnlm.report.examples import example_view, flow_end, visible
from knnlm.report.headline import make_headline
from knnlm.report.html import render, write_report
from knnlm.report.table import layer_rows
from knnlm.report.view import make_view
from knnlm.results import EvalResult, Interval, LayerScore, Perplexity, Regret
from tests.sample_results import NASTY, sample_names, sample_result, sample_scores, sample_short_result
from tests.source_files import ROOT


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (36.414, "36.41"),
        (458.66, "458.7"),
        (12_345.6, "12,346"),
        (math.inf, "∞"),
        (math.nan, "–"),
        (-1.5, "−1.50"),
        (3.7528e26, "3.75e+26"),
    ],
)
def test_perplexity_has_about_four_digits(value, text):
    assert numbers.perplexity(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.5312, "−53.1"), (0.0042, "+0.42"), (-0.00001, "0.00"), (0.0, "0.00"), (1.5, "+150.0")],
)
def test_percent_is_finer_where_it_is_small(value, text):
    assert numbers.percent(value, signed=True) == f"{text}{numbers.SPACE}%"


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,230"), (0.05321, "0.0532"), (18.04, "18.0"), (0, "0"), (1.26e-9, "1.26e−09")]
)
def test_significant_has_three_digits(value, text):
    assert numbers.significant(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.431, "43"), (0.0041, "0.41"), (0.0, "0"), (6.1e-5, "0.0061")])
def test_probability_has_two_digits(value, text):
    assert numbers.probability(value) == f"{text}{numbers.SPACE}%"


def test_interval_has_one_precision_for_both_ends():
    tie, unit = numbers.TIE, f"{numbers.SPACE}%"
    assert numbers.percent_interval(Interval(-0.003, 0.011)) == f"−0.3{tie}to{tie}+1.1{unit}"
    assert numbers.percent_interval(Interval(math.nan, 0.1)) == ""


@pytest.mark.parametrize(("count", "text"), [(999, "999 bytes"), (412_000_000, "412 MB"), (2.5e12, "2.5 TB")])
def test_size_in_decimal_units(count, text):
    assert numbers.size(count) == text.replace(" ", numbers.SPACE)


@pytest.mark.parametrize(("seconds", "text"), [(0.731, "0.731 s"), (245, "4 min 05 s"), (7800, "2 h 10 min")])
def test_duration(seconds, text):
    assert numbers.duration(seconds).replace(numbers.SPACE, " ") == text


def test_names_split_and_sort_in_network_order():
    assert (split("11.ffn_input"), split(FINAL)) == ((11, "ffn_input"), (None, FINAL))
    names = sample_names(12)
    assert sorted(reversed(names), key=network_order) == list(names)


def test_rows_are_best_first_and_marked():
    result = sample_result()
    rows = layer_rows(result)
    order = [row.cells["perplexity"].order for row in rows]
    assert order == sorted(order) and len(rows) == 41
    assert [row.layer for row in rows if row.chosen] == [result.selected] == ["7.ffn_input"]
    assert [row.layer for row in rows if row.best] == [result.best]
    assert rows[0].bar == rows[0].cells["perplexity"].order / result.lm.perplexity
    assert {row.layer for row in rows if row.candidate} == set(result.choice.candidates)


def test_row_formats_its_layer():
    layer = replace(
        sample_result(1).layers[0], perplexity=36.414, change=-0.5312, interval=Interval(-0.55, -0.512), lam=0.4321
    )
    score = replace(layer.score, dispersion=0.81234, interval=Interval(0.80734, 0.81734))
    only = (replace(layer, score=score, temperature=15.04),)
    (row,) = layer_rows(replace(sample_result(1), layers=only, examined=()))
    texts = {key: f"{cell.text} {cell.note}".replace(numbers.SPACE, " ").strip() for key, cell in row.cells.items()}
    assert texts["dispersion"] == "0.812 ± 0.005"
    assert texts["change"].replace(numbers.TIE, " ") == "−53.1 % −55.0 to −51.2 %"
    assert (texts["perplexity"], texts["k"], texts["lam"], texts["temperature"]) == ("36.41", "512", "0.43", "15.0")


def test_row_of_a_layer_without_scores_or_perplexity_is_last():
    first, *others = sample_result(1).layers
    layers = (replace(first, score=None, perplexity=math.nan), *others)
    rows = layer_rows(replace(sample_result(1), layers=layers, examined=()))
    assert rows[-1].layer == first.layer
    assert rows[-1].cells["dispersion"].text == rows[-1].cells["perplexity"].text == numbers.MISSING


def test_layers_that_were_only_scored_come_last_by_their_pilots():
    result = sample_short_result()
    rows = layer_rows(result)
    evaluated = len(result.layers)
    assert {row.layer for row in rows[:evaluated]} == {one.layer for one in result.layers}
    pilots = [row.cells["pilot"].order for row in rows[evaluated:]]
    assert len(pilots) == len(result.examined) - evaluated > 0
    assert pilots == sorted(pilots)
    assert {row.cells[key].text for row in rows[evaluated:] for key in ("perplexity", "k", "bits")} == {numbers.MISSING}
    assert all(one.layer in render(result, title="t") for one in result.examined)


def test_bars_of_perplexity_are_the_difference_from_the_best_layer():
    """Those of the change against the LM mostly reflect the text and, at 30 blocks, would fill the plot."""
    result = sample_result()
    best = next(one for one in result.layers if one.layer == result.best)
    points = {point.layer: point for point in make_view(result, title="t").charts.points}
    assert points[best.layer].perplexity_error == (0.0, 0.0)
    for one in result.layers:
        above, below = points[one.layer].perplexity_error
        assert one.perplexity + above == pytest.approx(best.perplexity * (1 + one.versus_best_interval.high))
        assert one.perplexity - below == pytest.approx(best.perplexity * (1 + one.versus_best_interval.low))


@pytest.mark.parametrize(
    ("changes", "words", "tone"),
    [
        ({"regret": Regret(0.004, Interval(-0.003, 0.011), 0.006)}, "within the measurement", "good"),
        ({"regret": Regret(0.03, Interval(0.01, 0.05), 0.04)}, "was not the best", "poor"),
        ({"best": "7.ffn_input"}, "was right: of 41 layers", "good"),
        ({"selected": None, "regret": None}, "No choice was made", "open"),
    ],
)
def test_headline_says_whether_the_choice_was_right(changes, words, tone):
    headline = make_headline(replace(sample_result(), **changes))
    assert words in headline.verdict and headline.tone == tone


def test_headline_gives_both_ends_of_the_regret():
    result = replace(sample_result(), regret=Regret(-0.0004, Interval(-0.0073, 0.006), 0.0041))
    words = make_headline(result).verdict.replace(numbers.SPACE, " ")
    assert words.endswith("Regret −0.04 %; against the best in hindsight +0.41 %.")
    tile = next(tile for tile in make_view(result, title="").tiles if tile.label == "Regret")
    assert tile.note.endswith(f"against hindsight +0.41{numbers.SPACE}%")


@pytest.mark.parametrize(
    ("interval", "verb"), [((-0.2, -0.1), "lower"), ((0.1, 0.2), "raise"), ((-0.1, 0.1), "hardly change")]
)
def test_headline_says_what_retrieval_did(interval, verb):
    layer = replace(sample_result(1).layers[0], interval=Interval(*interval))
    headline = make_headline(replace(sample_result(1), layers=(layer,), best=layer.layer, selected=None))
    assert headline.verb == verb and "Only this layer" in headline.verdict


def test_white_space_of_tokens_is_visible_and_controls_are_not_passed_on():
    assert visible(" the") == "␣the" and visible("\n\n") == "↵↵" and visible("") == "(empty)"
    assert visible("a\x00\u202eb\ud800") == "a\ufffd\ufffdb\ufffd"
    assert flow_end("word " * 20, 12) == "… word word "


def test_example_says_how_much_likelier():
    helped, *_ = sample_result().helped
    view = example_view(helped)
    assert view.effect == "110 times likelier"
    assert [bar.text.replace(numbers.SPACE, " ") for bar in view.bars] == ["0.41 %", "93 %", "43 %"]
    assert [neighbor.agrees for neighbor in view.neighbors] == [True] * 5 + [False] * 3


def finite(result: EvalResult) -> EvalResult:
    """The result without infinities and NaN, which JSON cannot hold."""
    layers = tuple(replace(layer, lambda_curve=layer.lambda_curve[:-1]) for layer in result.layers)
    return replace(result, layers=layers, helped=result.helped[:2], hurt=(), correlations=result.correlations[:4])


def strict(text: str) -> dict:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    "result",
    [
        finite(sample_result()),
        EvalResult(Perplexity(10.0, 1.0, 30.0, 5), layers=(), best=""),
        replace(finite(sample_result(1)), index=None, choice=None, regret=None, selected=None),
    ],
)
def test_evaluation_survives_json(result):
    assert from_document(strict(dumps(to_document(result)))) == result


def test_layer_without_scores_survives_json():
    result = finite(sample_result(1))
    result = replace(result, layers=tuple(replace(layer, score=None) for layer in result.layers))
    assert from_document(strict(dumps(to_document(result)))) == result


def test_what_is_not_finite_becomes_null():
    document = strict(dumps(to_document(sample_result())))
    assert document["layers"][0]["lambda_curve"][-1] == [1.0, None]
    assert document["helped"][2]["mixed_probability"] is None
    assert to_document(from_document(document)) == document
    assert math.isnan(from_document(document).helped[2].mixed_probability)


def test_settings_of_any_type_become_json():
    settings = {"path": ROOT, "layers": ("a", "b"), "rate": math.inf, "nested": {"on": True, 3: None}}
    document = to_document(replace(sample_result(1), settings=settings))
    expected = {"path": str(ROOT), "layers": ["a", "b"], "rate": None, "nested": {"on": True, "3": None}}
    assert strict(dumps(document))["settings"] == expected


def test_layer_row_has_the_documented_fields():
    result = sample_result()
    row = to_document(result)["layers"][2]
    layer = result.layers[2]
    assert (row["layer"], row["block"], row["part"]) == ("0.ffn_input", 0, "ffn_input")
    assert row["interval"] == [layer.score.interval.low, layer.score.interval.high]
    assert row["change_interval"] == [layer.interval.low, layer.interval.high]
    assert (row["lambda"], row["k"], row["temperature"]) == (layer.lam, 512, layer.temperature)
    assert to_document(result)["layers"][-1]["block"] is None


def test_lambda_by_query_is_in_the_row_and_on_a_tile():
    result = sample_result()
    shown = next(layer for layer in result.layers if layer.layer == result.selected)
    row = next(row for row in to_document(result)["layers"] if row["layer"] == result.selected)
    assert row["by_query"] == {
        "perplexity": shown.by_query.perplexity,
        "change": -0.038,
        "interval": [-0.048, -0.0274],
        "offset": 3.82,
        "distance": -0.301,
        "different": -1.152,
    }
    tile = next(tile for tile in make_view(result, title="").tiles if tile.label == "With a λ for each query")
    assert tile.value == numbers.perplexity(shown.by_query.perplexity)
    assert tile.note.replace(numbers.SPACE, " ").startswith("−3.8 % against its fixed λ, 95 % interval")


def test_reports_of_before_there_was_a_lambda_by_query_are_read():
    document = to_document(finite(sample_result(1)))
    older = {**document, "layers": [{k: v for k, v in row.items() if k != "by_query"} for row in document["layers"]]}
    assert all(layer.by_query is None for layer in from_document(older).layers)


@pytest.mark.parametrize("document", [to_document(sample_result(1)), score_document(sample_scores(1))])
def test_schema_is_documented(document):
    words = set(re.findall(r"`([a-z_]+)`", (ROOT / "docs" / "report-json.md").read_text(encoding="utf-8")))
    assert set(document) | set(document["layers"][0]) <= words
    assert {field.name for field in fields(LayerScore)} <= words


def test_scores_survive_json():
    scores = sample_scores()
    document = strict(dumps(score_document(scores)))
    assert score_from_document(document) == scores
    assert document["selected"] == scores.choice.layer and document["layers"][0]["part"] == "attn_input"


def test_other_documents_are_refused():
    document = to_document(sample_result(1))
    with pytest.raises(InputError, match="not a score report"):
        score_from_document(document)
    with pytest.raises(InputError, match="not a score report"):
        score_from_document([document])
    with pytest.raises(InputError, match="version"):
        from_document({**document, "version": 99})
    with pytest.raises(InputError, match="written by another version: no 'best'"):
        from_document({key: value for key, value in document.items() if key != "best"})


class Page(HTMLParser):
    """Elements with attributes, texts of scripts, and the rest of the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.text = ""
        self._inside: tuple[str, dict] = ("", {})
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = (tag, dict(attrs))

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside = ("", {})

    def handle_data(self, data):
        tag, attributes = self._inside
        if tag == "script":
            self.scripts.append((attributes, data))
        elif not tag:
            self.text += data


def nasty_result() -> EvalResult:
    """Markup also in a layer's name, which goes into the charts' JSON."""
    result = sample_result(2)
    first, *others = result.layers
    name = f"0.{NASTY}"
    return replace(result, layers=(replace(first, layer=name), *others), best=name)


@pytest.fixture(scope="module")
def page():
    return Page(render(nasty_result(), title=f"A title {NASTY}"))


def test_page_loads_nothing_from_elsewhere(page):
    loading = {"src", "href", "srcset", "data", "action", "poster", "xlink:href", "background"}
    targets = [value for _, attributes in page.elements for key, value in attributes.items() if key in loading]
    assert targets and all(target.startswith("#") for target in targets)
    assert not {"link", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in page.elements}
    policy = next(attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_page_has_plotly_once(page):
    assert sum("plotly.js v" in text[:200] for _, text in page.scripts) == 1
    assert [attributes.get("type") for attributes, _ in page.scripts] == ["application/json"] * 5 + [None] * 2


def test_text_stays_text(page):
    assert page.text.count(NASTY) >= 8  # title, name, warning, setting, contexts, neighbours, source
    assert not [attributes for _, attributes in page.elements if any(key.startswith("on") for key in attributes)]
    charts = [text for attributes, text in page.scripts if attributes.get("type") == "application/json"]
    assert charts and all("<" not in text and strict(text) for text in charts)
    assert any("window.broken" in text for text in charts), "the layer's name should have reached the charts"
    code = [text for attributes, text in page.scripts if "type" not in attributes]
    assert not any("window.broken" in text for text in code)


def test_page_shows_every_layer_and_part():
    result = sample_result()
    page = Page(render(result, title="A title"))
    assert all(layer.layer in page.text for layer in result.layers)
    buttons = [
        attributes["data-part"] for tag, attributes in page.elements if tag == "button" and "data-part" in attributes
    ]
    assert buttons == [*PARTS, FINAL] * 2
    assert {*PARTS, FINAL} == set(SYMBOLS)


def unknown_numbers() -> EvalResult:
    result = sample_result(1)
    nowhere = Interval(math.nan, math.nan)
    layers = tuple(
        replace(layer, perplexity=math.nan, change=math.nan, interval=nowhere, lambda_curve=((0.0, math.inf),))
        for layer in result.layers
    )
    return replace(result, lm=Perplexity(math.inf, math.nan, math.nan, 0), layers=layers)


def infinite_perplexity(**changes: object) -> EvalResult:
    """What `--lambda 1` gives where every layer's neighbours miss a target."""
    result, nowhere = sample_result(), Interval(math.nan, math.nan)
    unknown = {"change": math.nan, "interval": nowhere, "versus_best": math.nan, "versus_best_interval": nowhere}
    infinite = {"perplexity": math.inf, "bits_per_byte": math.inf, "word_perplexity": math.inf, "lam": 1.0}
    infinite |= {"by_query": None}
    layers = tuple(replace(layer, **unknown, **infinite) for layer in result.layers)
    correlations = tuple(replace(one, spearman=math.nan) for one in result.correlations)
    fields = {"layers": layers, "best": "", "regret": None, "correlations": correlations}
    return replace(result, **{**fields, **changes})


@pytest.mark.parametrize("selected", ["7.ffn_input", None])
def test_infinite_perplexity_is_shown_as_such_and_nothing_is_made_of_it(selected):
    result = infinite_perplexity(selected=selected)
    headline, view = make_headline(result), make_view(result, title="")
    assert (headline.verb, headline.after, headline.change, headline.interval) == ("raise", "∞", "–", "")
    assert (headline.verdict, headline.tone) == (
        "None of 41 layers has a finite perplexity, so nothing says which is best.",
        "open",
    )
    cells = view.rows[0].cells
    assert [cells[key].text for key in ("perplexity", "change", "versus_best")] == ["∞", "–", "–"]
    assert not any(row.best for row in view.rows)
    assert {value for _, values in view.correlations.rows for value in values} == {numbers.MISSING}
    assert "Regret" not in [tile.label for tile in view.tiles]
    words = Page(render(result, title="")).text
    assert not re.search(r"\bnan\b|\binf\b|−100", words, re.IGNORECASE)


def test_infinite_perplexity_is_null_in_json():
    document = strict(dumps(to_document(infinite_perplexity())))
    row = document["layers"][0]
    assert [row[key] for key in ("perplexity", "change", "versus_best")] == [None] * 3
    assert (row["change_interval"], row["versus_best_interval"]) == ([None, None], [None, None])
    assert (document["best"], document["regret"], document["correlations"][0]["spearman"]) == ("", None, None)
    again = from_document(document)
    assert to_document(again) == document
    assert render(again, title="A title")


def test_choice_of_an_infinite_layer_was_not_the_best():
    result = infinite_perplexity()
    first, *others = result.layers
    finite_one = replace(sample_result().layers[0], versus_best=0.0)
    mixed = replace(result, layers=(finite_one, *others), best=first.layer)
    headline = make_headline(mixed)
    assert headline.tone == "poor" and headline.verdict.startswith("The choice was not the best: 0.attn_input")
    assert render(mixed, title="A title")


@pytest.mark.parametrize(
    ("result", "charts"),
    [
        (EvalResult(Perplexity(10.0, 1.0, 30.0, 5), layers=(), best=""), []),
        (replace(sample_result(1), layers=sample_result(1).layers[:1], examined=()), []),
        (unknown_numbers(), ["dispersion", "pilot"]),
        (infinite_perplexity(), ["dispersion", "pilot", "lambda"]),
        (sample_result(40), ["dispersion", "perplexity", "pilot", "scatter", "lambda"]),
        (sample_short_result(40), ["dispersion", "perplexity", "pilot", "scatter", "lambda"]),
    ],
)
def test_charts_are_drawn_of_what_is_there(result, charts):
    view = make_view(result, title="A title")
    assert [chart.key for chart in make_charts(view.charts)] == charts
    assert "A title" in render(result, title="A title")


def test_figures_are_valid_to_plotly():
    from plotly.graph_objects import Figure

    for chart in make_charts(make_view(sample_result(), title="").charts):
        figure = Figure(chart.figure)  # raises for an attribute or a value that plotly does not know
        assert len(figure.data) == len(chart.figure["data"])


def test_hopeless_layers_do_not_press_the_others_flat():
    first, *others = sample_result(2).layers
    result = replace(sample_result(2), layers=(replace(first, perplexity=5000.0), *others))
    figures = {chart.key: chart.figure for chart in make_charts(make_view(result, title="").charts)}
    low, high = figures["perplexity"]["layout"]["yaxis"]["range"]
    assert figures["perplexity"]["layout"]["yaxis"]["type"] == "log"
    assert low < math.log10(min(layer.perplexity for layer in others)) and math.log10(5000) < high < 5


def test_reports_are_written_whole(tmp_path):
    files = write_reports(finite(sample_result(1)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert from_document(strict(files.json.read_text(encoding="utf-8"))) == finite(sample_result(1))
    assert "kNN-LM report: ./llama-8m" in files.html.read_text(encoding="utf-8")


def test_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(sample_result(1), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("module", ["documents", "report.view", "report.charts", "report.html"])
def test_reports_need_no_arrays_and_no_models(module):
    code = f"import sys, knnlm.{module}; print({{'numpy', 'torch', 'faiss', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_fields_in_warnings_are_code_and_the_rest_is_text():
    html = render(replace(sample_result(), warnings=("a `lam` below <b>1</b> mends `it",)), title="")
    assert "<li>a <code>lam</code> below &lt;b&gt;1&lt;/b&gt; mends `it</li>" in html

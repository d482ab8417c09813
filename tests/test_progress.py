"""What a plan of stages foretells, by a clock that the test moves."""

from __future__ import annotations

import itertools
import math

import pytest

from knnlm.cli.telling import Teller
from knnlm.progress import Forecast, Stage, duration


class Hand:
    """A clock whose hand is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hand() -> Hand:
    return Hand()


def stages() -> list[Stage]:
    return [
        Stage(name="extracting keys", amount=1000, part="through the model", kind="model"),
        Stage(name="evaluation text", amount=100, part="through the model", kind="model"),
        Stage(name="evaluating", amount=10, part="evaluating", seconds=4.0),
    ]


def work(forecast: Forecast | Teller, hand: Hand, units: range, seconds: float, total: int | None = None) -> None:
    """Advance after each unit."""
    for done in units:
        hand.now += seconds
        forecast.advance(done, total)


def test_the_rest_of_a_stage_and_the_others_of_its_kind_take_what_was_measured(hand):
    forecast = Forecast(hand)
    forecast.plan(stages())
    forecast.begin("extracting keys")
    assert forecast.left() is None  # nothing is known of the model
    hand.now += 50  # the first batch warms up
    forecast.advance(100, None)
    work(forecast, hand, range(200, 401, 100), 20)
    assert forecast.is_measured
    assert forecast.left() == pytest.approx(600 * 0.2 + 100 * 0.2 + 10 * 4)
    assert forecast.parts() == pytest.approx({"through the model": 110 + 120 + 20, "evaluating": 40})
    hand.now += 7  # between two reports time goes on
    assert forecast.left() == pytest.approx(600 * 0.2 + 100 * 0.2 + 10 * 4 - 7)


def test_a_measured_stage_is_no_longer_what_the_plan_said(hand):
    forecast = Forecast(hand)
    forecast.plan(stages()[2:])
    forecast.begin("evaluating")
    assert forecast.left() == pytest.approx(40)
    hand.now += 10
    assert forecast.left() == pytest.approx(30)
    work(forecast, hand, range(1, 4), 8, 10)
    assert forecast.left() == pytest.approx(7 * 8)
    hand.now += 100
    assert forecast.left() == 0.0


def test_what_a_short_stage_took_counts_for_the_next_of_its_kind(hand):
    forecast = Forecast(hand)
    forecast.plan(stages()[:2])
    forecast.begin("extracting keys")
    work(forecast, hand, range(1000, 1001), 2.0)  # one report, sooner than a rate is measured
    forecast.end()
    forecast.begin("evaluation text")
    assert forecast.left() == pytest.approx(0.2)


def test_reports_in_other_units_than_planned_are_no_harm(hand):
    forecast = Forecast(hand)
    forecast.plan([Stage(name="looking", amount=1, part="evaluating", seconds=1.0)])
    forecast.begin("looking")
    forecast.advance(0, 60_000)
    assert forecast.left() == pytest.approx(1)


def test_stages_that_are_left_out_or_not_planned(hand):
    forecast = Forecast(hand)
    forecast.plan(stages())
    forecast.begin("reading")  # no plan names it, but the plan goes on
    hand.now += 3
    assert forecast.left() is None
    forecast.end()
    forecast.begin("evaluating")
    forecast.end()
    forecast.plan([])  # the others will not come
    assert forecast.left() == 0.0
    assert forecast.elapsed == 3
    forecast.begin("something else")  # a whole of its own
    assert forecast.elapsed == 0
    work(forecast, hand, range(1, 5), 2, 10)
    assert forecast.left() == pytest.approx(12)


def test_work_of_unknown_size_has_no_time_left(hand):
    forecast = Forecast(hand)
    forecast.plan([Stage(name="extracting keys", amount=None, part="through the model", kind="model"), stages()[1]])
    forecast.begin("extracting keys")
    work(forecast, hand, range(100, 501, 100), 10)
    assert forecast.left() is None
    forecast.end()
    assert forecast.left() == pytest.approx(100 * 0.1)


@pytest.mark.parametrize("slow", [1, 3])
def test_first_line_comes_once_and_is_what_it_took(hand, slow):
    said: list[str] = []
    teller, begun = Teller(Forecast(hand), said.append), hand.now
    teller.plan(stages())
    teller.begin("extracting keys", "tokens")
    hand.now += 0.5 * slow
    work(teller, hand, range(100, 1001, 100), 20.0 * slow)
    teller.end()
    assert said[0].startswith(f"about {duration(220.5 * slow + 40)}: {duration(220.5 * slow)} through the model, ")
    assert said[0].endswith(", 40 s evaluating") and len(said) == 1
    teller.begin("evaluation text", "tokens")
    work(teller, hand, range(100, 101), 20.0 * slow)
    teller.end()
    teller.begin("evaluating", "layers")
    work(teller, hand, range(1, 11), 4.0, 10)
    teller.end()
    assert len(said) == 1
    assert hand.now - begun == pytest.approx(220.5 * slow + 40)


def test_a_short_whole_is_not_foretold(hand):
    said: list[str] = []
    teller = Teller(Forecast(hand), said.append)
    teller.begin("verifying", "bytes")
    work(teller, hand, range(1, 11), 1, 10)
    assert said == []


def test_a_line_at_least_every_thirty_seconds(hand):
    said: list[tuple[float, str]] = []
    teller = Teller(Forecast(hand), lambda line: said.append((hand.now, line)))
    teller.plan(stages())
    teller.begin("extracting keys", "tokens")
    for second in range(200):  # as the thread of the screen does, once a second
        hand.now += 1
        if second % 20 == 0:
            teller.advance(5 * second, None)
        teller.line_if_due()
    times = [1000.0, *(when for when, _ in said), hand.now]
    assert max(after - before for before, after in itertools.pairwise(times)) <= 30
    assert "extracting keys, 100 of 1,000 tokens, about " in " ".join(line for _, line in said)


def test_a_line_names_the_layer_and_the_time_left(hand):
    teller = Teller(Forecast(hand), lambda line: None)
    teller.plan([Stage(name="evaluating", amount=17, part="evaluating", seconds=20.0)])
    teller.begin("evaluating", "layers")
    assert teller.line() == "evaluating, layer 1 of 17, about 5 min 40 s left"
    work(teller, hand, range(1, 12), 20, 17)
    assert teller.line() == "evaluating, layer 12 of 17, about 2 min left"
    assert teller.share() == pytest.approx(11 / 17)


def test_a_line_of_unknown_work_says_how_long_it_has_been(hand):
    teller = Teller(Forecast(hand), lambda line: None)
    teller.begin("reading", "tokens")
    hand.now += 40
    teller.advance(2000, None)
    assert teller.line() == "reading, 2,000 tokens, 40 s so far"
    assert teller.share() is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.1, "5 s"),
        (24, "25 s"),
        (57.4, "55 s"),
        (58, "1 min"),
        (138, "2 min 20 s"),
        (357, "6 min"),
        (594, "9 min 50 s"),
        (596, "10 min"),
        (3500, "58 min"),
        (3590, "1 h"),
        (4300, "1 h 10 min"),
    ],
)
def test_times_in_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize("seconds", [10 ** (step / 20) for step in range(20, 100)])
def test_times_in_words_are_right_within_a_tenth(seconds):
    number = {"s": 1, "min": 60, "h": 3600}
    words = duration(seconds).split()
    told = sum(int(count) * number[unit] for count, unit in zip(words[::2], words[1::2], strict=True))
    assert math.isclose(told, seconds, rel_tol=0.1, abs_tol=2.5)

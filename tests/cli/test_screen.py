"""Progress on a terminal and without one."""

from __future__ import annotations

import io
import re
import time

import pytest

from knnlm.cli import screen as screens
from knnlm.cli.screen import Screen
from knnlm.progress import Stage

STAGES = [
    Stage(name="evaluation text through the model", amount=1000, part="through the model", seconds=0.2),
    Stage(name="evaluating", amount=17, part="evaluating", seconds=10.0),
]


def shown(terminal: bool, wanted: str) -> str:
    """What a stage shows that goes on until the wanted is there, or for a minute."""
    screen, written = Screen(as_json=False), io.StringIO()
    screen.err = screens._console(file=written, force_terminal=terminal, width=80)
    screen.plan(STAGES)
    with screen.stage("evaluation text through the model", "tokens") as advance:
        advance(1, None)
        end = time.monotonic() + 60
        while not re.search(wanted, written.getvalue()) and time.monotonic() < end:
            time.sleep(0.02)
    return written.getvalue()


def test_a_terminal_of_80_columns_shows_one_bar_for_the_whole_with_the_time_left():
    wanted = r"━.*0%.* evaluation text through the model, about 6 min( \d\d s)? left"
    assert re.search(wanted, shown(terminal=True, wanted=wanted))


def test_without_a_terminal_there_is_a_line_at_times(monkeypatch):
    monkeypatch.setattr("knnlm.cli.telling.LINE_SECONDS", 0.5)
    lines = shown(terminal=False, wanted="\n").splitlines()
    assert lines and all(
        re.fullmatch(r"evaluation text through the model, 1 of 1,000 tokens, about \d min( \d\d s)? left", line)
        for line in lines
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_in_a_stage_leaves_the_screen_ready_for_the_next(terminal):
    screen = Screen(as_json=False)
    screen.err = screens._console(file=io.StringIO(), force_terminal=terminal)
    with pytest.raises(ZeroDivisionError), screen.stage("verifying", "bytes"):
        raise ZeroDivisionError
    with screen.stage("verifying again", "bytes") as advance:
        advance(1, 2)


def test_details_are_for_those_who_ask(capsys):
    Screen(as_json=False).detail("computed in bfloat16")
    Screen(as_json=False, verbose=True).detail("computed in float32")
    assert capsys.readouterr().err == "computed in float32\n"

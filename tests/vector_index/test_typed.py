"""JSON that may be damaged: nesting is checked before it is parsed."""

from __future__ import annotations

import json

import pytest

from index.typed import DEEPEST, Misfit, loads, parse


@pytest.mark.parametrize("deep", ["[" * 5000, '{"a":' * 5000, "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1)])
def test_deep_nesting_is_refused_before_it_is_parsed(deep, monkeypatch):
    # A RecursionError near the stack's end once broke a weakref's callback that ran there, and with it a whole run.
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    for read in (loads, lambda text: parse(text.encode())):
        with pytest.raises(Misfit, match="more than 64 levels"):
            read(deep)


@pytest.mark.parametrize("value", ["[" * 500, '\\"[[' * 100, [[]] * 500, {"{[": "]}"}, "\\" * 3 + "[" * 99])
def test_brackets_in_texts_and_beside_each_other_are_no_levels(value):
    text = json.dumps({"a": value})
    assert loads(text) == parse(text.encode()) == {"a": value}


def test_levels_up_to_the_limit_are_read():
    assert loads("[" * DEEPEST + "]" * DEEPEST) == json.loads("[" * DEEPEST + "]" * DEEPEST)

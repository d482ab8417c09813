"""The choice: who may be chosen, by what, and when the two scores are said to disagree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from knnlm.config import LayerConfig
from knnlm.errors import InputError, LayerError
from knnlm.layer_names import PARTS
from knnlm.results import Choice, Interval, LayerScore
from knnlm.scores.choose import candidate_layers
from knnlm.scores.choose import choose as choose_by

APART, TOGETHER = Interval(0.01, 0.03), Interval(-0.01, 0.03)
NAMES = (*(f"{block}.{part}" for block in range(4) for part in PARTS), "final_norm")


def score(layer: str, dispersion: float, probe: float, width: float = 0.01) -> LayerScore:
    interval, probe_interval = (Interval(value - width, value + width) for value in (dispersion, probe))
    return LayerScore(layer, dispersion, interval, 0.5, 0.5, 0.5, 10.0, probe, probe_interval)


def choose(
    scores: list[LayerScore], config: LayerConfig, names: Sequence[str], difference: Interval = TOGETHER
) -> Choice:
    """With probes that differ by the given interval, whatever the two layers are."""
    return choose_by(scores, config, names, lambda one, other: difference)


def test_default_candidates_are_ffn_input_of_the_upper_half() -> None:
    assert candidate_layers(LayerConfig(), NAMES, NAMES) == ("2.ffn_input", "3.ffn_input")


def test_the_upper_half_is_the_models_and_not_that_of_the_layers_looked_at() -> None:
    looked_at = ("0.ffn_input", "1.ffn_input", "2.ffn_input")
    assert candidate_layers(LayerConfig(), looked_at, NAMES) == ("2.ffn_input",)


def test_any_layer_may_be_chosen_where_no_candidate_was_looked_at() -> None:
    assert candidate_layers(LayerConfig(), ("0.attn_output", "1.attn_output"), NAMES) == (
        "0.attn_output",
        "1.attn_output",
    )


def test_embedding_like_layers_are_never_chosen_by_default() -> None:
    """Plain dispersion over all layers picks 0.attn_input, which cost up to 81 % of perplexity (docs/layers.md)."""
    scores = [score("0.attn_input", 0.99, 0.01), score("2.ffn_input", 0.6, 0.3), score("3.ffn_input", 0.7, 0.3)]
    assert choose(scores, LayerConfig(), NAMES).layer == "3.ffn_input"
    assert choose(scores, LayerConfig(candidates="all"), NAMES).layer == "0.attn_input"


def test_the_deepest_of_those_about_equally_dispersed_is_taken() -> None:
    near = [score("2.ffn_input", 0.70, 0.3), score("3.ffn_input", 0.67, 0.3)]
    choice = choose(near, LayerConfig(), NAMES)
    assert choice.layer == "3.ffn_input"
    assert "within 5 % of the largest, that of 2.ffn_input (0.7000)" in choice.reason


def test_a_deep_layer_that_has_collapsed_is_not_taken_however_wide_the_intervals() -> None:
    apart = [score("2.ffn_input", 0.70, 0.3, width=0.2), score("3.ffn_input", 0.66, 0.3, width=0.2)]
    choice = choose(apart, LayerConfig(), NAMES)
    assert choice.layer == "2.ffn_input"
    assert "most dispersed" in choice.reason


@pytest.mark.parametrize("select", ["dispersion", "probe"])
def test_one_candidate_is_not_compared_with_itself(select: str) -> None:
    choice = choose([score("3.ffn_input", 0.7, 0.3)], LayerConfig(select=select), NAMES)
    assert (choice.layer, choice.reason) == ("3.ffn_input", "3.ffn_input is the only candidate")


def test_probe_chooses_when_asked() -> None:
    scores = [score("2.ffn_input", 0.6, 0.4), score("3.ffn_input", 0.7, 0.3)]
    choice = choose(scores, LayerConfig(select="probe"), NAMES)
    assert (choice.layer, choice.select) == ("2.ffn_input", "probe")


def test_a_probe_that_is_higher_beyond_doubt_is_told_with_the_way_out() -> None:
    """Also of a layer that is no candidate: in a model hardly trained the first block may be the better key."""
    scores = [score("0.attn_input", 0.9, 0.4), score("2.ffn_input", 0.6, 0.2), score("3.ffn_input", 0.7, 0.3)]
    choice = choose(scores, LayerConfig(), NAMES, APART)
    assert choice.layer == "3.ffn_input"
    assert choice.disagreement == (
        "the scores disagree: the retrieval probe puts 0.attn_input (0.4000) above the chosen 3.ffn_input (0.3000), "
        "interval of the difference 0.0100 to 0.0300; `select='0.attn_input'` takes it"
    )


def test_the_difference_is_that_of_the_highest_probe_and_the_chosen_layer() -> None:
    asked = []
    scores = [score("2.ffn_input", 0.6, 0.4), score("3.ffn_input", 0.7, 0.3)]
    choose_by(scores, LayerConfig(), NAMES, lambda one, other: asked.append((one, other)) or TOGETHER)
    assert asked == [("2.ffn_input", "3.ffn_input")]


def test_no_disagreement_within_the_interval_or_where_the_chosen_has_the_highest_probe() -> None:
    scores = [score("2.ffn_input", 0.6, 0.4), score("3.ffn_input", 0.7, 0.3)]
    assert choose(scores, LayerConfig(), NAMES, TOGETHER).disagreement is None
    assert choose(scores, LayerConfig(select="probe"), NAMES, APART).disagreement is None


def test_a_named_layer_is_taken() -> None:
    scores = [score("2.ffn_input", 0.6, 0.4), score("0.attn_input", 0.7, 0.3)]
    assert choose(scores, LayerConfig(select="0.attn_input"), NAMES).layer == "0.attn_input"


def test_an_unknown_or_ambiguous_name_is_refused() -> None:
    scores = [score("2.ffn_input", 0.6, 0.4), score("3.ffn_input", 0.7, 0.3)]
    with pytest.raises(LayerError, match=r"7\.ffn_input.*2-3\.ffn_input"):
        choose(scores, LayerConfig(select="7.ffn_input"), NAMES)
    with pytest.raises(InputError, match="fits 2 layers"):
        choose(scores, LayerConfig(select="*.ffn_input"), NAMES)


def test_layers_without_a_probe_are_not_chosen_by_it() -> None:
    """A text of one short document has none: the first candidate used to be taken."""
    none = [score("2.ffn_input", 0.6, math.nan), score("3.ffn_input", 0.7, math.nan)]
    with pytest.raises(InputError, match="`select='probe'` compares two documents"):
        choose(none, LayerConfig(select="probe"), NAMES)
    assert choose(none, LayerConfig(), NAMES).disagreement is None
    some = [score("2.ffn_input", 0.6, math.nan), score("3.ffn_input", 0.7, 0.1)]
    assert choose(some, LayerConfig(select="probe"), NAMES).layer == "3.ffn_input"

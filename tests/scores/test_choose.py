"""The choice: who may be chosen, by what, and when a better pilot is told of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from knnlm.config import LayerConfig
from knnlm.errors import InputError, LayerError
from knnlm.layer_names import PARTS
from knnlm.results import Choice, Interval, LayerScore, ScoreResult
from knnlm.scores.choose import candidate_layers, layers_that_matter, layers_to_score
from knnlm.scores.choose import choose as choose_by

# Of one layer's pilot relative to another's: better beyond doubt, or not.
APART, TOGETHER = Interval(-0.3, -0.1), Interval(-0.3, 0.01)
UNKNOWN = Interval(math.nan, math.nan)
NAMES = (*(f"{block}.{part}" for block in range(4) for part in PARTS), "final_norm")


def score(
    layer: str, dispersion: float, probe: float = 0.3, *, pilot: float = math.nan, width: float = 0.01
) -> LayerScore:
    interval, probe_interval = (Interval(value - width, value + width) for value in (dispersion, probe))
    return LayerScore(layer, dispersion, interval, 0.5, 0.5, 0.5, 10.0, probe, probe_interval, pilot)


def choose(
    scores: list[LayerScore], config: LayerConfig, names: Sequence[str], difference: Interval = TOGETHER
) -> Choice:
    """With pilots that differ by the given interval, whatever the two layers are."""
    return choose_by(scores, config, names, lambda one, other, comparisons: difference)


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


@pytest.mark.parametrize("select", ["auto", "dispersion", "probe"])
def test_one_candidate_is_not_compared_with_itself(select: str) -> None:
    choice = choose([score("3.ffn_input", 0.7, 0.3)], LayerConfig(select=select), NAMES)
    assert (choice.layer, choice.reason) == ("3.ffn_input", "3.ffn_input is the only candidate")


def test_probe_chooses_when_asked() -> None:
    scores = [score("2.ffn_input", 0.6, 0.4), score("3.ffn_input", 0.7, 0.3)]
    choice = choose(scores, LayerConfig(select="probe"), NAMES)
    assert (choice.layer, choice.select) == ("2.ffn_input", "probe")


PILOTED = [
    score("0.attn_input", 0.9, pilot=80.0),
    score("1.ffn_input", 0.5, pilot=70.0),
    score("2.ffn_input", 0.6, pilot=90.0),
    score("3.ffn_input", 0.7, pilot=100.0),
]


def test_the_best_pilot_is_taken_where_it_is_better_than_the_last_layers_beyond_the_interval() -> None:
    """Other kinds of layers do not compete, however good their pilots."""
    choice = choose([*PILOTED[1:], score("final_norm", 0.4, pilot=60.0)], LayerConfig(), NAMES, APART)
    assert (choice.layer, choice.select, choice.disagreement) == ("1.ffn_input", "auto", None)
    assert choice.candidates == ("2.ffn_input", "3.ffn_input")
    assert choice.reason == (
        "1.ffn_input has a better pilot (perplexity 70.00) than 3.ffn_input (100.00), beyond the interval; "
        "dispersion proposes 3.ffn_input (100.00)"
    )


def test_the_normed_embedding_competes_as_it_is_best_where_a_network_has_hardly_learnt() -> None:
    first = replace(PILOTED[0], pilot=60.0)
    assert choose([first, *PILOTED[1:]], LayerConfig(), NAMES, APART).layer == "0.attn_input"
    assert choose([*PILOTED[1:], replace(first, layer="1.attn_input")], LayerConfig(), NAMES, APART).layer == (
        "1.ffn_input"
    )


def test_the_last_layer_stands_against_pilots_that_are_better_by_chance() -> None:
    """The best pilot alone cost up to 2.5 % on a real model (docs/layers.md)."""
    asked = []

    def change(one: str, other: str, comparisons: int) -> Interval:
        asked.append((other, comparisons))
        return TOGETHER

    choice = choose_by([*PILOTED, score("final_norm", 0.4, pilot=60.0)], LayerConfig(), NAMES, change)
    assert set(asked) == {("3.ffn_input", 1)}
    assert (choice.layer, choice.reason) == (
        "3.ffn_input",
        "3.ffn_input is the last of 4 layers, and no pilot is better than its own (perplexity 100.00) beyond the "
        "interval; the best is that of 1.ffn_input (70.00)",
    )


def test_where_dispersion_agrees_nothing_is_said_of_it() -> None:
    choice = choose([*PILOTED[:3], replace(PILOTED[3], pilot=60.0)], LayerConfig(), NAMES)
    assert choice.reason == "3.ffn_input has the best pilot (perplexity 60.00) of 4 layers"


def test_candidates_that_the_user_names_are_the_only_ones_compared() -> None:
    choice = choose(PILOTED, LayerConfig(candidates="2-3.ffn_input"), NAMES, APART)
    assert (choice.layer, choice.reason) == (
        "2.ffn_input",
        "2.ffn_input has a better pilot (perplexity 90.00) than 3.ffn_input (100.00), beyond the interval; "
        "dispersion proposes 3.ffn_input (100.00)",
    )


def test_without_pilots_dispersion_decides() -> None:
    choice = choose([replace(one, pilot=math.nan) for one in PILOTED], LayerConfig(), NAMES, UNKNOWN)
    assert (choice.layer, choice.select, choice.disagreement) == ("3.ffn_input", "auto", None)
    assert "most dispersed" in choice.reason


def test_the_note_names_the_best_of_those_that_are_better_beyond_doubt() -> None:
    """The best pilot of all may be within its interval, and another beyond it."""
    config = LayerConfig(select="dispersion")
    choice = choose_by(PILOTED, config, NAMES, lambda one, other, _: APART if one == "0.attn_input" else TOGETHER)
    assert choice.layer == "3.ffn_input"
    assert choice.disagreement is not None
    assert "0.attn_input has a pilot" in choice.disagreement


def test_the_note_compares_with_what_dispersion_takes() -> None:
    asked = []
    config = LayerConfig(select="dispersion")
    choose_by(PILOTED, config, NAMES, lambda *each: asked.append(each) or TOGETHER)
    assert set(asked) == {(one.layer, "3.ffn_input", 3) for one in PILOTED[:3]}


@pytest.mark.parametrize(
    "config",
    [LayerConfig(), LayerConfig(candidates="2-3.ffn_input")]
    + [LayerConfig(select=select) for select in ("dispersion", "probe", "pilot")],
)
def test_a_choice_needs_the_scores_of_no_other_layers(config: LayerConfig) -> None:
    needed = [one for one in PILOTED if one.layer in layers_to_score(config, NAMES)]
    assert choose(needed, config, NAMES, APART) == choose(PILOTED, config, NAMES, APART)
    # The first layer competes unless candidates are named.
    assert ("0.attn_input" in [one.layer for one in needed]) == (config.candidates == "candidates")
    every = layers_to_score(config, NAMES) == NAMES
    assert every == (config.select == "dispersion")


def test_dispersion_alone_tells_of_a_better_pilot_with_the_way_out() -> None:
    choice = choose(PILOTED, LayerConfig(select="dispersion"), NAMES, APART)
    assert choice.layer == "3.ffn_input"
    assert choice.disagreement == (
        "the scores disagree: 1.ffn_input has a pilot (perplexity 70.00) that is better by 10.0% to 30.0% than that "
        "of 3.ffn_input (100.00); `select='1.ffn_input'` takes it"
    )
    assert choose(PILOTED, LayerConfig(select="dispersion"), NAMES, TOGETHER).disagreement is None


def test_the_best_pilot_chooses_among_candidates_when_asked() -> None:
    choice = choose(PILOTED, LayerConfig(select="pilot"), NAMES, APART)
    assert (choice.layer, choice.disagreement) == ("2.ffn_input", None)
    assert choose(PILOTED, LayerConfig(select="pilot", candidates="all"), NAMES).layer == "1.ffn_input"


def test_layers_that_matter_are_the_chosen_the_last_the_proposed_and_the_best_pilots() -> None:
    def scored(layer: str, *, pilots: bool = True) -> ScoreResult:
        scores = [score(f"{block}.ffn_input", 0.5 + block / 10, pilot=90 - block) for block in range(6)]
        scores[4] = score("4.ffn_input", 1.2, pilot=300.0)
        scores += [score("final_norm", 0.4, pilot=50.0)]
        scores = scores if pilots else [replace(one, pilot=math.nan) for one in scores]
        choice = Choice(layer, "named", ("3.ffn_input", "4.ffn_input", "5.ffn_input"), "")
        return ScoreResult(tuple(scores), choice, 1, 1, 1, False, {}, {})

    assert layers_that_matter(scored("0.ffn_input"), 1) == ("0.ffn_input",)
    assert layers_that_matter(scored("0.ffn_input"), 3) == ("0.ffn_input", "4.ffn_input", "5.ffn_input")
    assert layers_that_matter(scored("5.ffn_input"), 4) == ("3.ffn_input", "4.ffn_input", "5.ffn_input", "final_norm")
    without = scored("0.ffn_input", pilots=False)
    assert layers_that_matter(without, 4) == ("0.ffn_input", "3.ffn_input", "4.ffn_input", "5.ffn_input")


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
    for select in ("probe", "pilot"):
        with pytest.raises(InputError, match=f"`select='{select}'` compares documents"):
            choose(none, LayerConfig(select=select), NAMES)
    assert choose(none, LayerConfig(), NAMES, UNKNOWN).layer == "3.ffn_input"
    some = [score("2.ffn_input", 0.6, math.nan), score("3.ffn_input", 0.7, 0.1)]
    assert choose(some, LayerConfig(select="probe"), NAMES).layer == "3.ffn_input"

"""Names of layers: patterns that select them, lists that show them, their depth."""

from __future__ import annotations

import pytest

from knnlm.errors import LayerError
from knnlm.layer_names import FINAL, PARTS, default_candidates, depth, list_names, select_layers, split

NAMES = (*(f"{block}.{part}" for block in range(5) for part in PARTS), FINAL)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("all", NAMES),
        ("*.*", NAMES[:-1]),
        ("final_norm", (FINAL,)),
        ("3.ffn_input", ("3.ffn_input",)),
        ("-1.ffn_input", ("4.ffn_input",)),
        ("-5.ffn_input", ("0.ffn_input",)),
        ("0.*", tuple(f"0.{part}" for part in PARTS)),
        ("*.ffn_input", tuple(f"{block}.ffn_input" for block in range(5))),
        ("1-3.attn_*", tuple(f"{b}.{p}" for b in (1, 2, 3) for p in ("attn_input", "attn_output"))),
        ("final_norm, 2.ffn_input ,0.ffn_input", ("0.ffn_input", "2.ffn_input", FINAL)),
        (["final_norm", "2.ffn_input,2.ffn_*"], ("2.ffn_input", "2.ffn_output", FINAL)),
        ("candidates", ("2.ffn_input", "3.ffn_input", "4.ffn_input")),
        ("residual", tuple(n for n in NAMES if not n.endswith(("attn_output", "ffn_output")) and n != "0.attn_input")),
        (list_names(NAMES), NAMES),
    ],
)
def test_select_layers(patterns, expected):
    assert select_layers(patterns, NAMES) == expected


@pytest.mark.parametrize(
    "pattern", ["5.ffn_input", "-6.ffn_input", "ffn_input", "1.mlp", "1", "", ",", "3-1.ffn_input", "1.ffn_input 2.*"]
)
def test_select_layers_lists_the_names_when_nothing_fits(pattern):
    with pytest.raises(LayerError, match=r"there are 0-4\.attn_input, 0-4\.attn_output, .*, final_norm$"):
        select_layers(pattern, NAMES)


def test_one_wrong_pattern_among_right_ones_is_an_error():
    with pytest.raises(LayerError, match=r"no layer fits '7\.\*'"):
        select_layers("0.ffn_input,7.*", NAMES)


def test_list_names_shows_gaps():
    assert list_names(("0.ffn_input", "1.ffn_input", "3.ffn_input", "1.block_output")) == (
        "0-1.ffn_input, 3.ffn_input, 1.block_output"
    )


def test_default_candidates_without_a_feed_forward_are_block_outputs():
    assert default_candidates(("0.block_output", "1.block_output", FINAL)) == ("1.block_output",)


def test_depth_rises_through_the_network():
    depths = [depth(name, 5) for name in NAMES]
    assert depths[0] == 0.0 and depths[-1] == depths[-2] == 1.0
    assert depths == sorted(depths)


def test_split():
    assert split("11.ffn_input") == (11, "ffn_input") and split(FINAL) == (None, FINAL)
    for wrong in ("ffn_input", "-1.ffn_input", "1.mlp", "1.final_norm", ""):
        with pytest.raises(LayerError, match="not the name of a layer"):
            split(wrong)

"""One pass over segments, against transformers' own loss and O(N²) sums in float64."""

from __future__ import annotations

import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from knnlm.errors import InputError, ModelError
from knnlm.extraction.segment_values import measure_segments
from knnlm.model.lm import LanguageModel
from knnlm.text.clusters import text_clusters
from knnlm.text.segments import Segment, cut_segments, sample_segments
from knnlm.text.windows import TokenDocument
from tests.cosine_oracle import mean_distance
from tests.tiny_models import VOCABULARY, tiny_model, tiny_tokenizer

LAYERS = ("0.block_output", "2.ffn_input", "final_norm")


def documents(*lengths: int, seed: int = 0) -> list[TokenDocument]:
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]
    return [TokenDocument(one, "text.jsonl", number) for number, one in enumerate(tokens, start=1)]


def tiny_lm(kind: str = "gpt2") -> LanguageModel:
    return LanguageModel.from_model(tiny_model(kind), tiny_tokenizer(), name=kind)


def segments_of(*lengths: int, context: int = 16) -> list[Segment]:
    return list(cut_segments(documents(*lengths), context))


# Cutting and sampling


def test_segments_are_whole_and_do_not_overlap():
    texts = documents(40, 15, 16, 33)
    found = [(one.document, one.start, one.number, one.tokens_T.tolist()) for one in cut_segments(texts, 16)]
    expected = [(0, 0), (0, 16), (2, 0), (3, 0), (3, 16)]
    assert found == [(d, at, d + 1, texts[d].tokens[at : at + 16].tolist()) for d, at in expected]


@pytest.mark.parametrize("context", [1, 0, -5])
def test_a_segment_needs_two_tokens(context):
    with pytest.raises(InputError, match=f"`context` is {context}"):
        list(cut_segments(documents(40), context))


def test_text_shorter_than_a_segment_is_refused():
    with pytest.raises(InputError, match="as long as one segment; take a smaller `context`"):
        sample_segments(cut_segments(documents(15, 15), 16), 10, seed=0)


def test_sample_is_in_order_and_every_segment_is_as_likely():
    segments = segments_of(*[32] * 20)
    assert sample_segments(segments, 40, seed=3) == segments
    counts = np.zeros(40)
    for seed in range(400):
        sample = sample_segments(segments, 10, seed=seed)
        places = [2 * one.document + one.start // 16 for one in sample]
        assert len(places) == 10 and places == sorted(set(places))
        counts[places] += 1
    # 100 expected, standard deviation 8.7.
    assert counts.min() > 65 and counts.max() < 135


def test_documents_are_clusters_where_there_are_enough_of_them():
    assert text_clusters(segments_of(*[32] * 8)).tolist() == [number for number in range(8) for _ in (0, 1)]


def test_runs_are_clusters_of_few_long_documents():
    clusters = text_clusters(segments_of(20_000, 9_000, context=4096))
    assert clusters.tolist() == [0, 0, 1, 1, 2, 2]
    # One document is nearly all of the text, whatever stands beside it.
    assert len(set(text_clusters(segments_of(82_000, *[4096] * 8, context=4096)).tolist())) == 10 + 8


# What the pass finds


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt-neox"])
def test_values_are_those_of_transformers(kind):
    segments, lm = segments_of(70, 30, 50), tiny_lm(kind)
    values = measure_segments(lm, segments, LAYERS, batch_tokens=48)
    model = tiny_model(kind)
    for number, segment in enumerate(segments):
        tokens = torch.from_numpy(segment.tokens_T.astype(np.int64))[None]
        with torch.inference_mode():
            loss = model(tokens, labels=tokens).loss
            labels = torch.full_like(tokens, -100)
            labels[0, -1] = tokens[0, -1]
            final_loss = model(tokens, labels=labels).loss
        assert values.loss_S[number] == pytest.approx(float(loss), rel=1e-5)
        assert values.final_loss_S[number] == pytest.approx(float(final_loss), rel=1e-5)
        hidden = hidden_states(kind, tokens)
        for layer, vectors_TD in hidden.items():
            assert values.within[layer][number] == pytest.approx(mean_distance(vectors_TD), abs=1e-6)
            unit = vectors_TD[-1] / np.linalg.norm(vectors_TD[-1])
            np.testing.assert_allclose(values.last[layer][number], unit, atol=1e-5)


def hidden_states(kind: str, tokens_1T: torch.Tensor) -> dict[str, np.ndarray]:
    """`output.hidden_states`, as the released code of arXiv 2506.24106 reads them: the last is behind the norm."""
    with torch.inference_mode():
        states = tiny_model(kind)(tokens_1T, output_hidden_states=True).hidden_states
    return {
        "0.block_output": states[1][0].double().numpy(),
        "final_norm": states[-1][0].double().numpy(),
    }


def test_batches_make_no_difference():
    segments, lm = segments_of(*[48] * 5), tiny_lm()
    whole, single = (measure_segments(lm, segments, LAYERS, batch_tokens=size) for size in (10_000, 1))
    np.testing.assert_allclose(whole.loss_S, single.loss_S, rtol=1e-5)
    for layer in LAYERS:
        np.testing.assert_allclose(whole.within[layer], single.within[layer], atol=1e-6)
        np.testing.assert_allclose(whole.last[layer], single.last[layer], atol=1e-5)


def test_look_sees_every_segment_once():
    seen = {layer: [] for layer in LAYERS}
    told = []
    segments = segments_of(*[48] * 5)
    measure_segments(
        tiny_lm(),
        segments,
        LAYERS,
        batch_tokens=64,
        look=lambda layer, vectors, first: seen[layer].extend(range(first, first + len(vectors))),
        advance=lambda done, total: told.append((done, total)),
    )
    assert all(places == list(range(15)) for places in seen.values())
    assert told == [(4, 15), (8, 15), (12, 15), (15, 15)]


def test_nan_is_named_with_its_place():
    model = tiny_model("gpt2")
    lm = LanguageModel.from_model(model, tiny_tokenizer(), name="broken")
    segments = segments_of(16, 48)
    with torch.no_grad():
        model.transformer.wte.weight[int(segments[2].tokens_T[3])] = float("nan")
    assert not {int(token) for one in segments[:2] for token in one.tokens_T} & {int(segments[2].tokens_T[3])}
    # Attention multiplies what it does not see by 0, and NaN stays NaN: the whole segment is broken.
    with pytest.raises(
        ModelError, match=r"layer 0\.block_output gives .* not finite, at token 16 of text\.jsonl, document 2"
    ):
        measure_segments(lm, segments, LAYERS)


def test_nan_above_the_layers_is_found():
    model = tiny_model("gpt2")
    lm = LanguageModel.from_model(model, tiny_tokenizer(), name="broken")
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = float("nan")
    with pytest.raises(ModelError, match="broken gives probabilities that are not finite"):
        measure_segments(lm, segments_of(16), ["0.block_output"])


def test_no_room_for_last_vectors_is_said_before_the_pass(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10, 9, 1000))
    with pytest.raises(InputError, match=r"last vectors of 3 segments .* take fewer `layers` or `max_segments`"):
        measure_segments(tiny_lm(), segments_of(48), LAYERS)

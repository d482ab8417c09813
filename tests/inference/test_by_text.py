"""λ by the text so far in every way that `generate()` and the server have, against a float64 oracle of whole texts.

The texts begin in the datastore's domain or outside it and go on with tokens drawn from the mixture, so that the trust
takes all values from 0.001 to 0.999.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from knnlm import KNNLM
from knnlm.errors import InputError
from knnlm.inference.batch import RowModel
from knnlm.inference.by_text import RowPlan, TextMemory
from knnlm.inference.explain import Explainer
from knnlm.knn.mixing import Gate, Mix
from knnlm.knn.retrieval import Retrieval
from knnlm.model.head import log_softmax
from tests.evaluation.test_evaluate_oracle import texts
from tests.inference.test_generation import (  # noqa: F401
    CONTEXT,
    LAMBDA,
    PROMPTS,
    TEMPERATURE,
    TOLERANCE,
    K,
    beam_search,
    brute_force,
    count_queries,
    encode,
    forced,
    knn_of,
    padded,
    stores,
)
from tests.knn.test_sums_to_one import searcher
from tests.tiny_models import VOCABULARY

# λ stays high on foreign text too, so that it costs much there.
BOLD = Gate(offset=1.0, distance=-0.02, different=-0.1)
SETTING = Mix(K, TEMPERATURE, LAMBDA, BOLD, by_text=True)
FOREIGN = "{}[] ~~ ;; || %% {}[] ~~ ;; ||"


@pytest.fixture
def model_of(knn_of):  # noqa: F811
    def make(kind: str = "llama", layer: str = "2.ffn_input") -> KNNLM:
        model = knn_of(kind, layer)
        model.retrieval = replace(model.retrieval, setting=SETTING)
        return model

    return make


def oracle(lm, kind: str, layer: str, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """log p over the vocabulary at each position, and the trust there: a forward pass of a two-state chain, float64."""
    gated = brute_force(lm, kind, layer, tokens, BOLD)
    plain = torch.log_softmax(lm.model(torch.tensor([tokens])).logits[0].double(), -1).detach().numpy()
    belief, found, trusts = np.array([0.5, 0.5]), [], []
    for place in range(len(tokens)):
        both = np.exp([gated[place], plain[place]])
        trusts.append(belief[0])
        found.append(np.log(belief @ both) if belief[0] >= 0.01 else plain[place])
        if place + 1 < len(tokens):
            belief = belief * both[:, tokens[place + 1]]
            belief = 0.998 * belief / belief.sum() + 0.001
    return np.array(found), np.array(trusts)


@pytest.mark.parametrize(("kind", "start"), [("llama", "home"), ("llama", "away"), ("llama", "both"), ("gpt2", "home")])
def test_whole_texts_equal_a_float64_oracle(kind, start, stores, model_of) -> None:  # noqa: F811
    home = texts(1, 1)[0]
    text = {"home": home, "away": FOREIGN + FOREIGN, "both": FOREIGN[:12] + home}[start]
    tokens, model = encode(text)[:CONTEXT], model_of(kind)
    expected, trusts = oracle(stores(kind)[0], kind, "2.ffn_input", tokens)
    found = forced(model, tokens)
    np.testing.assert_allclose(found.double().numpy(), expected, **TOLERANCE)
    assert (found.double().exp().sum(-1) - 1).abs().max() < 1e-6
    assert trusts[-1] < 0.01 if start == "away" else trusts[-1] > 0.5
    silent = trusts < 0.01
    plain = log_softmax(stores(kind)[0].model(torch.tensor([tokens])).logits[0])
    assert torch.equal(found[silent], plain[silent])  # to the bit
    assert silent.any() or start == "home"


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom", "mixtral"])
def test_steps_of_generate_equal_teacher_forcing(kind, cache, model_of) -> None:
    model, rows = model_of(kind), [encode(prompt) for prompt in (*PROMPTS, FOREIGN)]
    batch = padded(rows, "left")
    done = model.generate(
        **batch,
        max_new_tokens=9,
        do_sample=True,
        top_k=0,
        use_cache=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    steps, moved = torch.stack(done.logits, 1), 0.0
    for row, tokens in enumerate(rows):
        tokens = tokens + done.sequences[row, batch["input_ids"].shape[1] :].tolist()
        part = slice(len(rows[row]) - 1, -1)
        expected = forced(model, tokens)[part]
        torch.testing.assert_close(steps[row], expected, **TOLERANCE)
        model.retrieval = replace(model.retrieval, setting=replace(SETTING, by_text=False))
        moved = max(moved, float((forced(model, tokens)[part] - expected).abs().max()))
        model.retrieval = replace(model.retrieval, setting=SETTING)
    assert moved > 0.02


@pytest.mark.parametrize("cache", [True, False])
def test_beams_take_their_trust_with_them(cache, model_of) -> None:
    model, rows = model_of(), [encode(prompt) for prompt in PROMPTS[:2]]
    done = model.generate(
        **padded(rows, "left"),
        max_new_tokens=5,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        length_penalty=0.0,
        use_cache=cache,
        return_dict_in_generate=True,
        output_scores=True,
    )
    places = done.beam_indices.view(2, 3, 5) - torch.tensor([0, 3])[:, None, None]
    assert (places[:, :, 1:] != places[:, :, :-1]).any()
    for row, tokens in enumerate(rows):
        expected = beam_search(model, tokens, 3, 5)
        assert done.sequences.view(2, 3, -1)[row, :, -5:].tolist() == [new for _, new in expected]
        scores = done.sequences_scores.view(2, 3)[row].tolist()
        assert scores == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}, {"static": True}])
def test_other_ways_to_the_greedy_tokens(options, model_of) -> None:
    model, ids = model_of(), torch.tensor([encode("the nurse counts the nurse counts the nurse")])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    if "assistant_model" in options:
        options = {"assistant_model": model_of(layer="final_norm")}
    if "static" in options:
        options = {"cache_implementation": "static"}
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, **options), expected)


def test_positions_that_are_kept_have_the_trust_of_all_before(model_of) -> None:
    model, ids = model_of(), torch.tensor([encode(PROMPTS[0]), encode(FOREIGN)[: len(encode(PROMPTS[0]))]])
    everywhere = model(ids).logits
    for keep in (1, 3, torch.tensor([4, 0])):
        found = model(ids, logits_to_keep=keep).logits
        expected = everywhere[:, -keep:] if isinstance(keep, int) else everywhere[:, keep]
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_a_prompt_is_searched_for_once_and_each_new_token_once(model_of) -> None:
    model, tokens = model_of(), encode(PROMPTS[0])
    for cache in (True, False):
        counting = count_queries(model)
        model.generate(torch.tensor([tokens]), max_new_tokens=5, do_sample=False, use_cache=cache)
        assert counting.queries == len(tokens) + 4


def test_what_is_no_longer_remembered_is_read_again(model_of, monkeypatch) -> None:
    model, batch = model_of(), padded([encode(prompt) for prompt in PROMPTS], "left")
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)
    monkeypatch.setattr("knnlm.inference.by_text._HELD", 0)
    with pytest.raises(AssertionError, match="just read"):  # nothing at all can be held
        model.generate(**batch, max_new_tokens=6, do_sample=False)
    monkeypatch.setattr("knnlm.inference.by_text._HELD", 1)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), expected)


def test_what_is_remembered_does_not_keep_a_datastore_that_is_no_longer_served() -> None:
    texts_read, tokens, places = TextMemory(None), np.arange(4), np.arange(4)
    first = Retrieval(searcher(np.random.default_rng(0), 4, 50, 1.0), SETTING)
    same, plan = replace(first), RowPlan(tokens, first, 0.5, places, places, places)
    vectors, plain_NV = torch.arange(4.0)[:, None], log_softmax(torch.randn(4, 50))
    texts_read.mix_in(plain_NV, [plan], vectors, np.full(4, -3.0))
    assert texts_read._known(tokens, first) is texts_read._known(tokens, same) is not None
    old = weakref.ref(first)
    del first, plan
    gc.collect()
    assert old() is None and texts_read._known(tokens, same) is None


class Widest:
    """A searcher that remembers how many queries it was asked for at once."""

    def __init__(self, inner) -> None:
        self.inner, self.most = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def neighbors(self, vectors_QD, k):
        self.most = max(self.most, len(vectors_QD))
        return self.inner.neighbors(vectors_QD, k)


def test_places_of_long_texts_are_searched_for_in_blocks(model_of, stores, monkeypatch) -> None:  # noqa: F811
    """Those of rows of different lengths too, and wherever a block ends: what is found does not depend on it."""
    rows = [encode(" ".join(PROMPTS)), encode(PROMPTS[0] + FOREIGN)]
    lm, _ = stores("llama")

    def found() -> tuple[int, list[np.ndarray]]:
        model = model_of()
        widest = Widest(model.retrieval.searcher)
        model.retrieval = replace(model.retrieval, searcher=widest)
        batch, explainer = padded(rows, "left"), Explainer(lm, model.retrieval)
        logits = [model(**batch).logits[at, -len(row) :].numpy() for at, row in enumerate(rows)]
        new = model.generate(**batch, max_new_tokens=4, do_sample=False)
        cited = model.citer.tokens(rows[0], 25, model.retrieval)
        told = explainer.explain(lm.decode(rows[0])).tokens
        going = explainer.go_on(rows[0], SETTING)
        steps = [going.step().token for _ in range(3)]
        figures = [[one.gain for one in cited.whole.documents], [one.log_prob for one in cited.tokens]]
        figures += [[one.trust for one in told], [one.mixed_probability for one in told], steps]
        return widest.most, [*logits, new.numpy(), *map(np.array, figures)]

    most, whole = found()
    assert most > len(rows[0])
    for module in ("knnlm.inference.by_text", "knnlm.knn.citing", "knnlm.knn.retrieval"):
        monkeypatch.setattr(f"{module}.QUERY_BLOCK", 7)
    most, in_blocks = found()
    assert most == 7
    for one, other in zip(whole, in_blocks, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5, rtol=1e-4)


def test_a_cache_of_ones_own_needs_the_text(model_of) -> None:
    model, tokens = model_of(), encode(PROMPTS[0])
    ids, mask = torch.tensor([tokens]), torch.ones((1, len(tokens)))
    first = model(ids[:, :5], use_cache=True)
    with pytest.raises(InputError, match="but 1 of its 6 tokens are known; give whole rows"):
        model(ids[:, 5:6], past_key_values=first.past_key_values, use_cache=True)
    found = model(
        ids[:, 5:], past_key_values=model(ids[:, :5]).past_key_values, use_cache=True, text_so_far=(ids, mask)
    ).logits
    torch.testing.assert_close(found[0], forced(model, tokens)[5:], **TOLERANCE)
    with pytest.raises(InputError, match="but 0 of its"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(InputError, match="give whole rows of tokens"):
        model.generate(ids, max_new_tokens=2, prefill_chunk_size=4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rows_of_the_server_equal_single_texts(kind, model_of, monkeypatch) -> None:
    """Rows with settings of their own join and leave; prompts that are scored are read in pieces."""
    model = model_of(kind)
    settings = (SETTING, replace(SETTING, by_text=False), replace(SETTING, lam=0.9), Mix(16, 2.0, 0.0, BOLD, True))
    prompts = [encode(prompt) for prompt in (PROMPTS[0], PROMPTS[2], FOREIGN, PROMPTS[1])]
    monkeypatch.setattr("knnlm.inference.batch._PROMPT_SCORES", 7 * 2 * VOCABULARY)
    rows, heard = RowModel(model, VOCABULARY), []
    own = [replace(model.retrieval, setting=setting) for setting in settings]
    batch, first = rows.prefill(prompts[:2], own[:2], lambda start, part: heard.append(part))
    other, second = rows.prefill(prompts[2:], own[2:])
    texts_so_far, steps = [list(prompt) for prompt in prompts], [torch.cat([first, second])]
    batch.join(other)
    for new in ([5, 90, 40, 41], [60, 61, 5, 80]):
        for tokens, token in zip(texts_so_far, new, strict=True):
            tokens.append(token)
        steps.append(batch.step(new))
    batch.select([3, 0, 2])
    for row, token in zip((3, 0, 2), (9, 8, 7), strict=True):
        texts_so_far[row].append(token)
    steps.append(batch.step([9, 8, 7])[[1, 1, 2, 0]])
    for row, tokens in enumerate(texts_so_far):
        single = model_of(kind)
        single.retrieval = replace(single.retrieval, setting=settings[row])
        expected = forced(single, tokens)[len(prompts[row]) - 1 :]
        found = torch.stack([step[row] for step in steps])[: len(expected)]
        torch.testing.assert_close(found, expected, **TOLERANCE)
    width = max(map(len, prompts[:2]))
    scored = torch.cat(heard, 1)[:, :width]
    for row, tokens in enumerate(prompts[:2]):
        single = model_of(kind)
        single.retrieval = replace(single.retrieval, setting=settings[row])
        torch.testing.assert_close(scored[row, width - len(tokens) :], forced(single, tokens), **TOLERANCE)

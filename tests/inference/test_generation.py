"""`KNNLM` in every way that `generate()` has, against teacher forcing, a float64 brute force, and the evaluation.

Settings are such that the neighbours change the distribution by several nats, and the last of them weigh nothing: a
rounding that swaps the k-th neighbour changes no number here.
"""

from __future__ import annotations

import copy
import inspect
import math
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Thread
from time import sleep

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, pipeline

from index.neighbors import absent
from knnlm import KNNLM
from knnlm.config import KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.errors import DatastoreMismatch, InputError, ModelError
from knnlm.evaluation.outcomes import evaluate_layers
from knnlm.evaluation.queries import open_queries
from knnlm.knn.mixing import Gate, Mix
from knnlm.knn.retrieval import open_retrieval
from knnlm.model.head import log_softmax
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.pipeline import build, run
from knnlm.store.datastore import Datastore
from knnlm.text.windows import TokenDocument, WindowConfig
from tests import oracle
from tests.damage import rewrite
from tests.evaluation.test_evaluate_oracle import MODULES, texts, write_jsonl
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

K, TEMPERATURE, LAMBDA = 64, 4.0, 0.6
CONTEXT, STRIDE = 32, 16
# Learned positions, rotary ones, parallel blocks (Falcon adds in place), none (BLOOM), experts on [B·T, D].
KINDS = ("gpt2", "llama", "falcon", "bloom", "mixtral")
LAYERS = ("1.ffn_output", "2.ffn_input", "final_norm")
PROMPTS = ("the nurse counts a pulse and", "each patient", "borrows one reference before Holmes ends")
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
NO_GATE = Gate(0.0, 0.0, 0.0)
# Under which lambda goes from 0.3 to 0.86 on the texts below, in Llama.
GATE = Gate(offset=3.0, distance=-0.5, different=-0.9)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A model and a datastore of its keys, float32, for each kind."""
    folder = tmp_path_factory.mktemp("stores")
    text = write_jsonl(folder / "text.jsonl", texts(0, 6))

    @lru_cache
    def make(kind: str) -> tuple[LanguageModel, Datastore]:
        lm = LanguageModel.from_model(tiny_model(kind), tiny_tokenizer(), name=kind)
        settings = Settings(
            text=TextConfig(context=CONTEXT, stride=STRIDE),
            layers=LayerConfig(layers=",".join(LAYERS)),
            knn=KNNConfig(max_k=K),
            key_dtype="float32",
        )
        return lm, build(lm, [text], folder / kind, eval_text=[text], settings=settings)

    return make


@pytest.fixture
def knn_of(stores):
    """A KNNLM of a kind, which never ends by itself."""

    def make(kind: str = "gpt2", layer: str = "2.ffn_input", lam: float = LAMBDA, gate: Gate | None = None) -> KNNLM:
        lm, store = stores(kind)
        model = KNNLM.from_store(store, layer, K, TEMPERATURE, lam, lm=lm)
        model.retrieval = replace(model.retrieval, setting=replace(model.retrieval.setting, gate=gate))
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        return model

    return make


@dataclass(eq=False)
class Counting:
    """A searcher that counts its queries."""

    inner: object
    queries: int = 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def neighbors(self, vectors_QD, k):
        self.queries += len(vectors_QD)
        return self.inner.neighbors(vectors_QD, k)


def count_queries(model: KNNLM) -> Counting:
    counting = Counting(model.retrieval.searcher)
    model.retrieval = replace(model.retrieval, searcher=counting)
    return counting


def encode(prompt: str) -> list[int]:
    return tiny_tokenizer()(prompt)["input_ids"]


def padded(rows: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
    """A batch with its mask; the padding is token 7."""
    width = max(len(row) for row in rows)
    left = side == "left"
    ids = [[7] * (width - len(row)) * left + list(row) + [7] * (width - len(row)) * (not left) for row in rows]
    mask = [[0] * (width - len(row)) * left + [1] * len(row) + [0] * (width - len(row)) * (not left) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def with_positions(model: KNNLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """As generate() numbers them: from the first token that is not padding."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return batch
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def forced(model: KNNLM, tokens: Sequence[int]) -> Tensor:
    """Teacher forcing: one row, no padding, no cache; log p of every token at every position, [T, V]."""
    return model(torch.tensor([list(tokens)]), use_cache=False).logits[0]


# The distribution itself


@lru_cache(maxsize=4)
def stored(lm: LanguageModel, path: str, take: str) -> oracle.Pass:
    """Raw keys of the text of `stores`, and their targets."""
    documents = [encode(text) for text in texts(0, 6)]
    return oracle.run_documents(lm.model, lm.model.get_submodule(path), take, documents, CONTEXT, STRIDE)


def brute_force(lm, kind: str, layer: str, tokens: list[int], gate: Gate = NO_GATE) -> np.ndarray:
    """log p over the vocabulary at each position, all in float64, from raw keys."""
    path, take = MODULES[kind][layer]
    store = stored(lm, path, take)
    hidden, logits = oracle.forward(lm.model, lm.model.get_submodule(path), take, tokens)
    plain = np.exp(logits - logits.max(1, keepdims=True))
    plain /= plain.sum(1, keepdims=True)
    knn = np.zeros_like(plain)
    nearest_distances: list[float] = []
    different: list[int] = []
    for position, query in enumerate(hidden):
        distances = ((store.keys - query) ** 2).sum(1)
        nearest = np.argsort(distances, kind="stable")[:K]
        weights = np.exp(-(distances[nearest] - distances[nearest[0]]) / TEMPERATURE)
        np.add.at(knn[position], store.targets[nearest], weights / weights.sum())
        nearest_distances.append(distances[nearest[0]])
        different.append(len(set(store.targets[nearest[:8]].tolist())))
    logits = math.log(LAMBDA / (1 - LAMBDA)) + gate.offset + gate.distance * np.sqrt(nearest_distances)
    lambdas = 1 / (1 + np.exp(-(logits + gate.different * np.log(different))))[:, None]
    return np.log(lambdas * knn + (1 - lambdas) * plain)


@pytest.mark.parametrize(("kind", "layer"), [("gpt2", "2.ffn_input"), ("gpt2", "final_norm"), ("llama", "2.ffn_input")])
def test_every_position_equals_float64_brute_force(kind, layer, stores, knn_of) -> None:
    tokens = encode(texts(1, 1)[0])[:CONTEXT]
    found = forced(knn_of(kind, layer), tokens)
    expected = brute_force(stores(kind)[0], kind, layer, tokens)
    np.testing.assert_allclose(found.double().numpy(), expected, **TOLERANCE)
    plain = torch.log_softmax(stores(kind)[0].model(torch.tensor([tokens])).logits[0], -1)
    assert (found - plain).abs().max() > 3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lambda_by_query_equals_float64_brute_force(kind, stores, knn_of) -> None:
    tokens = encode(texts(1, 1)[0])[:CONTEXT]
    found = forced(knn_of(kind, gate=GATE), tokens)
    expected = brute_force(stores(kind)[0], kind, "2.ffn_input", tokens, GATE)
    np.testing.assert_allclose(found.double().numpy(), expected, **TOLERANCE)
    assert (found.double().exp().sum(-1) - 1).abs().max() < 1e-6
    assert (found - forced(knn_of(kind), tokens)).abs().max() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_equals_the_evaluation(kind, stores, knn_of) -> None:
    lm, store = stores(kind)
    documents = [TokenDocument(lm.encode(text)[: CONTEXT + 1], "held out", i) for i, text in enumerate(texts(1, 4))]
    knn = KNNConfig(k=K, temperature=TEMPERATURE, lam=LAMBDA)
    with open_queries(lm, documents, WindowConfig(CONTEXT, STRIDE), LAYERS, fitted=False) as queries:
        outcomes = list(evaluate_layers(store, queries, LAYERS, knn))
    assert [one.layer for one in outcomes] == list(LAYERS)
    for one in outcomes:
        model = knn_of(kind, one.layer)
        tokens = [torch.tensor(document.tokens.tolist()) for document in documents]
        losses = [-forced(model, row[:-1]).gather(1, row[1:, None])[:, 0] for row in tokens]
        np.testing.assert_allclose(torch.cat(losses).numpy(), one.losses_Q, **TOLERANCE)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_distribution_sums_to_one(kind, lam, knn_of) -> None:
    model = knn_of(kind, lam=lam)
    batch = padded([encode(prompt) for prompt in PROMPTS], "right")
    sums = model(**batch).logits.double().exp().sum(-1)
    assert sums.shape == batch["input_ids"].shape
    assert (sums - 1).abs().max() < 1e-6


def test_position_without_neighbours_keeps_the_plain_distribution(stores, knn_of) -> None:
    model = knn_of()

    class Empty(Counting):
        def neighbors(self, vectors_QD, k):
            return absent(len(vectors_QD), k)

    model.retrieval = replace(model.retrieval, searcher=Empty(model.retrieval.searcher))
    ids = torch.tensor([encode(PROMPTS[0])])
    assert torch.equal(model(ids).logits, log_softmax(stores("gpt2")[0].model(ids).logits[0])[None])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_and_keeps_the_plain_distribution(kind, side, stores, knn_of) -> None:
    model, rows = knn_of(kind), [encode(prompt) for prompt in PROMPTS]
    counting = count_queries(model)
    batch = with_positions(model, padded(rows, side))
    found, real = model(**batch).logits, batch["attention_mask"].bool()
    assert counting.queries == sum(map(len, rows))
    for row, tokens in enumerate(rows):
        torch.testing.assert_close(found[row, real[row]], forced(model, tokens), **TOLERANCE)
    plain = log_softmax(stores(kind)[0].model(**batch).logits.flatten(0, 1)).view(found.shape)
    assert torch.equal(found[~real], plain[~real])


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_by_query_of_the_evaluation_is_that_of_every_position(kind, stores, knn_of) -> None:
    """Fitted by the evaluation, with k and T fitted too; the reporting part is teacher-forced."""
    lm, store = stores(kind)
    documents = [TokenDocument(lm.encode(text)[: CONTEXT + 1], "held out", i) for i, text in enumerate(texts(1, 16))]
    with open_queries(lm, documents, WindowConfig(CONTEXT, STRIDE), LAYERS[1:2]) as queries:
        (one,) = evaluate_layers(store, queries, LAYERS[1:2], KNNConfig(max_k=K))
        reporting = queries.parts.reporting_Q
    model = knn_of(kind)
    model.retrieval = replace(model.retrieval, setting=one.mix)
    losses = []
    for document in documents:
        row = torch.tensor(document.tokens.tolist())
        losses.append(-forced(model, row[:-1]).gather(1, row[1:, None])[:, 0])
    assert one.mix.gate is not None
    np.testing.assert_allclose(torch.cat(losses).numpy()[reporting], one.gated_losses_R, **TOLERANCE)


# Step by step


@pytest.mark.parametrize(("cache", "gate"), [(True, None), (False, None), (True, GATE)])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_generate_equal_teacher_forcing(kind, layer, cache, gate, knn_of) -> None:
    model, rows = knn_of(kind, layer, gate=gate), [encode(prompt) for prompt in PROMPTS]
    batch = padded(rows, "left")
    done = model.generate(
        **batch,
        max_new_tokens=7,
        do_sample=True,
        top_k=0,
        use_cache=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    steps = torch.stack(done.logits, 1)
    assert steps.shape[:2] == (3, 7)
    for row, tokens in enumerate(rows):
        new = done.sequences[row, batch["input_ids"].shape[1] :].tolist()
        expected = forced(model, tokens + new)[len(tokens) - 1 : -1]
        torch.testing.assert_close(steps[row], expected, **TOLERANCE)


def test_static_cache_and_embeddings_give_the_same_steps(knn_of) -> None:
    model, tokens = knn_of("llama"), encode(PROMPTS[0])
    ids = torch.tensor([tokens])
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), expected)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, **options), expected[:, len(tokens) :])


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_takes_the_likeliest_token_each_time(kind, knn_of) -> None:
    model, rows = knn_of(kind), [encode(prompt) for prompt in PROMPTS]
    found = model.generate(**padded(rows, "left"), max_new_tokens=6, do_sample=False)
    for row, tokens in enumerate(rows):
        for _ in range(6):
            tokens = [*tokens, int(forced(model, tokens)[-1].argmax())]
        assert found[row, -len(tokens) :].tolist() == tokens


def beam_search(model: KNNLM, tokens: list[int], beams: int, steps: int) -> list[tuple[float, list[int]]]:
    """The usual beam search without an end token, every hypothesis computed from its first token on."""
    kept: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(steps):
        longer = []
        for score, new in kept:
            log_probs = forced(model, tokens + new)[-1].double()
            longer += [(score + float(log_probs[token]), [*new, token]) for token in range(len(log_probs))]
        kept = sorted(longer, reverse=True)[:beams]
    return kept


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_equals_a_search_by_teacher_forcing(kind, cache, knn_of) -> None:
    """Beams change places, so a cache or neighbours that do not follow them give other scores."""
    model, rows = knn_of(kind), [encode(prompt) for prompt in PROMPTS[:2]]
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
        found = done.sequences.view(2, 3, -1)[row, :, -5:].tolist()
        assert found == [new for _, new in expected]
        scores = done.sequences_scores.view(2, 3)[row].tolist()
        assert scores == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}])
def test_assisted_decoding_gives_the_greedy_tokens(options, stores, knn_of) -> None:
    model, ids = knn_of(), torch.tensor([encode("the nurse counts the nurse counts the nurse")])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    if "assistant_model" in options:
        options = {"assistant_model": knn_of(layer="final_norm")}
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, **options), expected)


def test_streamed_text_is_the_generated_text(knn_of) -> None:
    model, ids = knn_of(), torch.tensor([encode(PROMPTS[0])])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True)
    thread = Thread(target=model.generate, args=(ids,), kwargs={"max_new_tokens": 12, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == model.tokenizer.decode(expected)


# lambda = 0: the plain model


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_zero_is_the_plain_model_and_searches_nothing(kind, stores, knn_of) -> None:
    lm, model = stores(kind)[0], knn_of(kind, lam=0.0)
    counting = count_queries(model)
    batch = padded([encode(prompt) for prompt in PROMPTS], "left")
    plain, found = lm.model(**batch).logits, model(**batch).logits
    assert torch.equal(found, log_softmax(plain.flatten(0, 1)).view(found.shape))
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 0}, {"do_sample": False, "num_beams": 3}):
        torch.manual_seed(1)
        expected = lm.model.generate(**batch, max_new_tokens=6, pad_token_id=0, eos_token_id=None, **options)
        torch.manual_seed(1)
        assert torch.equal(model.generate(**batch, max_new_tokens=6, **options), expected)
    assert counting.queries == 0


# What is searched for


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([4, 0])])
def test_only_positions_that_are_kept_are_searched_for(layer, keep, knn_of) -> None:
    model, ids = knn_of("llama", layer), torch.tensor([encode(PROMPTS[0]), encode(PROMPTS[0])[::-1]])
    everywhere = model(ids).logits
    counting = count_queries(model)
    found = model(ids, logits_to_keep=keep).logits
    expected = everywhere[:, -keep:] if isinstance(keep, int) else everywhere[:, keep]
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert counting.queries == found.shape[0] * found.shape[1]


def test_positions_that_differ_from_row_to_row_are_refused(knn_of) -> None:
    with pytest.raises(InputError, match=r"logits_to_keep has the shape \(2, 1\); give a number"):
        knn_of()(torch.tensor([[1, 2], [3, 4]]), logits_to_keep=torch.tensor([[0], [1]]))


@pytest.mark.parametrize("do_sample", [False, True])
def test_finished_rows_are_not_searched_for(do_sample, knn_of) -> None:
    model, rows = knn_of(), [encode(prompt) for prompt in PROMPTS]
    options = {"max_new_tokens": 9, "do_sample": do_sample, "top_k": 0}
    batch = padded(rows, "left")
    torch.manual_seed(0)
    free = model.generate(**batch, **options)[:, -9:].tolist()
    end = next(token for row in free for token in row if len({(*other, token).index(token) for other in free}) > 1)
    torch.manual_seed(0)
    counting = count_queries(model)
    found = model.generate(**batch, **options, eos_token_id=end)[:, batch["input_ids"].shape[1] :].tolist()
    lengths = [row.index(end) + 1 if end in row else len(row) for row in found]
    assert min(lengths) < max(lengths)
    assert counting.queries == sum(lengths)
    if not do_sample:
        alone = [model.generate(torch.tensor([row]), **options, eos_token_id=end)[0, len(row) :] for row in rows]
        assert [row[:length] for row, length in zip(found, lengths, strict=True)] == [row.tolist() for row in alone]


class StopRow(StoppingCriteria):
    """Stops one row after a number of tokens."""

    def __init__(self, row: int, length: int) -> None:
        self.row, self.length = row, length

    def __call__(self, input_ids, scores, **kwargs):
        return (torch.arange(len(input_ids)) == self.row) & (input_ids.shape[1] >= self.length)


def test_rows_that_a_criterion_of_ones_own_stops(knn_of) -> None:
    """With an end token they are filled with padding; without one transformers goes on with them, and so do we."""
    model = knn_of()
    batch = padded([encode(prompt) for prompt in PROMPTS], "left")
    width = batch["input_ids"].shape[1]
    options = {"max_new_tokens": 6, "do_sample": False}
    free = model.generate(**batch, **options)
    counting = count_queries(model)
    stop = StoppingCriteriaList([StopRow(2, width + 2)])
    assert torch.equal(model.generate(**batch, **options, stopping_criteria=stop), free)
    assert counting.queries == 3 * 6
    counting.queries = 0
    unused = next(token for token in range(288) if token not in free)
    ended = model.generate(**batch, **options, stopping_criteria=stop, eos_token_id=unused)
    assert torch.equal(ended[:2], free[:2]) and ended[2, width + 2 :].tolist() == [0] * 4
    assert counting.queries == 2 * 6 + 2


def test_a_forward_after_generate_searches_for_all_rows(knn_of) -> None:
    model, ids = knn_of(), torch.tensor([encode(PROMPTS[0])])
    expected = model(ids).logits
    end = int(model.generate(ids, max_new_tokens=1)[0, -1])
    model.generate(ids, max_new_tokens=4, eos_token_id=end)
    assert torch.equal(model(ids).logits, expected)


# As a model of transformers


def test_labels_give_the_loss_of_the_mixed_distribution(knn_of) -> None:
    model, tokens = knn_of(), encode(PROMPTS[2])
    log_probs = forced(model, tokens)
    labels = [-100, -100, *tokens[2:]]
    expected = -float(np.mean([log_probs[at - 1, tokens[at]].item() for at in range(2, len(tokens))]))
    output = model(torch.tensor([tokens]), labels=torch.tensor([labels]))
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    loss, logits, *_ = model(torch.tensor([tokens]), labels=torch.tensor([labels]), return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)


def test_output_holds_what_the_plain_model_gives_beside_logits(stores, knn_of) -> None:
    model, ids = knn_of(), torch.tensor([encode(PROMPTS[0])])
    options = {"output_hidden_states": True, "use_cache": True}
    found, plain = model(ids, **options), stores("gpt2")[0].model(ids, **options)
    assert type(found) is type(plain) and list(found) == list(plain)
    assert all(torch.equal(*pair) for pair in zip(found.hidden_states, plain.hidden_states, strict=True))
    assert found.past_key_values.get_seq_length() == ids.shape[1]


def test_class_and_signature_are_those_that_transformers_looks_at(stores, knn_of) -> None:
    plain, model = stores("gpt2")[0].model, knn_of()
    assert isinstance(model, KNNLM) and isinstance(model, type(plain))
    assert type(model).__name__ == type(plain).__name__
    assert type(model) is type(knn_of(layer="final_norm"))
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)


def hooks_of(model: torch.nn.Module) -> int:
    """transformers leaves some of its own, for hidden states, with the first forward pass."""
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def test_hooks_vanish_when_something_fails(knn_of) -> None:
    model, ids = knn_of(), torch.tensor([encode(PROMPTS[0])])
    expected, before = model(ids).logits, hooks_of(model)
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    assert hooks_of(model) == before
    working = model.retrieval

    class Failing(Counting):
        def neighbors(self, vectors_QD, k):
            raise OSError("the disk is gone")

    model.retrieval = replace(working, searcher=Failing(working.searcher))
    with pytest.raises(OSError, match="the disk is gone"):
        model(ids)
    assert hooks_of(model) == before
    model.retrieval = working
    assert torch.equal(model(ids).logits, expected)


def state(model: torch.nn.Module) -> dict[str, object]:
    """All that the modules hold, as far as it can be compared."""
    return {
        f"{name}.{key}": (id(value), list(value) if isinstance(value, dict) else str(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def test_the_given_model_is_never_changed_not_even_for_a_while(stores, knn_of) -> None:
    plain = stores("gpt2")[0].model
    ids = torch.tensor([encode(PROMPTS[0])])
    plain(ids)
    before, hooks, kind = state(plain), hooks_of(plain), type(plain)
    model = knn_of()
    during = []
    model.transformer.ln_f.register_forward_hook(lambda *_: during.append(hooks_of(plain) - hooks))
    model.generate(ids, max_new_tokens=3)
    assert during == [0, 0, 0]
    assert state(plain) == before and type(plain) is kind
    assert [one.data_ptr() for one in model.parameters()] == [one.data_ptr() for one in plain.parameters()]


def test_a_forward_of_the_object_is_kept(stores, knn_of) -> None:
    """accelerate puts one there that moves tensors between devices; it would hide the forward of the class."""
    tokens, plain, calls = encode(PROMPTS[0]), tiny_model("gpt2"), []

    class Telling(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    add_hook_to_module(plain, Telling())
    lm = LanguageModel.from_model(plain, tiny_tokenizer(), name="gpt2")
    model = KNNLM.from_store(stores("gpt2")[1], "2.ffn_input", K, TEMPERATURE, LAMBDA, lm=lm)
    calls.clear()
    assert torch.equal(forced(model, tokens), forced(knn_of(), tokens))
    assert calls == [model]


def test_a_wrapper_is_refused(stores) -> None:
    """generate() of peft's class calls the model inside: it gave the plain model's tokens."""
    inside = tiny_model("llama")
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft reads what transformers is about to rename
        wrapped = get_peft_model(inside, adapter)
    lm = LanguageModel.from_model(wrapped, tiny_tokenizer(), name="llama")
    retrieval = open_retrieval(stores("llama")[1], "final_norm", 4, 1.0, 0.5)
    with pytest.raises(ModelError, match="PeftModelForCausalLM does not generate itself"):
        KNNLM.from_retrieval(lm, retrieval)


def test_threads_do_not_take_each_others_vectors(knn_of) -> None:
    model, rows = knn_of(), [encode(prompt) for prompt in PROMPTS]
    expected = [forced(model, row) for row in rows]
    # Others run between the layer that is searched and the end of the pass.
    model.transformer.ln_f.register_forward_hook(lambda *_: sleep(0.01))
    found: list[list[Tensor]] = [[], [], []]

    def repeat(row: int) -> None:
        for _ in range(5):
            found[row].append(forced(model, rows[row]))

    threads = [Thread(target=repeat, args=(row,)) for row in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(each) == 5 for each in found)
    assert all(torch.equal(one, expected[row]) for row in range(3) for one in found[row])


# From a datastore


def test_what_is_not_given_is_what_the_evaluation_fitted(tmp_path: Path) -> None:
    model_folder = save_tiny("gpt2", tmp_path / "model")
    text = write_jsonl(tmp_path / "text.jsonl", texts(0, 12))
    settings = Settings(
        text=TextConfig(context=CONTEXT), layers=LayerConfig(layers="*.ffn_input"), knn=KNNConfig(metric="cosine")
    )
    result = run(load_model(model_folder), [text], tmp_path / "out", settings=settings)
    chosen = next(one for one in result.layers if one.layer == result.selected)
    model = KNNLM.from_store(tmp_path / "out")
    retrieval = model.retrieval
    assert (retrieval.layer, retrieval.searcher.metric) == (chosen.layer, "cosine")
    assert (retrieval.setting.k, retrieval.setting.temperature) == (chosen.k, chosen.temperature)
    assert chosen.by_query is not None
    moved = (chosen.by_query.offset, chosen.by_query.distance, chosen.by_query.different)
    assert (retrieval.setting.lam, retrieval.setting.gate) == (chosen.lam, Gate(*moved))
    other = KNNLM.from_store(str(tmp_path / "out"), "0.ffn_input", 5, lam=0.25).retrieval
    fitted = next(one for one in result.layers if one.layer == "0.ffn_input")
    assert (other.layer, other.setting.k, other.setting.lam) == ("0.ffn_input", 5, 0.25)
    assert other.setting.gate is None
    assert (other.setting.temperature, other.searcher.metric) == (fitted.temperature, "cosine")


def test_datastores_of_before_there_were_gates_have_the_fixed_lambda(stores, tmp_path: Path) -> None:
    lm, store = stores("gpt2")
    shutil.copytree(store.folder, tmp_path / "older")
    older = Datastore.open(tmp_path / "older")
    older.update_manifest(fitted={"final_norm": {"k": 8, "lambda": 0.5, "temperature": 4.0}})
    assert KNNLM.from_store(older, "final_norm", lm=lm).retrieval.setting == Mix(8, 4.0, 0.5)


def test_nothing_fitted_is_told_with_what_is_missing(stores, tmp_path: Path) -> None:
    lm, store = stores("gpt2")
    copy = Path(shutil.copytree(store.folder, tmp_path / "copy"))
    rewrite(copy / "datastore.json", lambda one: one.update(fitted=None))
    with pytest.raises(InputError, match=r"nothing was fitted for .*; give `k`, `lam` \(`knnlm.evaluate` fits them\)"):
        KNNLM.from_store(copy, "final_norm", temperature=1.0, lm=lm)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 10**9}, "`k` is 1000000000, but the datastore has only"),
        ({"k": 0}, "k"),
        ({"lam": 1.5}, "`lam` is 1.5"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_values_that_cannot_be_are_refused(given, message, stores) -> None:
    lm, store = stores("gpt2")
    with pytest.raises(InputError, match=message):
        KNNLM.from_store(store, "final_norm", **{"k": 4, "temperature": 1.0, "lam": 0.5, **given}, lm=lm)


def test_other_models_and_layers_are_refused(stores) -> None:
    (_, store), (other, _) = stores("gpt2"), stores("llama")
    with pytest.raises(DatastoreMismatch, match="was made with another model"):
        KNNLM.from_store(store, "final_norm", 4, 1.0, 0.5, lm=other)
    with pytest.raises(DatastoreMismatch, match=r"has no keys of layer 0\.ffn_input; it has"):
        KNNLM.from_store(store, "0.ffn_input", 4, 1.0, 0.5, lm=other)


def test_pipeline_takes_messages(knn_of) -> None:
    model = knn_of("gpt2")
    template = "{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}<assistant>"
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    said = chat([{"role": "user", "content": "the nurse"}], max_new_tokens=6, do_sample=False)[0]["generated_text"]
    ids = tokenizer("<user>the nurse<assistant>", return_tensors="pt", add_special_tokens=False)["input_ids"]
    due = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert said[-1] == {"role": "assistant", "content": tokenizer.decode(due, skip_special_tokens=True)}

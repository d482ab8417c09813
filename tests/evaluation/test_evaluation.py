"""Which tokens fit and which are scored: the roles of the two parts, which a swap would turn into flattery."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from knnlm.config import KNNConfig
from knnlm.errors import InputError
from knnlm.evaluation.outcomes import LayerOutcome, outcome
from knnlm.evaluation.parts import Parts
from knnlm.evaluation.queries import check_evaluation
from knnlm.evaluation.summary import regret, summarize
from knnlm.knn.fitting import fit, fit_gate
from knnlm.knn.mixing import Mix, Search, knn_log_probs, mix
from knnlm.knn.trust import log_probs_by_text
from knnlm.results import EvalResult
from knnlm.text.sizes import Sizes
from knnlm.text.windows import TokenDocument
from tests.sample_results import sample_scores

TOKENS = 400
TUNING = np.arange(TOKENS) % 2 == 0
DOCUMENTS = np.arange(TOKENS) // 100
PARTS = Parts(TUNING, ~TUNING, ~TUNING, np.arange(TOKENS) // 20, True)


def make_search(hit_share: np.ndarray, seed: int = 0) -> Search:
    rng = np.random.default_rng(seed)
    distances = np.sort(rng.gamma(2.0, 10.0, (TOKENS, 16)), axis=1).astype(np.float32)
    hits = rng.random((TOKENS, 16)) < hit_share[:, None]
    return Search(distances, hits, np.where(hits, 1, rng.integers(2, 50, hits.shape))[:, :8])


def losses(search: Search, lm: np.ndarray, setting: Mix) -> np.ndarray:
    return -mix(lm, knn_log_probs(search, setting.k, setting.temperature), setting.lam)


def test_each_part_is_scored_with_what_the_other_was_fitted_on() -> None:
    """Neighbours are right far more often on one part, so the two fits differ and a swap shows."""
    search = make_search(np.where(TUNING, 0.6, 0.05))
    lm = np.log(np.random.default_rng(1).uniform(0.01, 0.5, TOKENS))
    queries = SimpleNamespace(parts=PARTS, lm_Q=lm, documents_Q=DOCUMENTS)
    found = outcome("layer", search, queries, KNNConfig())  # type: ignore[arg-type]
    mine, swapped = fit(search.rows(TUNING), lm[TUNING]), fit(search.rows(~TUNING), lm[~TUNING])
    assert mine.lam > swapped.lam + 0.2
    gated = replace(fit_gate(search.rows(TUNING), lm[TUNING], mine), by_text=True)
    assert found.mix == gated
    # The trust at a token is of all tokens before, those of the tuning part too.
    expected = -log_probs_by_text(search, lm, gated, DOCUMENTS)[~TUNING]
    np.testing.assert_array_equal(found.gated_losses_R, expected)
    assert not np.allclose(expected, -log_probs_by_text(search, lm, replace(gated, by_text=False), DOCUMENTS)[~TUNING])
    assert found.losses_Q[~TUNING] == pytest.approx(losses(search, lm, mine)[~TUNING])
    assert found.losses_Q[TUNING] == pytest.approx(losses(search, lm, swapped)[TUNING])
    assert found.tuning_loss == pytest.approx(losses(search, lm, mine)[TUNING].mean())
    assert found.swapped_loss == pytest.approx(losses(search, lm, swapped)[~TUNING].mean())


def test_what_is_reported_cannot_move_what_was_fitted() -> None:
    lm = np.log(np.random.default_rng(1).uniform(0.01, 0.5, TOKENS))
    search = make_search(np.full(TOKENS, 0.3))
    changed = replace(search, hits_QK=np.where(TUNING[:, None], search.hits_QK, ~search.hits_QK))
    queries = SimpleNamespace(parts=PARTS, lm_Q=lm, documents_Q=DOCUMENTS)
    first, second = (outcome("layer", one, queries, KNNConfig()) for one in (search, changed))  # type: ignore[arg-type]
    assert first.mix == second.mix
    assert first.tuning_loss == second.tuning_loss
    assert not np.allclose(first.losses_Q, second.losses_Q)


def test_given_lambda_is_the_same_for_all_queries() -> None:
    search, lm = make_search(np.full(TOKENS, 0.3)), np.full(TOKENS, -3.0)
    queries = SimpleNamespace(parts=PARTS, lm_Q=lm, documents_Q=DOCUMENTS)
    found = outcome("layer", search, queries, KNNConfig(lam=0.3))  # type: ignore[arg-type]
    assert (found.mix.lam, found.mix.gate, found.gated_losses_R) == (0.3, None, None)


def hand_made(layer: str, on_tuning: float, on_rest: float, tuning_loss: float, swapped_loss: float) -> LayerOutcome:
    cross_fitted = np.where(TUNING, on_tuning, on_rest)
    return LayerOutcome(layer, Mix(1, 1.0, 0.5), cross_fitted, tuning_loss, swapped_loss, ())


def test_regret_compares_the_best_of_one_part_on_the_other() -> None:
    """`a` is picked on the tuning part, so its losses elsewhere count; `b` on the other, so its tuning losses do."""
    a = hand_made("a", on_tuning=2.0, on_rest=3.0, tuning_loss=1.0, swapped_loss=9.0)
    b = hand_made("b", on_tuning=5.0, on_rest=7.0, tuning_loss=9.0, swapped_loss=1.0)
    chosen = hand_made("chosen", on_tuning=5.5, on_rest=4.0, tuning_loss=5.0, swapped_loss=5.0)
    found = regret([a, b, chosen], chosen, PARTS)
    assert found is not None
    assert found.value == pytest.approx(np.expm1(((5.5 - 5.0) + (4.0 - 3.0)) / 2))
    assert found.interval.low == pytest.approx(found.value)
    # Over all tokens `a` is best: (2 + 3) / 2 against (5.5 + 4) / 2.
    assert found.against_hindsight == pytest.approx(np.expm1(4.75 - 2.5))


def test_regret_of_the_layer_that_both_parts_pick_is_zero() -> None:
    best = hand_made("best", 2.0, 3.0, 1.0, 1.0)
    other = hand_made("other", 1.0, 1.0, 2.0, 2.0)
    found = regret([best, other], best, PARTS)
    assert found is not None
    assert found.value == 0
    # And yet another layer was better on the very tokens that are compared.
    assert found.against_hindsight == pytest.approx(np.expm1(2.5 - 1.0))


def test_hindsight_is_never_below_zero() -> None:
    """The cross-fitted value is, where noise picked a worse layer than the chosen one."""
    chosen = hand_made("chosen", 2.0, 2.0, tuning_loss=2.0, swapped_loss=2.0)
    lucky = hand_made("lucky", 3.0, 3.0, tuning_loss=1.0, swapped_loss=1.0)
    found = regret([chosen, lucky], chosen, PARTS)
    assert found is not None
    assert found.value == pytest.approx(np.expm1(-1.0))
    assert found.against_hindsight == 0


def with_infinite_token(one: LayerOutcome, row: int) -> LayerOutcome:
    losses_Q = one.losses_Q.copy()
    losses_Q[row] = np.inf
    return replace(one, losses_Q=losses_Q, mix=Mix(1, 1.0, 1.0))


def summary(outcomes: list[LayerOutcome], chosen: str) -> EvalResult:
    """`summarize` of a text in which every token is a word of four bytes."""
    scores = sample_scores(1)
    layers = tuple(replace(scores.layers[0], layer=one.layer, probe=float(i)) for i, one in enumerate(outcomes))
    choice = replace(scores.choice, layer=chosen, candidates=tuple(one.layer for one in outcomes))
    sizes = Sizes.of("abc " * TOKENS, np.arange(4, 4 * TOKENS + 1, 4))
    queries = SimpleNamespace(parts=PARTS, lm_Q=np.full(TOKENS, -3.0), sizes=sizes)
    return summarize(queries, outcomes, replace(scores, layers=layers, choice=choice))  # type: ignore[arg-type]


LAYERS = [hand_made(name, loss, loss, loss, loss) for name, loss in (("a", 2.0), ("b", 2.5), ("c", 2.2))]


def test_single_layer_has_nothing_to_regret() -> None:
    result = summary(LAYERS[:1], "a")
    assert (result.regret, result.best, result.selected, result.warnings) == (None, "a", "a", ())
    several = summary(LAYERS, "c").regret
    assert several is not None
    assert [several.value, several.against_hindsight] == pytest.approx([np.expm1(0.2)] * 2)


def test_infinite_perplexity_is_undefined_wherever_it_is_compared() -> None:
    """`--lambda 1` gave a regret and changes of -100 % with nan beside them."""
    outcomes = [replace(with_infinite_token(one, 1), tuning_loss=np.inf, swapped_loss=np.inf) for one in LAYERS]
    result = summary(outcomes, "b")
    assert (result.best, result.selected, result.regret) == ("", "b", None)
    for layer in result.layers:
        assert layer.perplexity == layer.word_perplexity == layer.bits_per_byte == np.inf
        unknown = (layer.change, layer.versus_best, *vars(layer.interval).values())
        assert np.isnan([*unknown, *vars(layer.versus_best_interval).values()]).all()
    assert np.isnan([one.spearman for one in result.correlations]).all()
    assert result.warnings == (
        "with `lam=1`, 1 of all 400 evaluated tokens have probability zero under the kNN distribution of b, "
        "which makes perplexity infinite; a `lam` below 1 mends it",
    )


def test_one_infinite_layer_leaves_the_others_alone() -> None:
    outcomes = [*LAYERS[:2], replace(with_infinite_token(LAYERS[2], 1), tuning_loss=2.2)]
    result = summary(outcomes, "b")
    assert result.best == "a"
    assert result.regret is not None
    assert [layer.perplexity == np.inf for layer in result.layers] == [False, False, True]
    assert result.layers[1].versus_best == pytest.approx(np.expm1(0.5))
    assert "of c, " in result.warnings[0]


def test_infinity_on_the_tuning_part_alone_is_warned_of_too() -> None:
    result = summary([replace(with_infinite_token(one, 0), tuning_loss=np.inf) for one in LAYERS], "b")
    assert result.layers[0].perplexity == pytest.approx(np.exp(2.0))
    assert result.regret is None
    assert result.warnings


def test_word_perplexity_of_a_text_without_white_space_may_be_infinite() -> None:
    """exp of some thousand nats for the one word overflowed with a warning."""
    long = hand_made("a", 9.0, 9.0, 9.0, 9.0)
    sizes = Sizes.of("字" * TOKENS, np.arange(3, 3 * TOKENS + 1, 3))
    queries = SimpleNamespace(parts=PARTS, lm_Q=np.full(TOKENS, -9.0), sizes=sizes)
    wide = Parts(TUNING, ~TUNING, ~TUNING, np.zeros(TOKENS, np.int64), True)
    queries.parts = wide
    result = summarize(queries, [long], None)  # type: ignore[arg-type]
    assert result.lm.word_perplexity == np.inf


def token_documents(*lengths: int) -> list[TokenDocument]:
    return [TokenDocument(np.zeros(length, np.int32), "text", number) for number, length in enumerate(lengths)]


@pytest.mark.parametrize("lengths", [(70,), (8,), (0,), (1,) * 9, (), (7,) * 10])
def test_too_little_text_for_two_parts_is_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="but at least 32 are needed in each; give more"):
        check_evaluation(token_documents(*lengths))


@pytest.mark.parametrize("lengths", [(100,), (9,) * 10, (3000, *[2] * 40)])
def test_enough_text_for_two_parts_is_taken(lengths: tuple[int, ...]) -> None:
    check_evaluation(token_documents(*lengths))

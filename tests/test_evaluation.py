"""Which tokens fit and which are scored: the roles of the two parts, which a swap would turn into flattery."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from knnlm.config import EvalConfig, KNNConfig
from knnlm.evaluation import LayerOutcome, outcome, regret
from knnlm.parts import Parts
from knnlm.probability import Mix, Search, fit, knn_log_probs, mix

TOKENS = 400
TUNING = np.arange(TOKENS) % 2 == 0
PARTS = Parts(TUNING, ~TUNING, ~TUNING, np.arange(TOKENS) // 20, True)


def make_search(hit_share: np.ndarray, seed: int = 0) -> Search:
    rng = np.random.default_rng(seed)
    distances = np.sort(rng.gamma(2.0, 10.0, (TOKENS, 16)), axis=1).astype(np.float32)
    return Search(distances, rng.random((TOKENS, 16)) < hit_share[:, None])


def losses(search: Search, lm: np.ndarray, setting: Mix) -> np.ndarray:
    return -mix(lm, knn_log_probs(search, setting.k, setting.temperature), setting.lam)


def test_each_part_is_scored_with_what_the_other_was_fitted_on() -> None:
    """Neighbours are right far more often on one part, so the two fits differ and a swap shows."""
    search = make_search(np.where(TUNING, 0.6, 0.05))
    lm = np.log(np.random.default_rng(1).uniform(0.01, 0.5, TOKENS))
    queries = SimpleNamespace(parts=PARTS, lm_Q=lm)
    found = outcome("layer", search, queries, KNNConfig())  # type: ignore[arg-type]
    mine, swapped = fit(search.rows(TUNING), lm[TUNING]), fit(search.rows(~TUNING), lm[~TUNING])
    assert mine.lam > swapped.lam + 0.2
    assert found.mix == mine
    assert found.losses_Q[~TUNING] == pytest.approx(losses(search, lm, mine)[~TUNING])
    assert found.losses_Q[TUNING] == pytest.approx(losses(search, lm, swapped)[TUNING])
    assert found.tuning_loss == pytest.approx(losses(search, lm, mine)[TUNING].mean())
    assert found.swapped_loss == pytest.approx(losses(search, lm, swapped)[~TUNING].mean())


def test_what_is_reported_cannot_move_what_was_fitted() -> None:
    lm = np.log(np.random.default_rng(1).uniform(0.01, 0.5, TOKENS))
    search = make_search(np.full(TOKENS, 0.3))
    changed = Search(search.distances_QK, np.where(TUNING[:, None], search.hits_QK, ~search.hits_QK))
    queries = SimpleNamespace(parts=PARTS, lm_Q=lm)
    first, second = (outcome("layer", one, queries, KNNConfig()) for one in (search, changed))  # type: ignore[arg-type]
    assert first.mix == second.mix
    assert first.tuning_loss == second.tuning_loss
    assert not np.allclose(first.losses_Q, second.losses_Q)


def hand_made(layer: str, on_tuning: float, on_rest: float, tuning_loss: float, swapped_loss: float) -> LayerOutcome:
    cross_fitted = np.where(TUNING, on_tuning, on_rest)
    return LayerOutcome(layer, Mix(1, 1.0, 0.5), cross_fitted, tuning_loss, swapped_loss, ())


def test_regret_compares_the_best_of_one_part_on_the_other() -> None:
    """`a` is picked on the tuning part, so its losses elsewhere count; `b` on the other, so its tuning losses do."""
    a = hand_made("a", on_tuning=2.0, on_rest=3.0, tuning_loss=1.0, swapped_loss=9.0)
    b = hand_made("b", on_tuning=5.0, on_rest=7.0, tuning_loss=9.0, swapped_loss=1.0)
    chosen = hand_made("chosen", on_tuning=5.5, on_rest=4.0, tuning_loss=5.0, swapped_loss=5.0)
    found = regret([a, b, chosen], chosen, PARTS, EvalConfig(bootstrap=50))
    assert found.value == pytest.approx(np.expm1(((5.5 - 5.0) + (4.0 - 3.0)) / 2))
    assert found.interval.low == pytest.approx(found.value)


def test_regret_of_the_layer_that_both_parts_pick_is_zero() -> None:
    best = hand_made("best", 2.0, 3.0, 1.0, 1.0)
    other = hand_made("other", 1.0, 1.0, 2.0, 2.0)
    assert regret([best, other], best, PARTS, EvalConfig(bootstrap=50)).value == 0

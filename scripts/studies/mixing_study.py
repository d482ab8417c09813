"""One λ for all queries, or one for each? The rows of docs/mixing.md for a model and a text.

    .venv/bin/python scripts/studies/mixing_study.py --model MODEL --text TEXT

Beside fixed λ: the gate of `knnlm.knn.mixing`; λ by buckets of the nearest distance (Drozdov et al. 2022; here with
a prior, and falling), which the library does not have; both also fitted on short stretches of the tuning part; and what
it would save, and cost, not to search where the LM is certain. A tenth of the text is held out as in `layer_study.py`.
With `--elsewhere OTHER` also what both, as fitted on the text, are worth on another one. "Carried" is the gate whose λ
is multiplied by the posterior probability that the text so far is of the store: docs/mixing.md.
Shapes: Q queries, B buckets.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from layer_study import split_text
from numpy.typing import NDArray

from knnlm.config import KNNConfig, LayerConfig, Settings, TextConfig
from knnlm.evaluation.queries import Queries, open_queries
from knnlm.knn.fitting import fit, fit_gate, fit_lambda
from knnlm.knn.mixing import Floats, Mix, Search, knn_log_probs, mix
from knnlm.knn.searcher import open_searcher
from knnlm.layer_names import FINAL
from knnlm.model.lm import LanguageModel
from knnlm.model.loading import load_model
from knnlm.pipeline import build
from knnlm.statistics import relative_change
from knnlm.store.datastore import Datastore
from knnlm.text.corpus import read_documents, tokenize
from knnlm.text.held_out import take_slices
from knnlm.text.windows import window_config

BUCKETS, PRIOR_TOKENS = 8, 30
STRETCH, STRETCHES = 500, 8
# Of perplexity on the tuning part: what not searching may cost there.
COST = 0.001
# Carried: the probability a token that the text changes its domain; the least posterior with which the memory speaks.
SWITCH, SILENT = 1 / 1000, 0.01
Lambdas = Callable[[Search], Floats]


@dataclass(frozen=True)
class Part:
    """Some of the queries."""

    search: Search
    lm_Q: Floats
    certainty_Q: Floats
    """The LM's largest probability."""

    def rows(self, chosen: NDArray[np.bool_]) -> Part:
        return Part(self.search.rows(chosen), self.lm_Q[chosen], self.certainty_Q[chosen])

    def losses(self, setting: Mix, lambdas: Lambdas | None = None) -> Floats:
        """-log p under the setting, or under other lambdas."""
        knn_Q = knn_log_probs(self.search, setting.k, setting.temperature)
        return -mix(self.lm_Q, knn_Q, setting.lam if lambdas is None else lambdas(self.search))


def gate(part: Part, setting: Mix) -> Lambdas:
    gated = fit_gate(part.search, part.lm_Q, setting)
    return lambda search: gated.lambdas(search.distances_QK, search.values_QJ)


def buckets(part: Part, setting: Mix) -> Lambdas:
    """Quantiles of the nearest distance; neighbouring buckets whose λ would rise are one (pool adjacent violators).

    The prior: in each bucket some tokens of which λ's share has the neighbours as its source, the rest the LM.
    """
    knn_Q = knn_log_probs(part.search, setting.k, setting.temperature)
    edges = np.quantile(part.search.distances_QK[:, 0], np.arange(1, BUCKETS) / BUCKETS)
    bucket_Q = np.searchsorted(edges, part.search.distances_QK[:, 0], side="right")
    merged: list[tuple[list[int], float]] = []
    for bucket in range(BUCKETS):
        held = [bucket]
        while True:
            lam = _posterior(part.lm_Q[np.isin(bucket_Q, held)], knn_Q[np.isin(bucket_Q, held)], setting.lam, len(held))
            if not merged or merged[-1][1] >= lam:
                break
            held = merged.pop()[0] + held
        merged.append((held, lam))
    lambda_B = np.concatenate([np.full(len(held), lam) for held, lam in merged])
    return lambda search: lambda_B[np.searchsorted(edges, search.distances_QK[:, 0], side="right")]


def _posterior(lm_Q: Floats, knn_Q: Floats, lam: float, count: int) -> float:
    """λ with the prior's tokens of `count` buckets: those that only one of the two could have given."""
    ours, theirs = round(count * PRIOR_TOKENS * lam), round(count * PRIOR_TOKENS * (1 - lam))
    only_knn, only_lm = np.zeros(ours + theirs), np.zeros(ours + theirs)
    only_knn[ours:], only_lm[:ours] = -np.inf, -np.inf
    return fit_lambda(np.append(lm_Q, only_lm), np.append(knn_Q, only_knn))


def carried(part: Part, setting: Mix, documents_Q: NDArray[np.int64]) -> Lambdas:
    """The gate's λ times the posterior of the gated mixture, against the plain LM, before each token of a document.

    Fixed share of two forecasters (Herbster & Warmuth 1998): odds times p_gated / p_LM of each token, then a switch.
    """
    lambdas_Q = setting.lambdas(part.search.distances_QK, part.search.values_QJ)
    gains_Q = -part.lm_Q - part.losses(setting, lambda search: lambdas_Q)
    trust_Q, trust = np.empty(len(gains_Q)), 0.5
    for place, gain in enumerate(gains_Q):
        if place == 0 or documents_Q[place] != documents_Q[place - 1]:
            trust = 0.5
        trust_Q[place] = trust
        odds = trust / (1 - trust) * np.exp(min(gain, 500.0))
        trust = (1 - SWITCH) * odds / (1 + odds) + SWITCH / (1 + odds)
    silenced_Q = np.where(trust_Q < SILENT, 0.0, lambdas_Q * trust_Q)
    return lambda search: silenced_Q


def on_stretches(tuning: Part, reporting: Part, rule: Callable[[Part, Mix], Lambdas]) -> Floats:
    """Relative change of perplexity against fixed λ, all fitted on some consecutive tokens of the tuning part."""
    rng, places, changes = np.random.default_rng(0), np.arange(len(tuning.lm_Q)), []
    for start in rng.integers(0, len(places) - STRETCH + 1, STRETCHES):
        few = tuning.rows((places >= start) & (places < start + STRETCH))
        setting = fit(few.search, few.lm_Q)
        gained = reporting.losses(setting, rule(few, setting)).mean() - reporting.losses(setting).mean()
        changes.append(np.expm1(gained))
    return np.array(changes)


def skipped(tuning: Part, setting: Mix) -> float:
    """The certainty over which not searching costs `COST` on the tuning part."""
    order = np.argsort(-tuning.certainty_Q)
    cost_Q = np.cumsum((-tuning.lm_Q - tuning.losses(setting))[order]) / len(order)
    allowed = np.flatnonzero(cost_Q <= np.log1p(COST))
    return float(tuning.certainty_Q[order[allowed[-1]]]) if len(allowed) else np.inf


@contextmanager
def searched(
    lm: LanguageModel, store: Datastore, text: Sequence[Path], tokens: int, settings: Settings
) -> Iterator[tuple[Part, Queries]]:
    """A text's queries, all of them searched for."""
    documents, (layer,) = take_slices(tokenize(read_documents(text), lm.encode), tokens, seed=0), store.layers
    with open_queries(
        lm, documents, window_config(settings.text, lm.name, lm.context_limit), [layer, FINAL]
    ) as queries:
        searcher, start = open_searcher(store, layer, settings.knn.metric, exact=True), time.perf_counter()
        search = searcher.cached(queries.vectors(layer), queries.targets_Q, min(settings.knn.max_k, store.count))
        print(f"{store.count:,} keys, {len(queries.lm_Q):,} queries in {time.perf_counter() - start:.1f} s")
        yield Part(search, queries.lm_Q, certainties(lm, queries)), queries


def certainties(lm: LanguageModel, queries: Queries) -> Floats:
    rows = torch.split(torch.from_numpy(queries.vectors(FINAL)), 512)
    return np.concatenate([lm.log_probs(row).max(dim=1).values.double().exp().numpy() for row in rows])


def report(name: str, losses_Q: Floats, base_Q: Floats, clusters_Q: NDArray[np.int64], more: str) -> None:
    change, interval = relative_change(losses_Q, base_Q, clusters_Q)
    told = f"{change:+.2%} ({interval.low:+.2%} … {interval.high:+.2%})"
    print(f"{name:8s} {np.exp(losses_Q.mean()):8.2f} {told}, {more}", flush=True)


def compare(whole: Part, queries: Queries) -> Mix:
    """Print the rows; gives the fitted setting back."""
    parts = queries.parts
    tuning, reporting = whole.rows(parts.tuning_Q), whole.rows(parts.reporting_Q)
    clusters_Q = parts.clusters_Q[parts.reporting_Q]
    setting = fit(tuning.search, tuning.lm_Q)
    base_Q = reporting.losses(setting)
    print(f"LM {np.exp(-reporting.lm_Q.mean()):.2f}, fixed {np.exp(base_Q.mean()):.2f}, {setting}")
    for name, rule in (("gate", gate), ("buckets", buckets)):
        start = time.perf_counter()
        lambdas = rule(tuning, setting)
        seconds = time.perf_counter() - start
        few = on_stretches(tuning, reporting, rule)
        more = f"on {STRETCH} tokens {few.mean():+.2%}, at worst {few.max():+.2%}; fitted in {seconds:.3f} s"
        report(name, reporting.losses(setting, lambdas), base_Q, clusters_Q, more)
    skip_Q = reporting.certainty_Q >= skipped(tuning, setting)
    losses_Q = np.where(skip_Q, -reporting.lm_Q, base_Q)
    report("skip", losses_Q, base_Q, clusters_Q, f"{skip_Q.mean():.1%} of searches saved")
    return fit_gate(tuning.search, tuning.lm_Q, setting)


def at_home(whole: Part, queries: Queries, setting: Mix) -> None:
    """The carried gate against the gate, on the reporting part."""
    chosen, clusters_Q = queries.parts.reporting_Q, queries.parts.clusters_Q
    losses_Q = whole.losses(setting, carried(whole, setting, queries.documents_Q))[chosen]
    gated_Q = whole.losses(setting, lambda search: setting.lambdas(search.distances_QK, search.values_QJ))[chosen]
    kept = (-whole.lm_Q[chosen] - losses_Q).mean() / (-whole.lm_Q[chosen] - gated_Q).mean()
    report("carried", losses_Q, gated_Q, clusters_Q[chosen], f"against the gate; {kept:.1%} of its gain kept")


def elsewhere(part: Part, setting: Mix, queries: Queries) -> None:
    """The plain LM is what fixed λ and gate are compared with."""
    print(f"elsewhere: LM {np.exp(-part.lm_Q.mean()):.2f}")
    gated = part.losses(setting, lambda search: setting.lambdas(search.distances_QK, search.values_QJ))
    silent = part.losses(setting, carried(part, setting, queries.documents_Q))
    for name, losses_Q in (("fixed", part.losses(setting)), ("gate", gated), ("carried", silent)):
        report(name, losses_Q, -part.lm_Q, queries.parts.clusters_Q, "against the LM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--elsewhere", type=Path)
    parser.add_argument("--layer", default="-1.ffn_input")
    parser.add_argument("--metric", default="l2")
    parser.add_argument("--max-tokens", type=int, default=150_000)
    parser.add_argument("--eval-tokens", type=int, default=20_000)
    args = parser.parse_args()
    lm, knn = load_model(args.model), KNNConfig(index="exact", metric=args.metric)
    text, layers = TextConfig(max_tokens=args.max_tokens), LayerConfig(layers=args.layer)
    settings = Settings(text=text, layers=layers, knn=knn)
    with tempfile.TemporaryDirectory() as folder:
        training, held_out = split_text(args.text, Path(folder))
        store = build(lm, [training], Path(folder) / "store", settings=settings)
        with searched(lm, store, [held_out], args.eval_tokens, settings) as (whole, queries):
            setting = compare(whole, queries)
            at_home(whole, queries, setting)
        if args.elsewhere:
            with searched(lm, store, [args.elsewhere], args.eval_tokens, settings) as (whole, queries):
                elsewhere(whole, setting, queries)


if __name__ == "__main__":
    main()

"""The verbs: score, build, evaluate, run. The command line is a thin skin over these.

    lm = load_model("my-model")
    store = build(lm, ["nursing.jsonl"], "nursing.knn")
    result = evaluate(lm, store, ["held-out.jsonl"])
    print(result.lm.perplexity, [(one.layer, one.perplexity) for one in result.layers])

Each takes one `Settings`; what is not said there has a default, and `None` means fitted or found out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnlm.choose import SCORES_THAT_CHOOSE, candidate_layers, choose
from knnlm.collect import Collected, collect
from knnlm.config import Settings, TextConfig
from knnlm.datastore import Datastore, DatastoreWriter
from knnlm.errors import InputError
from knnlm.evaluation import (
    LayerOutcome,
    Queries,
    check_evaluation,
    evaluate_layers,
    open_queries,
    perplexity_through_index,
    summarize,
)
from knnlm.examples import find_examples
from knnlm.indexing import try_index
from knnlm.job import Clock, Job, Paths
from knnlm.layers import select_layers
from knnlm.lm import LanguageModel
from knnlm.overlap import overlap
from knnlm.plan import check_choice, check_query_room, estimate_tokens, make_plan
from knnlm.progress import Advance, Progress, Silent, toward
from knnlm.report.document import score_document, score_from_document
from knnlm.results import EvalResult, IndexReport, LayerResult, ScoreResult, TokenExample
from knnlm.scoring import LayerScorer, Settled
from knnlm.search import check_count, is_exact, searched_layers
from knnlm.storage import new_folder
from knnlm.version import versions
from knnlm.windows import TokenDocument, count_targets, hold_out

DEFAULTS = Settings()

# Tokens on which `build` chooses before the one pass that stores the chosen layer.
SAMPLE_TOKENS = 200_000
# Shared 13-grams in more than this share of the evaluation text are worth a warning.
OVERLAP_SHARE = 0.02
# Values that are looked through between two moves of the bar.
OVERLAP_TOKENS = 1 << 20


def score(
    lm: LanguageModel,
    text: Paths,
    *,
    settings: Settings = DEFAULTS,
    stop_early: bool = False,
    share: float = 1,
    progress: Progress | None = None,
) -> ScoreResult:
    """Dispersion and the other label-free scores of every layer asked for, and the choice; writes nothing.

    :param stop_early: stop when it is settled which candidate dispersion takes.
    :param share: look at this share of the text only, taken evenly from all of it.
    """
    job = Job(lm, settings, progress or Silent())
    layers = select_layers(settings.layers.layers or "all", lm.layer_names)
    check_choice(lm, layers, settings)
    total = estimate_tokens(lm, text, settings.text)
    scorer = LayerScorer({name: lm.dims[name] for name in layers}, seed=settings.seed)
    settled = Settled(candidate_layers(settings.layers, layers, lm.layer_names))
    stop = settled if stop_early else None
    collected = _collect(job, "scoring layers", job.documents(text, share), layers, total, scorer=scorer, stop=stop)
    return _score_result(job, scorer, collected, stopped_early=settled.met)


def build(
    lm: LanguageModel,
    text: Paths,
    out: str | Path,
    *,
    settings: Settings = DEFAULTS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Datastore:
    """Choose a layer on a bounded sample (or take `settings.layers.layers`), store its keys, index them.

    Where the index cannot be built, the datastore is searched exactly, and a note says so.
    :raises DatastoreExists: `out` holds something already; nothing was done.
    """
    job = Job(lm, settings, progress or Silent())
    with new_folder(Path(out), overwrite=overwrite) as folder:
        check_choice(lm, select_layers(settings.layers.layers or "all", lm.layer_names), settings)
        total = estimate_tokens(lm, text, settings.text)
        sampled = _choose_on_sample(job, text, total)
        layers = (sampled.choice.layer,) if sampled else _named_layers(job)
        scored = _extract(job, job.documents(text), layers, folder, total=total, sampled=sampled)
    store = Datastore.open(Path(out))
    _, warnings = try_index(store, scored.choice.layer, settings, job.progress)
    for warning in warnings:
        job.progress.note(warning)
    return store


def _named_layers(job: Job) -> tuple[str, ...]:
    layers = job.settings.layers
    return select_layers(layers.layers or layers.select, job.lm.layer_names)


def _choose_on_sample(job: Job, text: Paths, total: int | None) -> ScoreResult | None:
    """The scores of all layers on a sample that ends when the choice is clear; None where layers are named.

    Of all, not of the candidates alone, so that the probe can tell of a better layer elsewhere.

    :param total: about how many tokens the text has; the sample is spread over them.
    """
    settings, layers = job.settings, job.settings.layers
    if layers.layers is not None or layers.select not in SCORES_THAT_CHOOSE:
        return None
    tokens = min(SAMPLE_TOKENS, settings.text.max_tokens or SAMPLE_TOKENS)
    # By documents, whatever the protocol of the datastore is: knn-transformers knows no part of a text.
    sample = replace(settings, text=replace(settings.text, max_tokens=tokens, protocol="documents"))
    stop_early, share = layers.select == "dispersion", min(1.0, tokens / max(1, total or tokens))
    sampled = score(job.lm, text, settings=sample, stop_early=stop_early, share=share, progress=job.progress)
    job.progress.note(f"{sampled.choice.reason}, on {sampled.tokens:,} tokens")
    if sampled.choice.disagreement:
        job.progress.note(sampled.choice.disagreement)
    return sampled


def evaluate(
    lm: LanguageModel,
    store: Datastore,
    eval_text: Paths,
    *,
    settings: Settings = DEFAULTS,
    progress: Progress | None = None,
) -> EvalResult:
    """Perplexity of the plain LM and of the kNN-LM for every layer that the datastore holds.

    A layer with an index is searched through it, unless `settings.knn.index` is `exact`. The settings that `build` or
    `run` took serve here too.
    :raises InputError: settings that do not fit the datastore, such as another index or metric (`searched_layers`).
    :raises DatastoreMismatch: the datastore was made with another model or tokenizer; says which differs.
    """
    store.check_model(lm.fingerprint)
    layers = searched_layers(store, settings)
    job = Job(lm, replace(settings, text=_windows_like(store, settings.text)), progress or Silent())
    documents = job.evaluation_documents(eval_text)
    check_evaluation(documents)
    check_query_room(lm, layers, count_targets(documents))
    scores = store.manifest.scores  # null where Python code wrote the datastore without any
    scored = None if scores is None else score_from_document(scores)
    return _evaluate(job, store, documents, layers, scored, exact=is_exact(settings.knn.index))


def _windows_like(store: Datastore, text: TextConfig) -> TextConfig:
    """The datastore's windows where nothing else is asked for; its stride never exceeds a context that is.

    :raises InputError: a stride is asked for that exceeds the datastore's context.
    """
    context = text.context or store.manifest.context
    if text.stride and text.stride > context:
        raise InputError(
            f"--stride {text.stride} is over the context of {context} tokens that the datastore was made with; "
            f"take at most {context}, or a longer --context too"
        )
    return replace(text, context=context, stride=text.stride or min(store.manifest.stride, context))


def run(
    lm: LanguageModel,
    text: Paths,
    out: str | Path,
    *,
    eval_text: Paths | None = None,
    settings: Settings = DEFAULTS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EvalResult:
    """The whole way: keys of every layer in one pass, scores, the choice, perplexity per layer, the index.

    Without `eval_text`, a tenth of the documents is held out. The folder `out` becomes a datastore. Layers are
    compared under exact search; the chosen one is then indexed, and its perplexity measured again with the index.
    Where the index cannot be built, a warning says so, and all else stands.
    :raises DatastoreExists: `out` holds something already; nothing was done.
    """
    job, clock = Job(lm, settings, progress or Silent()), Clock()
    with clock.time("extract and score"), new_folder(Path(out), overwrite=overwrite) as folder:
        scored, documents = _extract_beside_evaluation(job, text, eval_text, folder)
    store = Datastore.open(Path(out))
    with clock.time("evaluate and index"):
        result = _evaluate(job, store, documents, store.layers, scored, exact=True, index=True)
    store.update_manifest(fitted={one.layer: _setting(one) for one in result.layers})
    return replace(result, seconds=clock.seconds)


def _extract_beside_evaluation(
    job: Job, text: Paths, eval_text: Paths | None, folder: Path
) -> tuple[ScoreResult, Sequence[TokenDocument]]:
    """The scores of the stored layers, and the documents to evaluate on: given, or held out of the text."""
    given = job.evaluation_documents(eval_text) if eval_text else None
    if given is not None:
        check_evaluation(given)
    plan = make_plan(job.lm, text, folder, job.settings, given)
    job.progress.note(plan.sentence)
    documents = job.documents(text)
    if given is not None:
        return _extract(job, documents, plan.layers, folder, total=plan.tokens), given
    held_out = hold_out(documents, max_tokens=job.settings.evaluation.eval_tokens, seed=job.settings.seed)
    scored = _extract(job, held_out.training, plan.layers, folder, total=plan.tokens)
    check_evaluation(held_out.evaluation)
    return scored, held_out.evaluation


def _setting(one: LayerResult) -> dict[str, object]:
    moved = one.by_query
    gate = moved and {"offset": moved.offset, "distance": moved.distance, "different": moved.different}
    return {"k": one.k, "lambda": one.lam, "temperature": one.temperature, "gate": gate}


def _extract(
    job: Job,
    documents: Iterable[TokenDocument],
    layers: Sequence[str],
    folder: Path,
    *,
    total: int | None,
    sampled: ScoreResult | None = None,
) -> ScoreResult:
    """One pass: keys of the layers into the folder, their scores and the choice into its manifest.

    :param total: about how many tokens there are, for the time left.
    :param sampled: the scores by which the layers were chosen before; they are kept in place of new ones.
    """
    dims = {name: job.lm.dims[name] for name in layers}
    scorer = None if sampled else LayerScorer(dims, seed=job.settings.seed)
    with DatastoreWriter(folder, dims, key_dtype=job.settings.key_dtype) as writer:
        collected = _collect(job, "extracting keys", documents, layers, total, scorer=scorer, writer=writer)
        check_count(job.settings.knn, collected.tokens)
        scored = _score_result(job, scorer, collected) if scorer else sampled
        assert scored is not None
        writer.finish(
            fingerprint=job.lm.fingerprint,
            context=job.window.context,
            stride=job.window.stride,
            corpus=collected.fingerprint,
            scores=score_document(scored),
            versions=versions(),
        )
    return scored


def _collect(
    job: Job,
    stage: str,
    documents: Iterable[TokenDocument],
    layers: Sequence[str],
    total: int | None,
    *,
    scorer: LayerScorer | None = None,
    writer: DatastoreWriter | None = None,
    stop: Callable[[LayerScorer], bool] | None = None,
) -> Collected:
    """`collect` as a stage of the job."""
    with job.progress.stage(stage, "tokens") as advance:
        return collect(
            job.lm,
            documents,
            job.window,
            layers,
            batch_tokens=job.batch_tokens,
            scorer=scorer,
            writer=writer,
            advance=toward(total, advance),
            stop=stop,
        )


def _score_result(job: Job, scorer: LayerScorer, collected: Collected, *, stopped_early: bool = False) -> ScoreResult:
    """The scores of a finished pass, and the choice that follows from them."""
    lm, settings = job.lm, job.settings
    with job.progress.stage("effective rank and retrieval probe", "layers") as advance:
        scores = scorer.scores(advance)
    return ScoreResult(
        layers=scores,
        choice=choose(scores, settings.layers, lm.layer_names, scorer.probe_difference),
        tokens=scorer.tokens,
        segments=scorer.segments,
        documents=collected.documents,
        stopped_early=stopped_early,
        settings=job.record(),
        versions=versions(),
    )


def _evaluate(
    job: Job,
    store: Datastore,
    documents: Sequence[TokenDocument],
    layers: Sequence[str],
    scored: ScoreResult | None,
    *,
    exact: bool,
    index: bool = False,
) -> EvalResult:
    """Perplexity of the layers, beside the scores and the choice that the datastore was made with.

    :param exact: search exactly, whatever index there is.
    :param index: then index the chosen layer and measure what that costs.
    """
    warnings = [*_overlap_warning(job, documents, store), *(() if exact else _unlike_searches(store, layers))]
    with _open_queries(job, documents, layers) as queries:
        knn, progress = job.settings.knn, job.progress
        outcomes = list(evaluate_layers(store, queries, layers, knn, exact=exact, progress=progress))
        result = summarize(job.lm, queries, outcomes, scored)
        shown = next(one for one in outcomes if one.layer == (result.selected or result.best or layers[0]))
        helped, hurt = _examples(job, store, queries, shown, exact)
        report, failures = _index(job, store, queries, shown) if index else (None, ())
    return replace(
        result,
        helped=helped,
        hurt=hurt,
        index=report,
        keys=store.count,
        warnings=(*result.warnings, *warnings, *failures),
        settings=job.record(),
        versions=versions(),
    )


def _unlike_searches(store: Datastore, layers: Sequence[str]) -> tuple[str, ...]:
    """A warning where some layers are searched through an index that may miss neighbours, and others exactly."""
    indexed = [name for name in layers if store.manifest.indexes.get(name, {}).get("spec", "exact") != "exact"]
    if not indexed or len(layers) == 1:
        return ()
    return (
        f"{', '.join(indexed)} was searched through its index, the other layers exactly: the best layer and the regret "
        "compare unlike searches; --index exact compares like with like",
    )


def _open_queries(
    job: Job, documents: Sequence[TokenDocument], layers: Sequence[str]
) -> AbstractContextManager[Queries]:
    fitted = None in (job.settings.knn.k, job.settings.knn.temperature, job.settings.knn.lam)
    return open_queries(
        job.lm, documents, job.window, layers, batch_tokens=job.batch_tokens, fitted=fitted, progress=job.progress
    )


def _examples(
    job: Job, store: Datastore, queries: Queries, shown: LayerOutcome, exact: bool
) -> tuple[tuple[TokenExample, ...], tuple[TokenExample, ...]]:
    """The tokens that retrieval helped most, and those that it hurt most."""
    count, metric = job.settings.evaluation.examples, job.settings.knn.metric
    with job.progress.stage("finding examples", "tokens"):
        return find_examples(job.lm, store, queries, shown, count, metric=metric, exact=exact)


def _index(
    job: Job, store: Datastore, queries: Queries, one: LayerOutcome
) -> tuple[IndexReport | None, tuple[str, ...]]:
    """Index the layer; where the index is not exact, measure the perplexity that it gives. As `try_index`."""
    report, warnings = try_index(store, one.layer, job.settings, job.progress, queries.vectors(one.layer))
    if report is None or report.spec == "exact":
        return report, warnings
    with job.progress.stage("perplexity through the index", "queries"):
        perplexity = perplexity_through_index(store, queries, one, job.settings.knn.metric)
    return replace(report, perplexity=perplexity), warnings


def _overlap_warning(job: Job, documents: Sequence[TokenDocument], store: Datastore) -> tuple[str, ...]:
    with job.progress.stage("looking for the evaluation text in the datastore", "tokens") as advance:
        share = overlap(documents, _pieces(store.values, advance))
    if share < OVERLAP_SHARE:
        return ()
    return (
        f"{share:.1%} of the evaluation text's 13-grams also stand in the datastore: its perplexity is flattered; "
        "take evaluation text that the datastore does not hold",
    )


def _pieces(values_N: NDArray[np.int32], advance: Advance) -> Iterator[NDArray[np.int32]]:
    for start in range(0, len(values_N), OVERLAP_TOKENS):
        yield values_N[start : start + OVERLAP_TOKENS]
        advance(min(start + OVERLAP_TOKENS, len(values_N)), len(values_N))

"""The steps that verbs share: extract, score, evaluate, index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from knnlm.documents import score_document
from knnlm.evaluation.examples import find_examples
from knnlm.evaluation.outcomes import LayerOutcome, evaluate_layers, perplexity_through_index
from knnlm.evaluation.overlap import overlap_warning
from knnlm.evaluation.queries import Queries, open_queries
from knnlm.evaluation.summary import summarize
from knnlm.extraction.collect import Collected, collect
from knnlm.knn.indexing import try_index
from knnlm.knn.searcher import check_count
from knnlm.pipeline.job import Job
from knnlm.progress import toward
from knnlm.results import EvalResult, IndexReport, ScoreResult, TokenExample
from knnlm.scores.choose import choose
from knnlm.scores.layer_scorer import LayerScorer
from knnlm.store.datastore import Datastore
from knnlm.store.writer import DatastoreWriter
from knnlm.text.windows import TokenDocument
from knnlm.version import versions


def extract(
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
        collected = pass_over_text(job, "extracting keys", documents, layers, total, scorer=scorer, writer=writer)
        check_count(job.settings.knn, collected.tokens)
        scored = score_result(job, scorer, collected) if scorer else sampled
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


def pass_over_text(
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


def score_result(job: Job, scorer: LayerScorer, collected: Collected, *, stopped_early: bool = False) -> ScoreResult:
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


def evaluate_store(
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
    warnings = [*overlap_warning(documents, store, job.progress), *(() if exact else _unlike_searches(store, layers))]
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
        "compare unlike searches; `index='exact'` compares like with like",
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

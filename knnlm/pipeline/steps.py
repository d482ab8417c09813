"""Steps that several verbs share: extract, score, evaluate, index."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from knnlm.cluster.parts import PartMaker
from knnlm.config import TextConfig, check_stride
from knnlm.documents import score_document
from knnlm.evaluation.examples import find_examples
from knnlm.evaluation.outcomes import LayerOutcome, evaluate_layers, perplexity_through_index
from knnlm.evaluation.overlap import overlap_warning
from knnlm.evaluation.piloting import pilots_of
from knnlm.evaluation.queries import Queries, check_evaluation, open_queries
from knnlm.evaluation.summary import summarize
from knnlm.extraction.collect import Collected, Elsewhere, collect
from knnlm.extraction.hidden_states import HiddenStates
from knnlm.extraction.scorer_state import ScorerState, forget
from knnlm.knn.indexing import try_index
from knnlm.knn.searcher import check_count
from knnlm.layer_names import FINAL, select_layers
from knnlm.pipeline.job import Job, Paths
from knnlm.pipeline.plan import check_choice, estimate_tokens
from knnlm.progress import toward
from knnlm.results import EvalResult, LayerResult, ScoreResult
from knnlm.scores.choose import candidate_layers, choose, layers_that_matter
from knnlm.scores.layer_scorer import FOR_CHOICE, LayerScorer, Settled
from knnlm.scores.pilot import no_pilot
from knnlm.store.datastore import Datastore
from knnlm.store.elsewhere import PartsElsewhere
from knnlm.store.joint import AnyStore
from knnlm.store.model_place import relative_place
from knnlm.store.writer import DatastoreWriter
from knnlm.text.clusters import CLUSTER_TOKENS
from knnlm.text.held_out import hold_out, take_sample
from knnlm.text.windows import TokenDocument, WindowConfig, count_targets
from knnlm.version import versions

EXTRACTING = "extracting keys"
# Tokens on which a layer is chosen before the pass that stores keys.
SAMPLE_TOKENS = 8192


def extract(
    job: Job,
    documents: Iterable[TokenDocument],
    layers: Sequence[str],
    folder: Path,
    *,
    total: int | None,
    sampled: ScoreResult | None = None,
    frame: Datastore | None = None,
    given: HiddenStates | None = None,
) -> ScoreResult:
    """Write the layers' keys to the folder in one pass, with their scores and the choice in its manifest.

    Parts that the folder holds already are not made again.

    :param total: approximate number of tokens, for the progress bar.
    :param sampled: scores by which the layers were already chosen; they are kept instead of new ones.
    :param frame: a datastore whose centres and scales are taken.
    :param given: what has the documents' vectors; the model then makes none.
    """
    scorer = None if sampled else _scorer(job, layers, has_head=given is None or FINAL in given.layers)
    with _writer(job, layers, folder, frame) as writer:
        state = ScorerState(folder, scorer, writer) if scorer else None
        collected = read_through(
            job, documents, layers, total, stage=EXTRACTING, given=given, scorer=scorer, writer=writer, state=state
        )
        check_count(job.settings.knn, collected.tokens)
        scored = _score_result(job, scorer, collected) if scorer else sampled
        assert scored is not None
        writer.finish(corpus=collected.fingerprint, scores=score_document(scored), versions=versions())
        forget(folder)
    return scored


def _writer(job: Job, layers: Sequence[str], folder: Path, frame: Datastore | None) -> DatastoreWriter:
    kind = DatastoreWriter if job.cluster is None else PartsElsewhere
    return kind(
        folder,
        {name: job.lm.dims[name] for name in layers},
        fingerprint={**job.lm.fingerprint, "model": relative_place(job.lm.name, folder)},
        context=job.window.context,
        stride=job.window.stride,
        key_dtype=job.settings.key_dtype,
        resume=True,
        frame=frame,
    )


def _elsewhere(job: Job, writer: DatastoreWriter | None) -> AbstractContextManager[Elsewhere | None]:
    if job.cluster is None or not isinstance(writer, PartsElsewhere):
        return nullcontext()
    return PartMaker(job.cluster, job.lm, writer, job.batch_tokens)


def read_through(
    job: Job,
    documents: Iterable[TokenDocument],
    layers: Sequence[str],
    total: int | None,
    *,
    stage: str,
    given: HiddenStates | None = None,
    scorer: LayerScorer | None = None,
    writer: DatastoreWriter | None = None,
    state: ScorerState | None = None,
    stop: Callable[[LayerScorer], bool] | None = None,
) -> Collected:
    """Read documents once, in a stage of this name. Raises as `collect`, which explains the other parameters.

    :param total: approximate number of tokens, for the progress bar.
    :param given: what has the documents' vectors; they are then cut as clusters of text are.
    """
    with job.progress.stage(stage, "tokens") as advance, _elsewhere(job, writer) as elsewhere:
        return collect(
            job.lm,
            documents,
            job.window if given is None else WindowConfig(CLUSTER_TOKENS, CLUSTER_TOKENS),
            layers,
            batch_tokens=job.batch_tokens,
            scorer=scorer,
            writer=writer,
            give=None if given is None else given.give,
            state=state,
            elsewhere=elsewhere,
            advance=toward(total, advance),
            stop=stop,
        )


def score_layers(job: Job, text: Paths, *, stop_early: bool = False, share: float = 1) -> ScoreResult:
    """Scores of all requested layers, and the choice; see `knnlm.pipeline.verbs.score`."""
    lm, settings = job.lm, job.settings
    layers = select_layers(settings.layers.layers or "all", lm.layer_names)
    check_choice(lm, layers, settings)
    total = estimate_tokens(lm, text, settings.text)
    settled = Settled(candidate_layers(settings.layers, layers, lm.layer_names)) if stop_early else None
    scorer, collected = _score_pass(job, job.documents(text, share), layers, total, settled)
    return _score_result(job, scorer, collected, stopped_early=settled is not None and settled.met)


def choose_on_sample(
    job: Job, documents: Iterable[TokenDocument], layers: Sequence[str], *, most: int
) -> tuple[ScoreResult, tuple[str, ...]]:
    """Score layers on a bounded sample of the documents, and choose; also return those that can matter.

    Those are at most `most`, the chosen one included (`layers_that_matter`); the other layers have only the scores that
    a choice rests on.
    """
    job, sample = _sampled(job, documents)
    scorer, collected = _score_pass(job, sample, layers, count_targets(sample))
    scored = _score_result(job, scorer, collected, only=FOR_CHOICE)
    stored = layers_that_matter(scored, most)
    job.progress.note(f"{scored.choice.reason}, on {scored.tokens:,} tokens")
    if scored.choice.disagreement:
        job.progress.note(scored.choice.disagreement)
    whole = {one.layer: one for one in scorer.completed([one for one in scored.layers if one.layer in stored])}
    return replace(scored, layers=tuple(whole.get(one.layer, one) for one in scored.layers)), stored


def score_sample(job: Job, documents: Iterable[TokenDocument], layers: Sequence[str]) -> ScoreResult:
    """Scores of these layers on a bounded sample of the documents, and the choice."""
    job, sample = _sampled(job, documents)
    scorer, collected = _score_pass(job, sample, layers, count_targets(sample))
    return _score_result(job, scorer, collected)


def _sampled(job: Job, documents: Iterable[TokenDocument]) -> tuple[Job, list[TokenDocument]]:
    """A sample of the documents, and the job that reads it."""
    # By documents, whatever the datastore's protocol: a sample of rows has no windows of its own.
    text = replace(job.settings.text, max_tokens=None, protocol="documents")
    sample = take_sample(documents, SAMPLE_TOKENS, run=CLUSTER_TOKENS, seed=job.settings.seed)
    return replace(job, settings=replace(job.settings, text=text)), sample


def _scorer(job: Job, layers: Sequence[str], *, has_head: bool = True) -> LayerScorer:
    dims = {name: job.lm.dims[name] for name in layers}
    return LayerScorer(dims, head=job.lm.dims[FINAL] if has_head else None, seed=job.settings.seed)


def _score_pass(
    job: Job,
    documents: Iterable[TokenDocument],
    layers: Sequence[str],
    total: int | None,
    stop: Callable[[LayerScorer], bool] | None = None,
) -> tuple[LayerScorer, Collected]:
    scorer = _scorer(job, layers)
    return scorer, read_through(job, documents, layers, total, stage="scoring layers", scorer=scorer, stop=stop)


def _score_result(
    job: Job,
    scorer: LayerScorer,
    collected: Collected,
    *,
    stopped_early: bool = False,
    only: Collection[str] | None = None,
) -> ScoreResult:
    """Scores of a finished pass, and the resulting choice."""
    lm, settings = job.lm, job.settings
    with job.progress.stage("pilots and other scores", "layers") as advance:
        pilots = pilots_of(lm, scorer.head, seed=scorer.seed) if scorer.has_head else no_pilot
        scores = scorer.scores(advance, measure_pilot=pilots, only=only)
    return ScoreResult(
        layers=scores,
        choice=choose(scores, settings.layers, lm.layer_names, scorer.pilot_change),
        tokens=scorer.tokens,
        segments=scorer.segments,
        documents=collected.documents,
        stopped_early=stopped_early,
        settings=job.record(),
        versions=versions(),
    )


def split_text(
    job: Job, text: Paths, given: list[TokenDocument] | None
) -> tuple[Iterator[TokenDocument], Callable[[], list[TokenDocument]]]:
    """Return the documents to store, and a function that returns those to evaluate on, once the former are exhausted.

    :param given: the evaluation text; if None, it is held out of the text.
    """
    documents = job.documents(text)
    if given is not None:
        return documents, lambda: given
    held_out = hold_out(documents, max_tokens=job.settings.evaluation.eval_tokens, seed=job.settings.seed)

    def evaluation() -> list[TokenDocument]:
        check_evaluation(held_out.evaluation)
        return held_out.evaluation

    return held_out.training, evaluation


def windows_like(store: Datastore, text: TextConfig) -> TextConfig:
    """Context and stride of the datastore where `text` sets none; the stride is at most the context.

    :raises InputError: the given stride exceeds the context.
    """
    context = text.context or store.manifest.context
    stride = text.stride or min(store.manifest.stride, context)
    check_stride(stride, context, ", which the datastore was made with")
    return replace(text, context=context, stride=stride)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Layers of a datastore compared with the plain LM, and the data behind the comparison."""

    queries: Queries
    outcomes: Sequence[LayerOutcome]
    result: EvalResult

    @property
    def shown(self) -> LayerOutcome:
        """Outcome of the chosen layer, else of the best one, else of the first."""
        wanted = self.result.selected or self.result.best
        return next((one for one in self.outcomes if one.layer == wanted), self.outcomes[0])


@contextmanager
def compare_layers(
    job: Job,
    store: AnyStore,
    documents: Sequence[TokenDocument],
    layers: Sequence[str],
    scored: ScoreResult | None,
    *,
    exact: bool,
    fit_weights: bool = False,
) -> Iterator[Comparison]:
    """Perplexity of the layers, with the scores and the choice that the datastore was made with.

    The queries exist for the duration of the block.
    :param exact: use exact search even if there is an index.
    :param fit_weights: also fit the weights of several datastores.
    """
    lm, knn, progress = job.lm, job.settings.knn, job.progress
    warnings = overlap_warning(documents, store, progress)
    with open_queries(
        lm, documents, job.window, layers, batch_tokens=job.batch_tokens, fitted=knn.is_fitted, progress=progress
    ) as queries:
        found = evaluate_layers(
            store,
            queries,
            layers,
            knn,
            exact=exact,
            fit_weights=fit_weights,
            memory=job.settings.memory,
            opening=job.opening,
            progress=progress,
        )
        outcomes = list(found)
        result = summarize(queries, outcomes, scored)
        compared = Comparison(queries, outcomes, result)
        with progress.stage("finding examples", "tokens"):
            count = job.settings.evaluation.examples
            helped, hurt = find_examples(
                lm,
                store,
                queries,
                compared.shown,
                count,
                metric=knn.metric,
                exact=exact,
                memory=job.settings.memory,
                opening=job.opening,
            )
        for one in store.stores:
            one.check_untouched()
        result = replace(
            result,
            helped=helped,
            hurt=hurt,
            keys=store.count,
            warnings=(*result.warnings, *warnings, *(() if exact else _unlike_searches(store, layers))),
            settings=job.record(),
            versions=versions(),
        )
        yield replace(compared, result=result)


def _unlike_searches(store: AnyStore, layers: Sequence[str]) -> tuple[str, ...]:
    """Return a warning if some layers are searched through an approximate index and others exactly."""
    indexed = [
        name
        for name in layers
        if any(one.manifest.indexes.get(name, {}).get("spec", "exact") != "exact" for one in store.stores)
    ]
    if not indexed or len(layers) == 1:
        return ()
    return (
        f"{', '.join(indexed)} was searched through its index, the other layers exactly: the best layer and the regret "
        "compare unlike searches; `index='exact'` compares like with like",
    )


def index_chosen(job: Job, store: Datastore, compared: Comparison) -> EvalResult:
    """Index the shown layer; if the index is approximate, measure perplexity with it.

    If the index cannot be built, the result has a warning.
    """
    queries, one, result = compared.queries, compared.shown, compared.result
    report, warnings = try_index(store, one.layer, job.settings, job.progress, queries.vectors(one.layer))
    if report is not None and report.spec != "exact":
        with job.progress.stage("perplexity through the index", "queries"):
            perplexity = perplexity_through_index(store, queries, one, job.settings.knn.metric, job.settings.memory)
        report = replace(report, perplexity=perplexity)
    return replace(result, index=report, warnings=(*result.warnings, *warnings))


def fitted_settings(result: EvalResult) -> dict[str, dict[str, object]]:
    """Fitted settings by layer, in the form of a datastore's manifest."""
    return {one.layer: _setting(one) for one in result.layers}


def _setting(one: LayerResult) -> dict[str, object]:
    moved = one.by_query
    gate = moved and {"offset": moved.offset, "distance": moved.distance, "different": moved.different}
    return {"k": one.k, "lambda": one.lam, "temperature": one.temperature, "gate": gate}

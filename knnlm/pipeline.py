"""The verbs: score, build, evaluate, run. The command line is a thin skin over these.

    lm = load_model("my-model")
    store = build(lm, ["nursing.jsonl"], "nursing.knn")
    result = evaluate(lm, store, ["held-out.jsonl"])
    print(result.lm.perplexity, [(one.layer, one.perplexity) for one in result.layers])

Each takes one `Settings`; what is not said there has a default, and `None` means fitted or found out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from knnlm.choose import SCORES_THAT_CHOOSE, candidate_layers, choose
from knnlm.collect import Collected, collect
from knnlm.config import Settings, TextConfig
from knnlm.corpus import read_documents, read_text_rows, tokenize
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
from knnlm.indexing import index_layer
from knnlm.layers import select_layers
from knnlm.lm import LanguageModel
from knnlm.overlap import overlap
from knnlm.plan import check_choice, check_query_room, estimate_tokens, make_plan, versions, window_config
from knnlm.progress import Progress, Silent
from knnlm.report.document import score_document, score_from_document
from knnlm.results import EvalResult, IndexReport, LayerResult, ScoreResult
from knnlm.scoring import LayerScorer, Separated
from knnlm.search import check_count, is_exact, searched_layers
from knnlm.storage import new_folder
from knnlm.windows import TokenDocument, WindowConfig, count_targets, hold_out, rows_to_groups, take_slices

Paths = Sequence[str | Path]
DEFAULTS = Settings()

# Tokens on which `build` chooses before the one pass that stores the chosen layer.
SAMPLE_TOKENS = 200_000
# Shared 13-grams in more than this share of the evaluation text are worth a warning.
OVERLAP_SHARE = 0.02


def score(
    lm: LanguageModel,
    text: Paths,
    *,
    settings: Settings = DEFAULTS,
    stop_early: bool = False,
    every: int = 1,
    progress: Progress | None = None,
) -> ScoreResult:
    """Dispersion and the other label-free scores of every layer asked for, and the choice; writes nothing.

    :param stop_early: stop when the most dispersed candidate's interval lies above all others'.
    :param every: look at every so-manieth document only, to spread a budget of tokens over a large text.
    """
    progress = progress or Silent()
    layers = select_layers(settings.layers.layers or "all", lm.layer_names)
    check_choice(lm, layers, settings)
    scorer = LayerScorer({name: lm.dims[name] for name in layers}, seed=settings.seed)
    separated = Separated(candidate_layers(settings.layers, layers, lm.layer_names))
    window = window_config(lm, settings.text)
    with progress.stage("scoring layers", "tokens") as advance:
        collected = collect(
            lm,
            _documents(lm, text, settings, every),
            window,
            layers,
            batch_tokens=settings.text.batch_tokens(window.context),
            scorer=scorer,
            advance=lambda done, _: advance(done, settings.text.max_tokens),
            stop=separated if stop_early else None,
        )
    return _score_result(lm, scorer, collected, window, settings, progress, stopped_early=separated.met)


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

    :raises DatastoreExists: `out` holds something already; nothing was done.
    """
    progress = progress or Silent()
    with new_folder(Path(out), overwrite=overwrite) as folder:
        check_choice(lm, select_layers(settings.layers.layers or "all", lm.layer_names), settings)
        sampled = _choose_on_sample(lm, text, settings, progress)
        layers = (sampled.choice.layer,) if sampled else _named_layers(lm, settings)
        documents = _documents(lm, text, settings)
        scored = _extract(lm, documents, layers, folder, settings, progress, sampled=sampled)
    store = Datastore.open(Path(out))
    index_layer(store, scored.choice.layer, settings, progress)
    return store


def _named_layers(lm: LanguageModel, settings: Settings) -> tuple[str, ...]:
    return select_layers(settings.layers.layers or settings.layers.select, lm.layer_names)


def _choose_on_sample(lm: LanguageModel, text: Paths, settings: Settings, progress: Progress) -> ScoreResult | None:
    """The scores of the candidates on a sample that ends when the choice is clear; None where layers are named."""
    layers = settings.layers
    if layers.layers is not None or layers.select not in SCORES_THAT_CHOOSE:
        return None
    tokens = min(SAMPLE_TOKENS, settings.text.max_tokens or SAMPLE_TOKENS)
    every = max(1, (estimate_tokens(lm, text, settings.text) or 0) // tokens)
    sample = replace(
        settings,
        text=replace(settings.text, max_tokens=tokens),
        layers=replace(layers, layers=layers.candidates),
    )
    sampled = score(lm, text, settings=sample, stop_early=layers.select == "dispersion", every=every, progress=progress)
    progress.note(f"{sampled.choice.reason}, on {sampled.tokens:,} tokens")
    if sampled.choice.disagreement:
        progress.note(sampled.choice.disagreement)
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
    names = searched_layers(store, settings)
    settings = replace(settings, text=_windows_like(store, settings.text))
    documents = _read_evaluation(lm, eval_text, settings)
    check_query_room(lm, names, count_targets(documents))
    scores = store.manifest.scores  # null where Python code wrote the datastore without any
    scored = None if scores is None else score_from_document(scores)
    exact = is_exact(settings.knn.index)
    return _evaluate(lm, store, documents, names, scored, settings, exact=exact, progress=progress or Silent())


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
    :raises DatastoreExists: `out` holds something already; nothing was done.
    """
    progress, clock = progress or Silent(), _Clock()
    evaluation = _read_evaluation(lm, eval_text, settings) if eval_text else None
    with new_folder(Path(out), overwrite=overwrite) as folder:
        plan = make_plan(lm, text, folder, settings, evaluation)
        progress.note(plan.sentence)
        documents = _documents(lm, text, settings)
        budget = settings.evaluation.eval_tokens
        held_out = hold_out(documents, max_tokens=budget, seed=settings.seed) if evaluation is None else None
        training = held_out.training if held_out else documents
        with clock.time("extract and score"):
            scored = _extract(lm, training, plan.layers, folder, settings, progress, total=plan.tokens)
        if held_out:
            evaluation = held_out.evaluation
            check_evaluation(evaluation)
    store = Datastore.open(Path(out))
    with clock.time("evaluate and index"):
        result = _evaluate(
            lm, store, evaluation or [], plan.layers, scored, settings, exact=True, index=True, progress=progress
        )
    store.update_manifest(fitted={one.layer: _setting(one) for one in result.layers})
    return replace(result, seconds=clock.seconds)


def _setting(one: LayerResult) -> dict[str, float]:
    return {"k": one.k, "lambda": one.lam, "temperature": one.temperature}


def _documents(lm: LanguageModel, text: Paths, settings: Settings, every: int = 1) -> Iterator[TokenDocument]:
    """The text as the protocol cuts it: documents, or groups of rows."""
    config = settings.text
    if config.protocol == "documents":
        documents = islice(read_documents(text, text_field=config.text_field), 0, None, every)
        return tokenize(documents, lm.encode, max_tokens=config.max_tokens)
    rows = islice(read_text_rows(text, text_field=config.text_field), 0, None, every)
    tokens = (TokenDocument(lm.encode(row.text), row.source, row.number) for row in rows)
    return rows_to_groups(tokens, window_config(lm, config))


def _read_evaluation(lm: LanguageModel, eval_text: Paths, settings: Settings) -> list[TokenDocument]:
    """The evaluation text, cut to its budget; groups of rows are never cut, which would move their windows."""
    whole = replace(settings, text=replace(settings.text, max_tokens=None))
    budget = settings.evaluation.eval_tokens if settings.text.protocol == "documents" else None
    sliced = take_slices(_documents(lm, eval_text, whole), budget, seed=settings.seed)
    check_evaluation(sliced)
    return sliced


def _extract(
    lm: LanguageModel,
    documents: Iterable[TokenDocument],
    layers: Sequence[str],
    folder: Path,
    settings: Settings,
    progress: Progress,
    *,
    total: int | None = None,
    sampled: ScoreResult | None = None,
) -> ScoreResult:
    """One pass: keys of the layers into the folder, their scores and the choice into its manifest.

    :param total: about how many tokens there are, for the time left.
    :param sampled: the scores by which the layers were chosen before; they are kept in place of new ones.
    """
    window = window_config(lm, settings.text)
    dims = {name: lm.dims[name] for name in layers}
    scorer = None if sampled else LayerScorer(dims, seed=settings.seed)
    with DatastoreWriter(folder, dims, key_dtype=settings.key_dtype) as writer:
        with progress.stage("extracting keys", "tokens") as advance:
            collected = collect(
                lm,
                documents,
                window,
                layers,
                batch_tokens=settings.text.batch_tokens(window.context),
                scorer=scorer,
                writer=writer,
                advance=lambda done, _: advance(done, max(total, done) if total else None),
            )
        check_count(settings.knn, collected.tokens)
        scored = sampled
        if scorer is not None:
            scored = _score_result(lm, scorer, collected, window, settings, progress)
        assert scored is not None
        writer.finish(
            fingerprint=lm.fingerprint,
            context=window.context,
            stride=window.stride,
            corpus=collected.fingerprint,
            scores=score_document(scored),
            versions=versions(),
        )
    return scored


def _score_result(
    lm: LanguageModel,
    scorer: LayerScorer,
    collected: Collected,
    window: WindowConfig,
    settings: Settings,
    progress: Progress,
    *,
    stopped_early: bool = False,
) -> ScoreResult:
    """The scores of a finished pass, and the choice that follows from them."""
    with progress.stage("effective rank and retrieval probe", "layers") as advance:
        scores = scorer.scores(advance)
    return ScoreResult(
        layers=scores,
        choice=choose(scores, settings.layers, lm.layer_names),
        tokens=scorer.tokens,
        segments=scorer.segments,
        documents=collected.documents,
        stopped_early=stopped_early,
        settings=_record(lm, window, settings),
        versions=versions(),
    )


def _evaluate(
    lm: LanguageModel,
    store: Datastore,
    documents: Sequence[TokenDocument],
    layers: Sequence[str],
    scored: ScoreResult | None,
    settings: Settings,
    *,
    exact: bool,
    index: bool = False,
    progress: Progress,
) -> EvalResult:
    """Perplexity of the layers, beside the scores and the choice that the datastore was made with.

    :param exact: search exactly, whatever index there is.
    :param index: then index the chosen layer and measure what that costs.
    """
    window = window_config(lm, settings.text)
    knn, config = settings.knn, settings.evaluation
    fitted = None in (knn.k, knn.temperature, knn.lam)
    warnings = _overlap_warning(documents, store)
    batch_tokens = settings.text.batch_tokens(window.context)
    with open_queries(
        lm, documents, window, layers, batch_tokens=batch_tokens, fitted=fitted, progress=progress
    ) as queries:
        outcomes = list(evaluate_layers(store, queries, layers, knn, exact=exact, progress=progress))
        result = summarize(lm, queries, outcomes, config, scored, seed=settings.seed)
        shown = next(one for one in outcomes if one.layer == (result.selected or result.best))
        helped, hurt = find_examples(lm, store, queries, shown, config.examples, metric=knn.metric, exact=exact)
        report = _index(store, queries, shown, settings, progress) if index else None
    return replace(
        result,
        helped=helped,
        hurt=hurt,
        index=report,
        keys=store.count,
        warnings=(*result.warnings, *warnings),
        settings=_record(lm, window, settings),
        versions=versions(),
    )


def _index(
    store: Datastore, queries: Queries, one: LayerOutcome, settings: Settings, progress: Progress
) -> IndexReport:
    """Index the layer; where the index is not exact, measure the perplexity that it gives."""
    report = index_layer(store, one.layer, settings, progress, queries.vectors(one.layer))
    if report.spec == "exact":
        return report
    return replace(report, perplexity=perplexity_through_index(store, queries, one, settings.knn.metric))


def _overlap_warning(documents: Sequence[TokenDocument], store: Datastore) -> tuple[str, ...]:
    share = overlap(documents, [store.values])
    if share < OVERLAP_SHARE:
        return ()
    return (
        f"{share:.1%} of the evaluation text's 13-grams also stand in the datastore: its perplexity is flattered; "
        "take evaluation text that the datastore does not hold",
    )


def _record(lm: LanguageModel, window: WindowConfig, settings: Settings) -> Mapping[str, object]:
    """The settings as they were used, for the report."""
    record: dict[str, object] = {"model": lm.name, "dtype": str(lm.dtype), "device": str(lm.device)}
    for name, group in asdict(settings).items():
        record |= group if isinstance(group, dict) else {name: group}
    return record | {"context": window.context, "stride": window.stride}


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

"""Text that `build` keeps back, and what is fitted on it: k, lambda, T and the gate of every stored layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from knnlm.config import LEAST_EVAL_TOKENS
from knnlm.errors import DatastoreError, InputError
from knnlm.evaluation.outcomes import evaluate_layers
from knnlm.evaluation.queries import check_evaluation, open_queries
from knnlm.evaluation.summary import summarize
from knnlm.knn.indexing import try_index
from knnlm.knn.retrieval import search_metric
from knnlm.knn.searcher import is_exact
from knnlm.pipeline.job import Job, Paths
from knnlm.pipeline.plan import check_query_room
from knnlm.pipeline.steps import fitted_settings
from knnlm.results import EvalResult
from knnlm.shown import brief, change, figure
from knnlm.store.datastore import Datastore
from knnlm.store.joint import JointStore
from knnlm.text.held_out import keep_back
from knnlm.text.windows import TokenDocument, count_targets

# Of the text, at least and at most in tokens; of a short text no more than a tenth.
SHARE, LEAST_TOKENS, MOST_TOKENS, MOST_SHARE = 0.01, 2_000, 20_000, 0.1


class TextSplit(NamedTuple):
    """The text of a build."""

    documents: Iterator[TokenDocument]
    """Those to store."""
    kept_back: Callable[[], Sequence[TokenDocument]]
    """Those to fit on, once `documents` is exhausted."""
    queries: int
    """How many tokens that will be, about; 0 if it is not known."""


def share_to_keep(tokens: int | None) -> float:
    """Return the share of a text of `tokens` tokens that is kept back; 0 if it is too short to fit anything on.

    :param tokens: None where the size is not known beforehand.
    """
    if not tokens:
        return SHARE if tokens is None else 0.0
    wanted = min(max(SHARE * tokens, LEAST_TOKENS), MOST_TOKENS, MOST_SHARE * tokens)
    return wanted / tokens if wanted >= LEAST_EVAL_TOKENS else 0.0


def split_off(job: Job, text: Paths, eval_text: Paths | None, total: int | None) -> TextSplit:
    """Divide the text into what is stored and what is fitted on.

    :param eval_text: the text to fit on; None: a share of the text is kept back.
    :param total: approximate number of tokens.
    :raises InputError: the evaluation text is too short.
    """
    documents, settings = job.documents(text), job.settings
    if eval_text:
        given = job.evaluation_documents(eval_text)
        check_evaluation(given)
        return TextSplit(documents, lambda: given, count_targets(given))
    share = share_to_keep(total)
    reason = "" if share else f"a text of about {total:,} tokens is too short to keep some back"
    if settings.text.protocol != "documents":
        reason = f"`protocol={settings.text.protocol!r}` stores the whole text"
    if reason:
        return TextSplit(documents, lambda: _nothing(job, reason), 0)
    held_out = keep_back(documents, share=share, max_tokens=settings.evaluation.eval_tokens, seed=settings.seed)
    return TextSplit(held_out.training, lambda: _told(job, held_out.evaluation), int(share * (total or 0)))


def _nothing(job: Job, reason: str) -> list[TokenDocument]:
    job.progress.note(f"k, λ and T are not fitted: {reason}; give `eval_text`, or fit them with `knnlm.evaluate`")
    return []


def _told(job: Job, documents: list[TokenDocument]) -> list[TokenDocument]:
    try:
        check_evaluation(documents)
    except InputError:
        return _nothing(job, f"only {count_targets(documents):,} tokens could be kept back")
    names = brief([f"{one.source} {one.number}" for one in documents])
    job.progress.note(f"kept back to fit k, λ and T, and not stored: {count_targets(documents):,} tokens ({names})")
    return documents


def index_and_fit(job: Job, store: Datastore, layer: str, documents: Sequence[TokenDocument]) -> None:
    """Index the layer, then fit the settings of all layers through the indexes they are searched with, and store them.

    The index's recall is measured on the same text. Without documents nothing is fitted.
    """
    lm, settings, progress = job.lm, job.settings, job.progress
    if not documents:
        _, warnings = try_index(store, layer, settings, progress)
        _note(job, warnings)
        return
    check_query_room(lm, store.layers, count_targets(documents))
    fitted = settings.knn.is_fitted
    with open_queries(
        lm, documents, job.window, store.layers, batch_tokens=job.batch_tokens, fitted=fitted, progress=progress
    ) as queries:
        _, warnings = try_index(store, layer, settings, progress, queries.vectors(layer))
        outcomes = list(
            evaluate_layers(store, queries, store.layers, settings.knn, memory=settings.memory, progress=progress)
        )
        result = summarize(queries, outcomes, None)
    store.update_manifest(fitted=fitted_settings(result))
    _note(job, (*warnings, *result.warnings, _gain(result, layer)))


def _note(job: Job, lines: Sequence[str]) -> None:
    for line in lines:
        job.progress.note(line)


def _gain(result: EvalResult, layer: str) -> str:
    """What the memory is worth as text is generated with it: with λ by query and text."""
    one = next(one for one in result.layers if one.layer == layer)
    mixed = one.by_query.perplexity if one.by_query else one.perplexity
    plain = result.lm.perplexity
    return (
        f"perplexity on {result.lm.tokens:,} held-out tokens: {figure(plain, '.2f')} → {figure(mixed, '.2f')} with the "
        f"memory of {layer} ({change(mixed / plain - 1)})"
    )


def keep_fit(job: Job, store: Datastore, result: EvalResult) -> None:
    """Store what an evaluation fitted, and say so; a datastore that cannot be written to is left as it is.

    Only what later calls would search with is stored: nothing if k, lambda, T, another metric or another search was
    given.
    """
    knn, progress = job.settings.knn, job.progress
    given = [f"`{name}`" for name in ("k", "temperature", "lam") if getattr(knn, name) is not None]
    if given:
        progress.note(f"{store.folder} keeps the settings that it had, as {', '.join(given)} was given")
        return
    fitted = {layer: one for layer, one in fitted_settings(result).items() if _is_own_search(store, layer, job)}
    if not fitted:
        progress.note(f"{store.folder} keeps the settings that it had, as it was searched in another way than its own")
        return
    try:
        with store.changing():
            store.update_manifest(fitted={**(store.manifest.fitted or {}), **fitted})
    except (DatastoreError, OSError) as error:
        progress.note(f"the fitted k, λ and T are not stored: {error}")
        return
    progress.note(f"fitted k, λ and T of {brief(list(fitted))} are stored in {store.folder}")


def fit_of_several(store: JointStore, result: EvalResult) -> str:
    """Return what was fitted for several datastores as a note: none of them keeps it."""
    wanted = result.selected or result.best
    one = next((one for one in result.layers if one.layer == wanted), result.layers[0])
    weights = ",".join(f"{weight:.4g}" for weight in one.weights)
    setting = f"`k={one.k}`, `temperature={one.temperature:.6g}`, `lam={one.lam:.6g}`, `weights={weights}`"
    return (
        f"none of {', '.join(store.names)} keeps what was fitted for all together; give it where they are used "
        f"together: at {one.layer} {setting}"
    )


def _is_own_search(store: Datastore, layer: str, job: Job) -> bool:
    knn, index = job.settings.knn, store.manifest.indexes.get(layer)
    exactly = index is None or is_exact(str(index["spec"]))
    return knn.metric == search_metric(store, layer) and (exactly or not is_exact(knn.index))
